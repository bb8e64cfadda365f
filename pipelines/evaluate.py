"""Stage evaluate: reads data/processed and models/, writes reports/ (predictions, numbers, figures); a Prefect flow."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pandas as pd
import torch
from prefect import flow, task

from fadeformer import arrays, evidence_plots, medmnist_results, metrics, operating, params, plots, predictions, summary
from fadeformer.card import model_card
from fadeformer.errors import UserError
from fadeformer.files import read_json, whole_file, whole_folder, write_json
from fadeformer.inference import choose_device, choose_precision, logits_of
from fadeformer.models import create_model, load_weights
from fadeformer.normalisation import Normalisation
from pipelines import begun, paths, stage, tracking
from pipelines.orchestrator import orchestrated


@task(name="predict", persist_result=False)
def predict(batch_size: int) -> None:
    """Scores of every image of val and test, as predictions.parquet."""
    meta = arrays.read_meta(paths.PROCESSED)
    described = read_json(paths.ARCHITECTURE)
    device = choose_device("cpu" if described["params"]["train"]["device"] == "cpu" else "auto")
    model = create_model(**{**described["model"], "pretrained": False})
    load_weights(model, paths.WEIGHTS)
    model.to(device)
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    splits = [arrays.read(paths.PROCESSED, split) for split in ("val", "test")]
    # a model that was trained in float16 is judged in float32 where there is no GPU
    told = "32" if described["precision"] == "16" and device.type == "cpu" else described["precision"]
    precision, normalisation = choose_precision(told, device), Normalisation(**described["normalise"])
    began = time.perf_counter()
    logits = np.concatenate(
        [logits_of(model, split.pixels, batch_size, device, precision, normalisation) for split in splits]
    )
    tracking.log_metrics({"seconds": {"predict": time.perf_counter() - began}})
    table = predictions.table(
        pd.concat([split.index for split in splits], ignore_index=True),
        np.concatenate([split.labels for split in splits]),
        meta.task.with_head(described["head"]).probabilities(logits),
        meta.task,
        meta.classes,
    )
    with whole_file(paths.PREDICTIONS) as path:
        predictions.write(table, path)


@task(name="measure", persist_result=False)
def measure(settings: dict[str, Any]) -> dict[str, float]:
    """Every number, from predictions.parquet: metrics, intervals, operating points, curves, model card."""
    table = predictions.read(paths.PREDICTIONS)
    val, test = table.of("val"), table.of("test")
    described, meta = read_json(paths.ARCHITECTURE), arrays.read_meta(paths.PROCESSED)
    found = {"val": summary.summarise(val), "test": summary.summarise(test)}
    write_json(paths.METRICS, {split: values["overall"] for split, values in found.items()})
    write_json(paths.CLASSES, {split: values["per_class"] for split, values in found.items()})
    began = time.perf_counter()
    confidence = settings["confidence"]
    intervals = summary.intervals(
        test, draws=settings["bootstrap_draws"], seed=settings["bootstrap_seed"], confidence=confidence
    )
    write_json(paths.INTERVALS, {"confidence": confidence, "test": intervals})
    wanted = {
        "youden": None, "sensitivity": settings["sensitivity_at_least"], "specificity": settings["specificity_at_least"]
    }  # fmt: skip
    points = operating.operating_points(val, test, wanted, confidence)
    write_json(paths.OPERATING_POINTS, {"wanted": wanted, "confidence": confidence, "points": points})
    tracking.log_metrics({"seconds": {"intervals": time.perf_counter() - began}})
    # The challenges' balanced accuracy is never told without the split that it is of.
    balanced = {"value": found["test"]["overall"]["balanced_accuracy"], "split": meta.split}
    config = {**described["params"], "evaluate": settings}
    published = summary.published_results(found["test"], pd.read_csv(paths.HISTORY), config)
    write_json(paths.RESULTS, {**published, "test_balanced_accuracy": balanced})
    with whole_file(paths.CARD) as path:
        card = model_card(meta, described, found, intervals, read_json(paths.OPERATING_POINTS))
        path.write_text(card, encoding="utf-8")
    with whole_folder(paths.CURVES) as folder:
        metrics.roc_points(test).to_csv(folder / "roc.csv", index=False)
        metrics.pr_points(test).to_csv(folder / "pr.csv", index=False)
        operating.net_benefit(test).to_csv(folder / "net_benefit.csv", index=False)
    with whole_folder(paths.MEDMNIST) as folder:
        (folder / "about.txt").write_text(medmnist_results.ABOUT, encoding="utf-8")  # DVC warns of an empty folder
        flag = meta.dataset["name"]
        if flag.endswith("mnist") and not flag.startswith("own-") and meta.split == "published":
            of_run = {"size": meta.dataset["size"], "run": str(described["params"]["seed"])}
            for split, part in (("val", val), ("test", test)):
                medmnist_results.write(part, folder, flag=flag, split=split, **of_run)
    return dict(found["test"]["overall"])


@task(name="draw figures", persist_result=False)
def draw(dpi: int) -> None:
    """Every figure, as PNG and SVG."""
    test = predictions.read(paths.PREDICTIONS).of("test")
    history, best_epoch = pd.read_csv(paths.HISTORY), read_json(paths.ARCHITECTURE)["best_epoch"]
    found, intervals = summary.summarise(test), read_json(paths.INTERVALS)
    confidence = intervals["confidence"]
    figures = {
        "training_curves": plots.training_curves(history, best_epoch),
        "confusion_matrix": plots.confusion_matrix(test),
        "roc_curves": plots.roc_curves(test),
        "pr_curves": plots.pr_curves(test),
        "auc_forest": evidence_plots.auc_forest(test, found, intervals["test"], confidence),
        "reliability": evidence_plots.reliability(test, found["overall"]["calibration_error"], confidence),
        "decision_curves": evidence_plots.decision_curves(operating.net_benefit(test)),
    }
    with whole_folder(paths.FIGURES) as folder:
        for name, figure in figures.items():
            plots.save(figure, folder / f"{name}.png", dpi)


@task(name="log the evaluation to MLflow", persist_result=False)
def log(settings: dict[str, Any]) -> None:
    """Adds numbers, figures and predictions to the run in which the model was trained."""
    tracking.log_settings("evaluate", settings)
    tracking.log_metrics(read_json(paths.METRICS))
    tracking.log_metrics({"classes": read_json(paths.CLASSES)})
    bounds = read_json(paths.INTERVALS)["test"]["overall"]
    tracking.log_metrics(
        {"interval": {name: dict(zip(("low", "high"), bound, strict=True)) for name, bound in bounds.items() if bound}}
    )
    tracking.log_metrics({"operating_points": read_json(paths.OPERATING_POINTS)["points"]})
    tracking.log_files(
        paths.PREDICTIONS, paths.METRICS, paths.CLASSES, paths.INTERVALS, paths.OPERATING_POINTS, paths.RESULTS,
        paths.CARD,
    )  # fmt: skip
    tracking.log_files(paths.FIGURES, under="figures")
    tracking.log_files(paths.MEDMNIST, under="medmnist")


@flow(name="evaluate", persist_result=False, log_prints=True)
def evaluate() -> str:
    """Predicts, measures and draws."""
    wanted = params.load(paths.PARAMS).evaluate
    try:
        run_id = read_json(paths.RUN)["mlflow_run_id"]
    except OSError as error:
        raise UserError(f"{paths.RUN}: not found; run `dvc repro train` first") from error
    begun.forget(run_id)
    with tracking.run(run_id):
        predict(wanted.batch_size)
        test = measure(wanted.model_dump())
        draw(wanted.figure_dpi)
        log(wanted.model_dump())
    auc = "undefined" if test["auc"] is None else f"{test['auc']:.4f}"
    return (
        f"test AUC {auc}, accuracy {test['accuracy']:.4f}, balanced accuracy {test['balanced_accuracy']:.4f} on the"
        f" split {arrays.read_meta(paths.PROCESSED).split}; figures in {paths.FIGURES}"
    )


def main() -> str:
    """Runs the flow."""
    with orchestrated():
        return evaluate()


if __name__ == "__main__":
    stage.run("evaluate", main)
