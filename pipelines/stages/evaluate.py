"""Stage evaluate: read data/processed and models/, write reports/ (predictions, metrics, figures); a Prefect flow."""

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
from fadeformer.reporting.tables import ReportInputs, data_warnings
from pipelines import paths
from pipelines.server import temporary_server
from pipelines.stages import evaluate_figures
from pipelines.tracking import resume, runs

GALLERY_SIZE = 12  # misclassified images in the error gallery


def load_classifier() -> Classifier:
    """Load the classifier of models/ and make PyTorch deterministic."""
    classifier = Classifier(read_json(paths.ARCHITECTURE), paths.WEIGHTS)
    torch.use_deterministic_algorithms(True, warn_only=classifier.device.type == "cuda")
    return classifier


@task(name="predict", persist_result=False)
def predict(batch_size: int, subgroup_columns: str | list[str]) -> float:
    """Write the predictions for val and test, and a 2-D projection of the test images' features.

    Returns:
        The inference time in seconds.
    """
    meta = arrays.read_metadata(paths.PROCESSED)
    model = load_classifier()
    splits = [arrays.load_split(paths.PROCESSED, split) for split in ("val", "test")]
    start = time.perf_counter()
    val_outputs, test_outputs = (model.predict(split.images, batch_size) for split in splits)
    seconds = time.perf_counter() - start
    index = pd.concat([split.index for split in splits], ignore_index=True)
    table = predictions.build_predictions(
        index,
        np.concatenate([split.labels for split in splits]),
        np.concatenate([val_outputs.scores, test_outputs.scores]),
        model.task,
        meta.classes,
        np.concatenate([val_outputs.raw_scores, test_outputs.raw_scores]),
        subgroups.select_columns(index.drop(columns=["split", "id", "group", "sha256"]), subgroup_columns),
    )
    with atomic_write(paths.PREDICTIONS) as path:
        predictions.write(table, path)
    with atomic_write(paths.EMBEDDING) as path:
        embedding.pca_projection(test_outputs.features, splits[1].index["id"]).to_parquet(path, index=False)
    return seconds


def load_report_inputs(summaries: dict[str, Any]) -> ReportInputs:
    """Collect the inputs of model card and report: summaries of val and test, and files of reports/ and models/."""
    return ReportInputs(
        meta=arrays.read_metadata(paths.PROCESSED),
        model_metadata=read_json(paths.ARCHITECTURE),
        summary=summaries,
        intervals=read_json(paths.INTERVALS)["test"],
        operating_points=read_json(paths.OPERATING_POINTS),
        subgroups=read_json(paths.SUBGROUPS)["test"],
        data_warnings=data_warnings(read_json(paths.VALIDATION_RESULT)),
    )


@task(name="compute metrics", persist_result=False)
def compute_metrics(settings: dict[str, Any]) -> dict[str, float]:
    """Compute metrics, intervals, subgroups, operating points and curves from the predictions; write the model card.

    Returns:
        The metrics on test.
    """
    table = predictions.read(paths.PREDICTIONS)
    val, test = table.select_split("val"), table.select_split("test")
    model_metadata, meta = read_json(paths.ARCHITECTURE), arrays.read_metadata(paths.PROCESSED)
    summaries = {"val": summary.summarize(val), "test": summary.summarize(test)}
    start, confidence = time.perf_counter(), settings["confidence"]
    intervals, subgroup_metrics = subgroups.evaluate_subgroups(
        test, settings["age_bands"], n_resamples=settings["bootstrap_resamples"], seed=settings["bootstrap_seed"],
        confidence=confidence,
    )  # fmt: skip
    write_json(paths.INTERVALS, {"confidence": confidence, "test": intervals})
    write_json(paths.SUBGROUPS, {"confidence": confidence, "test": subgroup_metrics})
    targets = {
        "youden": None, "sensitivity": settings["sensitivity_at_least"], "specificity": settings["specificity_at_least"]
    }  # fmt: skip
    prevalences = operating_points.resolve_prevalences(settings["prevalence"], test)
    points = operating_points.select_operating_points(val, test, targets, confidence, prevalences)
    write_json(paths.OPERATING_POINTS, {"targets": targets, "confidence": confidence, "points": points})
    runs.log_metrics({"seconds": {"intervals": time.perf_counter() - start}})
    uncalibrated = summary.summarize(test.before_calibration())
    write_json(
        paths.METRICS,
        summary.collect_metrics(summaries["test"], summaries["val"], uncalibrated, subgroup_metrics, points),
    )
    # Balanced accuracy is only comparable on the same split, so results.json stores both.
    balanced = {"value": summaries["test"]["overall"]["balanced_accuracy"], "split": meta.split}
    config = {**model_metadata["params"], "evaluate": settings}
    results = summary.published_results(summaries["test"], pd.read_csv(paths.HISTORY), config)
    write_json(paths.RESULTS, {**results, "test_balanced_accuracy": balanced})
    with atomic_write(paths.MODEL_CARD) as path:
        path.write_text(render_model_card(load_report_inputs(summaries)), encoding="utf-8")
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
            file_info = {"size": meta.dataset["size"], "run": str(model_metadata["params"]["seed"])}
            for split, split_predictions in (("val", val), ("test", test)):
                medmnist_format.write(split_predictions, folder, flag=flag, split=split, **file_info)
    return dict(summaries["test"]["overall"])


