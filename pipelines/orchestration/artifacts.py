"""Artifacts on the page of a deployment run in Prefect: metrics, the verdict of the registry gate, and links."""

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
    """The overall measures of val and test, the latter with intervals, as a table."""
    numbers, bounds = read_json(paths.METRICS), read_json(paths.INTERVALS)["test"]["overall"]
    rows = [
        {
            "measure": name.replace("_", " "),
            "test": format_with_interval(value, bounds.get(name)),
            "val": format_with_interval(of_val, None),
        }
        for (name, value), of_val in zip(
            numbers["test"]["overall"].items(), numbers["val"]["overall"].values(), strict=True
        )
    ]
    create_table_artifact(rows, key="metrics", description="Numbers of test with their intervals, and of val")


def publish_decision() -> None:
    """The decision of the registry gate, rule by rule."""
    create_markdown_artifact(
        format_decision(read_json(paths.PROMOTION)), key="verdict", description="The registry gate"
    )


def format_decision(promotion: Mapping[str, Any]) -> str:
    """The same as Markdown.

    Args:
        promotion: as reports/promotion.json has it.
    """
    forced = " by force" if promotion["forced"] else ""
    rows = [(check["requirement"], check["status"], check["details"]) for check in promotion["checks"]]
    cells = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join(
        [
            f"# {promotion['model']} version {promotion['version']}: {promotion['decision']}{forced}",
            "", promotion["reason"], "", "| rule | verdict | figures |", "| --- | --- | --- |",
            *(f"| {row} |" for row in cells),
        ]
    )  # fmt: skip


def publish_links() -> None:
    """The MLflow run and the report in it, where MLflow is a server with pages."""
    server = locations.ui_url()
    if server is None or not paths.RUN.is_file():  # a run that ends before training
        return
    run = read_json(paths.RUN)
    run_id = run["mlflow_run_id"]
    page = RUN_URL.format(server=server, experiment=run["mlflow_experiment_id"], run=run_id)
    create_link_artifact(page, key="mlflow-run", link_text="MLflow run", description=f"MLflow run {run_id}")
    if paths.REPORT.is_file():  # a trial of a sweep has none
        create_link_artifact(f"{page}/artifacts/{paths.REPORT.name}", key="report", link_text="Report")


def publish_experiment(name: str) -> None:
    """How to have parameters and results in a workspace: that of the repository, or one's own clone of it."""
    repository = read_json(locations.WORKSPACE_MARKER)["repository"]
    text = f"`dvc exp apply {name}`"
    if (Path(repository) / ".git").exists():  # the folder that was deployed from: the experiment is there already
        text += " in the repository that this was deployed from"
    else:
        text = f"`dvc exp pull {repository} {name}`, then {text}"
    create_markdown_artifact(text, key="experiment", description="The DVC experiment that holds this run")


def read_run_summary(flow_run_id: UUID) -> dict[str, str]:
    """Test AUC and decision of another run, from the artifacts that it left."""
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
        )
    by_key = {artifact.key: str(artifact.data) for artifact in found}
    shown = {}
    if "metrics" in by_key:
        shown["test AUC"] = next(row["test"] for row in json.loads(by_key["metrics"]) if row["measure"] == "auc")
    if "verdict" in by_key:
        shown["decision"] = by_key["verdict"].splitlines()[0].removeprefix("# ")
    return shown
