"""Prefect artifacts of a deployment run: metrics, the decision of the promotion gate, and links."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import get_client
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

from fadeformer.io.atomic import read_json
from fadeformer.io.formatting import format_with_interval
from pipelines import paths
from pipelines.tracking import locations

RUN_URL = "{server}/#/experiments/{experiment}/runs/{run}"


def publish_metrics() -> None:
    """Publish the overall metrics of val and test as a table, those of test with confidence intervals."""
    metrics, intervals = read_json(paths.METRICS), read_json(paths.INTERVALS)["test"]["overall"]
    rows = [
        {
            "metric": name.replace("_", " "),
            "test": format_with_interval(value, intervals.get(name)),
            "val": format_with_interval(val_value, None),
        }
        for (name, value), val_value in zip(
            metrics["test"]["overall"].items(), metrics["val"]["overall"].values(), strict=True
        )
    ]
    create_table_artifact(rows, key="metrics", description="Metrics on test with confidence intervals, and on val")


def publish_decision() -> None:
    """Publish the decision of the promotion gate, check by check."""
    text = format_decision(read_json(paths.PROMOTION))
    create_markdown_artifact(text, key="verdict", description="The promotion gate")


def format_decision(promotion: Mapping[str, Any]) -> str:
    """Format the decision of the promotion gate as Markdown.

    Args:
        promotion: Content of reports/promotion.json.
    """
    forced = " by force" if promotion["forced"] else ""
    rows = [(check["requirement"], check["status"], check["details"]) for check in promotion["checks"]]
    cells = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join(
        [
            f"# {promotion['model']} version {promotion['version']}: {promotion['decision']}{forced}",
            "", promotion["reason"], "", "| check | status | details |", "| --- | --- | --- |",
            *(f"| {row} |" for row in cells),
        ]
    )  # fmt: skip


def publish_links() -> None:
    """Publish links to the MLflow run and its report, if MLflow has a server with a UI."""
    server = locations.ui_url()
    if server is None or not paths.RUN.is_file():  # the run ended before training
        return
    run = read_json(paths.RUN)
    run_id = run["mlflow_run_id"]
    url = RUN_URL.format(server=server, experiment=run["mlflow_experiment_id"], run=run_id)
    create_link_artifact(url, key="mlflow-run", link_text="MLflow run", description=f"MLflow run {run_id}")
    if paths.REPORT.is_file():  # sweep trials have no report
        create_link_artifact(f"{url}/artifacts/{paths.REPORT.name}", key="report", link_text="Report")


def publish_experiment(name: str) -> None:
    """Publish the commands that bring the parameters and results of this run into a working copy."""
    repository = read_json(locations.WORKSPACE_MARKER)["repository"]
    text = f"`dvc exp apply {name}`"
    if (Path(repository) / ".git").exists():  # deployed from this folder, so it already has the experiment
        text += " in the repository that this was deployed from"
    else:
        text = f"`dvc exp pull {repository} {name}`, then {text}"
    create_markdown_artifact(text, key="experiment", description="The DVC experiment that holds this run")


def read_run_summary(flow_run_id: UUID) -> dict[str, str]:
    """Read the test AUC and the promotion decision of another run from its artifacts."""
    with get_client(sync_client=True) as client:
        of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
        by_key = {item.key: str(item.data) for item in client.read_artifacts(artifact_filter=of_run)}
    summary = {}
    if "metrics" in by_key:
        summary["test AUC"] = next(row["test"] for row in json.loads(by_key["metrics"]) if row["metric"] == "auc")
    if "verdict" in by_key:
        summary["decision"] = by_key["verdict"].splitlines()[0].removeprefix("# ")
    return summary
