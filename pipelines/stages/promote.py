"""Stage promote, the promotion gate: register the model and decide whether it becomes champion.

It reads the results of evaluation, writes the decision to the ledger (`pipelines.registry.ledger`) and then to
reports/promotion.json and promotion.html.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fadeformer.config import schema
from fadeformer.config.schema import PromoteParams
from fadeformer.data import arrays, training_images
from fadeformer.data.arrays import ArrayMetadata
from fadeformer.evaluation import predictions
from fadeformer.evaluation.predictions import Predictions
from fadeformer.io.atomic import atomic_write, read_json, write_json
from fadeformer.promotion import gate
from fadeformer.promotion.comparison import Opponent
from fadeformer.promotion.criteria import Challenger, PromotionCriteria
from fadeformer.promotion.decision import Decision
from fadeformer.reporting import promotion_page
from fadeformer.reporting.tables import data_warnings
from pipelines import paths
from pipelines.registry import ledger, package, tables, versions
from pipelines.registry.champion import load_opponent
from pipelines.registry.ledger import JudgedVersion
from pipelines.registry.versions import ModelVersion
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
            candidate = promotion_ledger.candidate_number(judged)
            challenger = _load_challenger(test, candidate, promotion_ledger.revocation_reason(judged))
            champion = _load_opponent(promotion_ledger.champion_to_beat(judged), "champion", test)
            best = _load_opponent(promotion_ledger.best_champion(judged), "best champion so far", test)
            decision = gate.decide(challenger, champion, criteria, best, force_reason)
            entry = promotion_ledger.record_decision(judged, decision, candidate)
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


def _load_challenger(test: Predictions, candidate: int, revoked: str | None) -> Challenger:
    weights, validation = read_json(paths.ARCHITECTURE)["weights"], read_json(paths.VALIDATION_RESULT)
    return Challenger(
        test=test,
        confidence=read_json(paths.INTERVALS)["confidence"],
        subgroups=read_json(paths.SUBGROUPS)["test"],
        age_bands=read_json(paths.RESULTS)["config"]["evaluate"]["age_bands"],
        operating_points=read_json(paths.OPERATING_POINTS)["points"],
        is_data_valid=validation["passed"],
        data_warnings=data_warnings(validation),
        candidate=candidate,
        initial_weights=None if weights is None else weights["file"],
        initial_images=training_images.read_initial(paths.TRAINING_IMAGES),
        rollback_reason=revoked,
    )


def _load_opponent(version: ModelVersion | None, name: str, test: Predictions) -> Opponent | None:
    return None if version is None else load_opponent(version, name, test)


def _data_summary(meta: ArrayMetadata, test: Predictions) -> dict[str, Any]:
    """Return the identity of the data that the model was trained and evaluated on, for the ledger."""
    return {
        "name": meta.dataset["name"], "sha256": meta.dataset["sha256"], "split": meta.split, "images": meta.counts,
        "test_images": test.fingerprint(), "test_content": test.content_fingerprint(),
        "cross_split_duplicates": meta.cross_split_duplicates,
        "warnings": data_warnings(read_json(paths.VALIDATION_RESULT)),
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
        "counts": decision.counts, "candidate": entry["candidate"],
        "auc": decision.auc, "champion_auc": decision.champion_auc,
        "cross_split_duplicates": meta.cross_split_duplicates,
        "data_warnings": entry["data"]["warnings"],
        "ledger_entry": entry["number"],
        **decision.to_dict(),
    }  # fmt: skip
    write_json(paths.PROMOTION, summary)
    with atomic_write(paths.PROMOTION_PAGE) as path:
        path.write_text(promotion_page.render_promotion_page(summary, ledger.read_entries(name)), encoding="utf-8")


def _summary(name: str, decision: Decision, entry: dict[str, Any]) -> str:
    version = f"{name} version {entry['version']}"
    reason = f"{decision.reason}; candidate {entry['candidate']} on this test set"
    if decision.promoted:
        return f"PROMOTED {version} is champion ({reason})"
    aliases = [alias for alias, holder in entry["aliases"].items() if holder == entry["version"]]
    outcome = f"stays {' and '.join(aliases)}" if aliases else "gets no alias"
    return f"REFUSED {version} {outcome} ({reason})"
