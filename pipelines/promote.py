"""Stage promote: reads predictions and the run's id, registers the model, writes reports/promotion.json: the gate."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from fadeformer import arrays, gate, params, predictions
from fadeformer.files import read_json, write_json
from pipelines import packaged, paths, registry, stage, tracking


def main() -> str:
    """Registers the version and decides about the alias; a refusal is a decision, not an error."""
    wanted = params.load(paths.PARAMS).promote
    run_id = read_json(paths.RUN)["mlflow_run_id"]
    meta = arrays.read_meta(paths.PROCESSED)
    name = wanted.model_name.replace("{dataset}", meta.dataset["name"])
    with tracking.run(run_id):
        version = registry.register(name, run_id, packaged.log(run_id).model_id)
        champion = registry.champion(name)
        rival = None if champion is None or champion == version else registry.test_predictions(champion)
        decision = gate.decide(predictions.read(paths.PREDICTIONS).of("test"), rival, min_auc=wanted.min_auc)
        aliases = registry.place(version, decision, paths.CARD.read_text(encoding="utf-8"))
        write_json(
            paths.PROMOTION,
            {
                "model": name, "version": version.number, "mlflow_run_id": run_id,
                "decision": "promoted" if decision.promoted else "refused",
                "aliases": aliases,
                "previous_champion": champion.number if champion else None,
                "reason": decision.reason,
                "auc": decision.auc, "champion_auc": decision.champion_auc,
                "cross_split_duplicates": meta.cross_split_duplicates,
                "rules": [asdict(rule) for rule in decision.rules],
            },
        )  # fmt: skip
        tracking.log_settings("promote", wanted.model_dump())
        tracking.log_files(paths.PROMOTION, *filter(Path.is_file, [paths.LOCK]))
    if decision.promoted:
        return f"PROMOTED {name} version {version.number} is champion ({decision.reason})"
    return f"REFUSED {name} version {version.number} stays {' and '.join(aliases)} ({decision.reason})"


if __name__ == "__main__":
    stage.run("promote", main)