@task(name="explain", persist_result=False)
def explain(max_errors: int, seed: int, confidence: float) -> tuple[dict[str, NDArray[np.float64]], float | None]:
    """Compute attribution maps of the most confident errors, their sanity checks, and the pointing game.

    Args:
        max_errors: Number of errors to explain.
        seed: Seed of the sanity check.
        confidence: Confidence level of the intervals.

    Returns:
        The maps of each method, (errors, side, side), and the seconds of the pointing game, None without boxes.
    """
    test, images = predictions.read(paths.PREDICTIONS).select_split("test"), arrays.load_split(paths.PROCESSED, "test")
    model = load_classifier()
    errors = error_gallery.most_confident_errors(test, max_errors)
    predicted = test.scores.argmax(axis=1) if test.task.multi_label else test.task.decide(test.scores)[:, 0]
    explanations = cases.explain_cases(model, errors, images.images, predicted, seed)
    boxes = arrays.read_boxes(paths.PROCESSED, "test")
    start = time.perf_counter()
    pointing: dict[str, Any] | None = None
    if boxes is not None and explanations.results["randomization"]:  # empty if no attribution method supports the model
        pointing = pointing_game.evaluate_pointing(model, boxes, images.index, images.images, test.classes, confidence)
    seconds = time.perf_counter() - start if pointing is not None else None
    sentences = [*explanations.sentences, *(pointing_game.describe_results(pointing) if pointing is not None else ())]
    write_json(paths.EXPLANATIONS, {**explanations.results, "pointing": pointing, "sentences": sentences})
    return explanations.maps, seconds


@task(name="draw figures", persist_result=False)
def draw(maps: dict[str, NDArray[np.float64]], dpi: int) -> None:
    """Draw every figure as PNG and SVG."""
    with atomic_folder(paths.FIGURES) as folder:
        evaluate_figures.draw_figures(GALLERY_SIZE, maps, folder, dpi)


@task(name="write the report", persist_result=False)
def write_report(run_id: str) -> None:
    """Write the HTML report."""
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
    """Log metrics, figures and predictions to the run in which the model was trained."""
    runs.log_params_as_tags("evaluate", settings)
    bounds = read_json(paths.INTERVALS)["test"]["overall"]
    intervals = {name: dict(zip(("low", "high"), bound, strict=True)) for name, bound in bounds.items() if bound}
    runs.log_metrics(read_json(paths.METRICS))
    runs.log_metrics({"test": {"interval": intervals}})
    runs.log_artifacts(
        paths.PREDICTIONS, paths.EMBEDDING, paths.METRICS, paths.INTERVALS, paths.SUBGROUPS, paths.OPERATING_POINTS,
        paths.EXPLANATIONS, paths.RESULTS, paths.MODEL_CARD, paths.REPORT,
    )  # fmt: skip
    runs.log_artifacts(paths.FIGURES, artifact_path="figures")
    runs.log_artifacts(paths.MEDMNIST, artifact_path="medmnist")


@flow(name="evaluate", persist_result=False, log_prints=True)
def evaluate() -> str:
    """Evaluate models/ on val and test, write reports/, and log them to the model's run."""
    config = schema.load_params(paths.PARAMS).evaluate
    try:
        run_id = read_json(paths.RUN)["mlflow_run_id"]
    except OSError as error:
        raise UserError(f"{paths.RUN}: not found; run `dvc repro train` first") from error
    resume.remove_finished(run_id)
    with runs.start_run(run_id):
        seconds = predict(config.batch_size, config.subgroups)
        test = compute_metrics(config.model_dump())
        maps, pointing_seconds = explain(GALLERY_SIZE, config.bootstrap_seed, config.confidence)
        runs.log_metrics({"seconds": {"predict": seconds, "pointing": pointing_seconds}})
        draw(maps, config.figure_dpi)
        write_report(run_id)
        log_evaluation(config.model_dump())
    auc = "undefined" if test["auc"] is None else f"{test['auc']:.4f}"
    return (
        f"test AUC {auc}, accuracy {test['accuracy']:.4f}, balanced accuracy {test['balanced_accuracy']:.4f} on the"
        f" split {arrays.read_metadata(paths.PROCESSED).split}; figures in {paths.FIGURES}"
    )


def main() -> str:
    """Run the flow."""
    with temporary_server():
        return evaluate()
