"""Stage promote: reads what was found of a model, registers it and decides about the champion: the registry gate.

Writes reports/promotion.json and promotion.html. What was decided stands in the ledger (`pipelines.registry.ledger`) first.
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
from pipelines.registry import champion as rival
from pipelines.registry import ledger, tables, versions
from pipelines.registry import package as packaged
from pipelines.registry.ledger import JudgedVersion
from pipelines.tracking import runs, store


def main(forced: str | None = None) -> str:
    """Register the version and decide about the alias; a refusal is a decision, not an error.

    Args:
        forced: why it is promoted whatever comes of it; None: by the rules alone.
    """
    wanted = schema.load_params(paths.PARAMS).promote
    run_id = read_json(paths.RUN)["mlflow_run_id"]
    meta = arrays.read_metadata(paths.PROCESSED)
    name = model_name(wanted, meta)
    test = predictions.read(paths.PREDICTIONS).select_split("test")
    with runs.start_run(run_id):
        package = packaged.log_package(run_id)
        with ledger.open_ledger(name):
            version = versions.register_version(name, run_id, package.model_id)
        versions.set_description(version, paths.MODEL_CARD.read_text(encoding="utf-8"))
        subject = JudgedVersion(version.number, run_id, package.tags[packaged.CONTENT_TAG], _data_summary(meta, test))
        asked = PromotionCriteria(**wanted.model_dump(exclude={"model_name"}))
        with ledger.open_ledger(name) as book:
            champion = book.champion_to_beat(subject)
            of_champion = None if champion is None else rival.champion_predictions(champion, test)
            decision = gate.decide(_load_candidate(test, book.revocation_reason(subject)), of_champion, asked, forced)
            entry = book.record_decision(subject, decision)
        _write_reports(name, decision, entry, meta)
        runs.log_params_as_tags("promote", wanted.model_dump())
        runs.log_artifacts(paths.PROMOTION, paths.PROMOTION_PAGE, *filter(Path.is_file, [paths.DVC_LOCK]))
    tables.print_decision(decision)
    return _summary(name, decision, entry)


def model_name(wanted: PromoteParams, meta: ArrayMetadata) -> str:
    """The name of the registered model."""
    return wanted.model_name.replace("{dataset}", meta.dataset["name"])


def roll_back(name: str, to: str | None, reason: str) -> str:
    """Makes an earlier champion of a registered model the champion again.

    Args:
        name: of the registered model.
        to: its version; None for the one before the present.
        reason: why, in words.
    """
    store.connect()
    with ledger.open_ledger(name) as book:
        entry = book.roll_back(to, reason)
    gone = ", ".join(one["version"] for one in entry["taken_back"])
    return f"ROLLED BACK {name} version {entry['to']} is champion again; taken back: version {gone} ({reason})"


def _load_candidate(test: Predictions, taken_back: str | None) -> Challenger:
    intervals = read_json(paths.INTERVALS)
    return Challenger(
        test,
        intervals["test"],
        intervals["confidence"],
        read_json(paths.SUBGROUPS)["test"],
        read_json(paths.OPERATING_POINTS)["points"],
        read_json(paths.VALIDATION_RESULT)["passed"],
        taken_back,
    )


def _data_summary(meta: ArrayMetadata, test: Predictions) -> dict[str, Any]:
    """What the model was trained and judged on, as the ledger tells it."""
    return {
        "name": meta.dataset["name"], "sha256": meta.dataset["sha256"], "split": meta.split, "images": meta.counts,
        "test_images": test.fingerprint(), "cross_split_duplicates": meta.cross_split_duplicates,
    }  # fmt: skip


def _write_reports(name: str, decision: Decision, entry: dict[str, Any], meta: ArrayMetadata) -> None:
    number = entry["version"]
    told = {
        "model": name, "version": number, "mlflow_run_id": entry["run_id"],
        "decision": "promoted" if decision.promoted else "refused",
        "forced": decision.force_reason is not None,
        "aliases": [alias for alias, of in entry["aliases"].items() if of == number],
        "previous_champion": entry["from"],
        "reason": decision.reason,
        "auc": decision.auc, "champion_auc": decision.champion_auc,
        "cross_split_duplicates": meta.cross_split_duplicates,
        "ledger_entry": entry["number"],
        **decision.to_dict(),
    }  # fmt: skip
    write_json(paths.PROMOTION, told)
    with atomic_write(paths.PROMOTION_PAGE) as path:
        path.write_text(promotion_page.render_promotion_page(told, ledger.read_entries(name)), encoding="utf-8")


def _summary(name: str, decision: Decision, entry: dict[str, Any]) -> str:
    version = f"{name} version {entry['version']}"
    if decision.promoted:
        return f"PROMOTED {version} is champion ({decision.reason})"
    held = [alias for alias, of in entry["aliases"].items() if of == entry["version"]]
    stays = f"stays {' and '.join(held)}" if held else "gets no alias"
    return f"REFUSED {version} {stays} ({decision.reason})"
