"""Stage promote, the promotion gate: register the model and decide whether it becomes champion.

It reads the results of evaluation, writes the decision to the ledger (`pipelines.registry.ledger`) and then to
reports/promotion.json and promotion.html.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fadeformer.config import schema
from fadeformer.config.schema import PromoteParams
from fadeformer.data import arrays
from fadeformer.data.arrays import ArrayMetadata
from fadeformer.evaluation import predictions
from fadeformer.evaluation.predictions import Predictions
from fadeformer.io.atomic import atomic_write, read_json, write_json
from fadeformer.promotion import gate
from fadeformer.promotion.decision import Decision
from fadeformer.promotion.gate import Challenger, PromotionCriteria
from fadeformer.reporting import promotion_page
from pipelines import paths
from pipelines.registry import ledger, package, tables, versions
from pipelines.registry.champion import champion_predictions
from pipelines.registry.ledger import JudgedVersion
from pipelines.tracking import runs, store


def main(force_reason: str | None = None) -> str:
    """Register the model version and decide about the champion alias. A refused model is a normal outcome.

    Args:
        force_reason: Why to promote it even if checks fail; None to decide by the checks.
    """
    config = schema.load_params(paths.PARAMS).promote
    run_id = read_json(paths.RUN)["mlflow_run_id"]
    meta = arrays.read_metadata(paths.PROCESSED)
    name = model_name(config, meta)
    test = predictions.read(paths.PREDICTIONS).select_split("test")
    with runs.start_run(run_id):
        logged_model = package.log_package(run_id)
        with ledger.open_ledger(name):
            version = versions.register_version(name, run_id, logged_model.model_id)
        versions.set_description(version, paths.MODEL_CARD.read_text(encoding="utf-8"))
        content = logged_model.tags[package.CONTENT_TAG]
        judged = JudgedVersion(version.number, run_id, content, _data_summary(meta, test))
        criteria = PromotionCriteria(**config.model_dump(exclude={"model_name"}))
        with ledger.open_ledger(name) as promotion_ledger:
            champion = promotion_ledger.champion_to_beat(judged)
            to_beat = None if champion is None else champion_predictions(champion, test)
            challenger = _load_challenger(test, promotion_ledger.revocation_reason(judged))
            decision = gate.decide(challenger, to_beat, criteria, force_reason)
            entry = promotion_ledger.record_decision(judged, decision)
        _write_reports(name, decision, entry, meta)
        runs.log_params_as_tags("promote", config.model_dump())
        runs.log_artifacts(paths.PROMOTION, paths.PROMOTION_PAGE, *filter(Path.is_file, [paths.DVC_LOCK]))
    tables.print_decision(decision)
    return _summary(name, decision, entry)


def model_name(config: PromoteParams, meta: ArrayMetadata) -> str:
    """Return the name of the registered model, `promote.model_name` with {dataset} filled in."""
    return config.model_name.replace("{dataset}", meta.dataset["name"])


def roll_back(name: str, to: str | None, reason: str) -> str:
    """Make an earlier champion of a registered model champion again.

    Args:
        name: Name of the registered model.
        to: Its version; None for the previous champion.
        reason: Why, in words; it is written to the ledger.
    """
    store.connect()
    with ledger.open_ledger(name) as promotion_ledger:
        entry = promotion_ledger.roll_back(to, reason)
    revoked = ", ".join(version["version"] for version in entry["revoked"])
    return f"ROLLED BACK {name} version {entry['to']} is champion again; revoked: version {revoked} ({reason})"


def _load_challenger(test: Predictions, revoked: str | None) -> Challenger:
    intervals = read_json(paths.INTERVALS)
    return Challenger(
        test,
        intervals["test"],
        intervals["confidence"],
        read_json(paths.SUBGROUPS)["test"],
        read_json(paths.OPERATING_POINTS)["points"],
        read_json(paths.VALIDATION_RESULT)["passed"],
        revoked,
    )


def _data_summary(meta: ArrayMetadata, test: Predictions) -> dict[str, Any]:
    """Return the identity of the data that the model was trained and evaluated on, for the ledger."""
    return {
        "name": meta.dataset["name"], "sha256": meta.dataset["sha256"], "split": meta.split, "images": meta.counts,
        "test_images": test.fingerprint(), "cross_split_duplicates": meta.cross_split_duplicates,
    }  # fmt: skip


def _write_reports(name: str, decision: Decision, entry: dict[str, Any], meta: ArrayMetadata) -> None:
    number = entry["version"]
    summary = {
        "model": name, "version": number, "mlflow_run_id": entry["run_id"],
        "decision": "promoted" if decision.promoted else "refused",
        "forced": decision.force_reason is not None,
        "aliases": [alias for alias, holder in entry["aliases"].items() if holder == number],
        "previous_champion": entry["from"],
        "reason": decision.reason,
        "auc": decision.auc, "champion_auc": decision.champion_auc,
        "cross_split_duplicates": meta.cross_split_duplicates,
        "ledger_entry": entry["number"],
        **decision.to_dict(),
    }  # fmt: skip
    write_json(paths.PROMOTION, summary)
    with atomic_write(paths.PROMOTION_PAGE) as path:
        path.write_text(promotion_page.render_promotion_page(summary, ledger.read_entries(name)), encoding="utf-8")


def _summary(name: str, decision: Decision, entry: dict[str, Any]) -> str:
    version = f"{name} version {entry['version']}"
    if decision.promoted:
        return f"PROMOTED {version} is champion ({decision.reason})"
    aliases = [alias for alias, holder in entry["aliases"].items() if holder == entry["version"]]
    outcome = f"stays {' and '.join(aliases)}" if aliases else "gets no alias"
    return f"REFUSED {version} {outcome} ({decision.reason})"
