"""Stage evaluate: reads data/processed and models/, writes reports/ (predictions, numbers, figures); a Prefect flow."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from prefect import flow, task

from fadeformer.config import schema
from fadeformer.data import arrays
from fadeformer.errors import UserError
from fadeformer.evaluation import (
    embedding,
    error_gallery,
    medmnist_format,
    metrics,
    operating_points,
    predictions,
    published,
    subgroups,
    summary,
)
from fadeformer.evaluation.intervals import curve_bands
from fadeformer.explain import cases, pointing_game
from fadeformer.inference.classifier import Classifier
from fadeformer.io.atomic import atomic_folder, atomic_write, read_json, write_json
from fadeformer.reporting import report
from fadeformer.reporting.model_card import render_model_card
from fadeformer.reporting.tables import ReportInputs
from pipelines import paths
from pipelines.server import temporary_server
from pipelines.stages import evaluate_figures
from pipelines.tracking import resume, runs

GALLERY_SIZE = 12  # images


def load_classifier() -> Classifier:
    """The classifier of models/."""
    found = Classifier(read_json(paths.ARCHITECTURE), paths.WEIGHTS)
    torch.use_deterministic_algorithms(True, warn_only=found.device.type == "cuda")
    return found


@task(name="predict", persist_result=False)
def predict(batch_size: int, wanted: str | list[str]) -> float:
    """Write predictions.parquet, of every image of val and test, and a map of test images by their features.

    Returns:
        Seconds that the network took.
    """
    meta = arrays.read_metadata(paths.PROCESSED)
    model = load_classifier()
    splits = [arrays.load_split(paths.PROCESSED, split) for split in ("val", "test")]
    began = time.perf_counter()
    of_val, of_test = (model.predict(of.images, batch_size) for of in splits)
    seconds = time.perf_counter() - began
    index = pd.concat([of.index for of in splits], ignore_index=True)
    table = predictions.build_predictions(
        index,
        np.concatenate([of.labels for of in splits]),
        np.concatenate([of_val.scores, of_test.scores]),
        meta.task,
        meta.classes,
        np.concatenate([of_val.raw_scores, of_test.raw_scores]),
        subgroups.select_columns(index.drop(columns=["split", "id", "group"]), wanted),
    )
    with atomic_write(paths.PREDICTIONS) as path:
        predictions.write(table, path)
    with atomic_write(paths.EMBEDDING) as path:
        embedding.pca_projection(of_test.features, splits[1].index["id"]).to_parquet(path, index=False)
    return seconds


def load_report_inputs(found: dict[str, Any]) -> ReportInputs:
    """What card and report are made of: numbers by split, and what lies in reports/ and models/."""
    return ReportInputs(
        meta=arrays.read_metadata(paths.PROCESSED),
        model_metadata=read_json(paths.ARCHITECTURE),
        summary=found,
        intervals=read_json(paths.INTERVALS)["test"],
        operating_points=read_json(paths.OPERATING_POINTS),
        subgroups=read_json(paths.SUBGROUPS)["test"],
    )


@task(name="measure", persist_result=False)
def compute_metrics(settings: dict[str, Any]) -> dict[str, float]:
    """Every number, from predictions.parquet: metrics, intervals, subgroups, operating points, curves, model card."""
    table = predictions.read(paths.PREDICTIONS)
    val, test = table.select_split("val"), table.select_split("test")
    described, meta = read_json(paths.ARCHITECTURE), arrays.read_metadata(paths.PROCESSED)
    found = {"val": summary.summarize(val), "test": summary.summarize(test)}
    began, confidence = time.perf_counter(), settings["confidence"]
    intervals, of_subgroups = subgroups.evaluate_subgroups(
        test, settings["age_bands"], n_resamples=settings["bootstrap_resamples"], seed=settings["bootstrap_seed"],
        confidence=confidence,
    )  # fmt: skip
    write_json(paths.INTERVALS, {"confidence": confidence, "test": intervals})
    write_json(paths.SUBGROUPS, {"confidence": confidence, "test": of_subgroups})
    wanted = {
        "youden": None, "sensitivity": settings["sensitivity_at_least"], "specificity": settings["specificity_at_least"]
    }  # fmt: skip
    points = operating_points.select_operating_points(val, test, wanted, confidence)
    write_json(paths.OPERATING_POINTS, {"targets": wanted, "confidence": confidence, "points": points})
    runs.log_metrics({"seconds": {"intervals": time.perf_counter() - began}})
    uncalibrated = summary.summarize(test.before_calibration())
    write_json(paths.METRICS, summary.collect_metrics(found["test"], found["val"], uncalibrated, of_subgroups, points))
    # The challenges' balanced accuracy is never told without the split that it is of.
    balanced = {"value": found["test"]["overall"]["balanced_accuracy"], "split": meta.split}
    config = {**described["params"], "evaluate": settings}
    of_paper = summary.published_results(found["test"], pd.read_csv(paths.HISTORY), config)
    write_json(paths.RESULTS, {**of_paper, "test_balanced_accuracy": balanced})
    with atomic_write(paths.MODEL_CARD) as path:
        path.write_text(render_model_card(load_report_inputs(found)), encoding="utf-8")
    with atomic_folder(paths.CURVES) as folder:
        metrics.roc_curve_points(test).to_csv(folder / "roc.csv", index=False)
        metrics.pr_curve_points(test).to_csv(folder / "pr.csv", index=False)
        curve_bands.compute_bands(test, seed=settings["bootstrap_seed"], confidence=confidence).to_csv(
            folder / "bands.csv", index=False
        )
        operating_points.net_benefit(test).to_csv(folder / "net_benefit.csv", index=False)
    with atomic_folder(paths.MEDMNIST) as folder:
        (folder / "about.txt").write_text(medmnist_format.README_TEXT, encoding="utf-8")  # DVC warns of an empty folder
        flag = meta.dataset["name"]
        if flag.endswith("mnist") and not flag.startswith("own-") and meta.split == "published":
            of_run = {"size": meta.dataset["size"], "run": str(described["params"]["seed"])}
            for split, part in (("val", val), ("test", test)):
                medmnist_format.write(part, folder, flag=flag, split=split, **of_run)
    return dict(found["test"]["overall"])


@task(name="explain", persist_result=False)
def explain(most: int, seed: int, confidence: float) -> tuple[dict[str, NDArray[np.float64]], float | None]:
    """Explain the worst mistakes; write explanations.json with how far that can be trusted and where the model points.

    Args:
        most: mistakes.
        seed: of the sanity check.
        confidence: of intervals.

    Returns:
        Maps of the mistakes by name, (mistakes, side, side), and the seconds that pointing at boxes took, if there are
        boxes.
    """
    test, images = predictions.read(paths.PREDICTIONS).select_split("test"), arrays.load_split(paths.PROCESSED, "test")
    model = load_classifier()
    wrong = error_gallery.most_confident_errors(test, most)
    looked = cases.explain_cases(model, wrong, images.images, test.scores.argmax(axis=1), seed)
    boxes = arrays.read_boxes(paths.PROCESSED, "test")
    began = time.perf_counter()
    pointed: dict[str, Any] | None = None
    if boxes is not None and looked.results["randomisation"]:  # else the network cannot be explained
        pointed = pointing_game.evaluate_pointing(model, boxes, images.index, images.images, test.classes, confidence)
    seconds = time.perf_counter() - began if pointed is not None else None
    sentences = [*looked.sentences, *(pointing_game.describe_results(pointed) if pointed is not None else ())]
    write_json(paths.EXPLANATIONS, {**looked.results, "pointing": pointed, "sentences": sentences})
    return looked.maps, seconds


@task(name="draw figures", persist_result=False)
def draw(maps: dict[str, NDArray[np.float64]], dpi: int) -> None:
    """Every figure, as PNG and SVG."""
    with atomic_folder(paths.FIGURES) as folder:
        evaluate_figures.draw_figures(GALLERY_SIZE, maps, folder, dpi)


@task(name="write the report", persist_result=False)
def write_report(run_id: str) -> None:
    """One page of all that was found."""
    table, meta = predictions.read(paths.PREDICTIONS), arrays.read_metadata(paths.PROCESSED)
    test = table.select_split("test")
    page = report.render_report(
        load_report_inputs({"val": summary.summarize(table.select_split("val")), "test": summary.summarize(test)}),
        summary.summarize(test.before_calibration()),
        published.comparison_table(meta),
        read_json(paths.EXPLANATIONS),
        {path.stem: path.read_bytes() for path in sorted(paths.FIGURES.glob("*.png"))},
        run_id,
    )
    with atomic_write(paths.REPORT) as path:
        path.write_text(page, encoding="utf-8")


@task(name="log the evaluation to MLflow", persist_result=False)
def log_evaluation(settings: dict[str, Any]) -> None:
    """Adds numbers, figures and predictions to the run in which the model was trained."""
    runs.log_params_as_tags("evaluate", settings)
    bounds = read_json(paths.INTERVALS)["test"]["overall"]
    told = {name: dict(zip(("low", "high"), bound, strict=True)) for name, bound in bounds.items() if bound}
    runs.log_metrics(read_json(paths.METRICS))
    runs.log_metrics({"test": {"interval": told}})
    runs.log_artifacts(
        paths.PREDICTIONS, paths.EMBEDDING, paths.METRICS, paths.INTERVALS, paths.SUBGROUPS, paths.OPERATING_POINTS,
        paths.EXPLANATIONS, paths.RESULTS, paths.MODEL_CARD, paths.REPORT,
    )  # fmt: skip
    runs.log_artifacts(paths.FIGURES, artifact_path="figures")
    runs.log_artifacts(paths.MEDMNIST, artifact_path="medmnist")


@flow(name="evaluate", persist_result=False, log_prints=True)
def evaluate() -> str:
    """Predicts, measures and draws."""
    wanted = schema.load_params(paths.PARAMS).evaluate
    try:
        run_id = read_json(paths.RUN)["mlflow_run_id"]
    except OSError as error:
        raise UserError(f"{paths.RUN}: not found; run `dvc repro train` first") from error
    resume.remove_finished(run_id)
    with runs.start_run(run_id):
        seconds = predict(wanted.batch_size, wanted.subgroups)
        test = compute_metrics(wanted.model_dump())
        maps, pointing_seconds = explain(GALLERY_SIZE, wanted.bootstrap_seed, wanted.confidence)
        runs.log_metrics({"seconds": {"predict": seconds, "pointing": pointing_seconds}})
        draw(maps, wanted.figure_dpi)
        write_report(run_id)
        log_evaluation(wanted.model_dump())
    auc = "undefined" if test["auc"] is None else f"{test['auc']:.4f}"
    return (
        f"test AUC {auc}, accuracy {test['accuracy']:.4f}, balanced accuracy {test['balanced_accuracy']:.4f} on the"
        f" split {arrays.read_metadata(paths.PROCESSED).split}; figures in {paths.FIGURES}"
    )


def main() -> str:
    """Runs the flow."""
    with temporary_server():
        return evaluate()
