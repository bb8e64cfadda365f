"""Identical scores and decisions in evaluation, `predict`, MLflow, HTTP and ONNX."""

import base64
import json
from pathlib import Path

import mlflow
import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from fastapi.testclient import TestClient
from mlflow.models import Model
from PIL import Image

from fadeformer.errors import UserError
from fadeformer.evaluation import predictions
from fadeformer.inference import export, model_files
from fadeformer.inference.classifier import Classifier
from fadeformer.inference.operating_point import OperatingPoint
from fadeformer.models.factory import create_model, features_and_logits
from fadeformer.tasks import TASKS
from pipelines import paths
from pipelines.cli import main
from pipelines.registry import package, pyfunc_model
from pipelines.serving import http
from pipelines.stages import evaluate
from tests.packages import FADE, KINDS, images, load, png, write_model

SMALL = {"backbone": "test_resnet", "fade": None, "side": 32}
PIXELS = images(50, SMALL["side"])
POINTS = ("youden", "specificity")  # with and without thresholds
Answers = tuple[np.ndarray, list[str]]  # scores and decisions


@pytest.fixture(scope="module", params=["binary", "multi-class", "findings"])
def project(request, tmp_path_factory) -> Path:
    """Project in the current folder: model, images as arrays and files, MLflow package and ONNX graph."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := write_model(tmp_path_factory.mktemp("project"), request.param, **SMALL))
        task, _, classes, _ = KINDS[request.param]
        num_labels = len(classes) if "multi-label" in task else 1
        labels = pd.DataFrame(np.random.default_rng(0).integers(0, 2, (100, num_labels)))
        labels.columns = [f"label_{c}" for c in range(num_labels)] if num_labels > 1 else ["label"]
        names = [f"{n:02}.png" for n in range(50)] * 2
        paths.PROCESSED.mkdir(parents=True)
        index = {"split": np.repeat(["val", "test"], 50), "id": names, "group": names, "sha256": names}
        pd.DataFrame(index).join(labels).to_parquet(paths.PROCESSED / "index.parquet")
        meta = {
            "dataset": {"task": task, "classes": classes}, "image_size": 32, "channels": 3, "counts": {}, "split": "x",
            "cross_split_duplicates": 0, "channel_mean": [], "channel_std": [], "aspect": "pad",
        }  # fmt: skip
        (paths.PROCESSED / "meta.json").write_text(json.dumps(meta))
        np.save(paths.PROCESSED / "val.npy", PIXELS[::-1])
        np.save(paths.PROCESSED / "test.npy", PIXELS)
        Path("images").mkdir()
        for name, image in zip(names, PIXELS, strict=False):
            Image.fromarray(image).save(Path("images", name))
        package._write_package(folder / "package", Model(), "content")
        export.export_model(load(folder), "onnx", Path("graph.onnx"))
        evaluate.predict.fn(20, [])
        yield folder


def expected_decisions(scores: np.ndarray, classes: list[str], thresholds: dict[str, float], kind: str) -> list[str]:
    """Decide as documented."""
    if kind == "findings":
        minimum_scores = [thresholds[name] for name in classes]
        return ["; ".join(np.array(classes)[row >= minimum_scores]) or "no finding" for row in scores]
    if kind == "binary":
        return [classes[int(row[1] >= thresholds[classes[1]])] for row in scores]
    return [classes[(row * KINDS[kind][3]["decision_weights"]).argmax()] for row in scores]


def predict_by_evaluate(point: str, classes: list[str], kind: str) -> Answers:
    test = predictions.read(paths.PREDICTIONS).select_split("test")
    scores = test.scores
    if kind == "multi-class":
        assert [classes[c] for c in test.task.decide(scores)[:, 0]] == expected_decisions(scores, classes, {}, kind)
    thresholds = json.loads(paths.OPERATING_POINTS.read_text())["points"][point]
    return scores, expected_decisions(
        scores, classes, {name: value["threshold"] if value else 0.5 for name, value in thresholds.items()}, kind
    )


def predict_by_command(point: str, classes: list[str], kind: str) -> Answers:
    options = ("--operating-points", paths.OPERATING_POINTS, "--operating-point", point, "--out", "predictions.parquet")
    main.main(["predict", "images", "--model", "models", *map(str, options)])
    table = pd.read_parquet("predictions.parquet")
    return table[classes].to_numpy(), table["decision"].tolist()


def predict_by_mlflow(point: str, classes: list[str], kind: str) -> Answers:
    table = mlflow.pyfunc.load_model("package").predict(PIXELS, params={"operating_point": point})
    check_columns(table, classes, kind)
    return table.filter(like="probability.").to_numpy(), table["decision"].tolist()


def predict_by_http(point: str, classes: list[str], kind: str) -> Answers:
    request = {
        "inputs": [base64.b64encode(png(image)).decode() for image in PIXELS], "params": {"operating_point": point}
    }  # fmt: skip
    app = http.create_app(mlflow.pyfunc.load_model("package"), max_bytes=2**20, max_images=50)
    with TestClient(app) as client:
        table = pd.DataFrame(client.post("/invocations", json=request).json()["predictions"])
    check_columns(table, classes, kind)
    return table.filter(like="probability.").to_numpy(), table["decision"].tolist()


def predict_by_onnx(point: str, classes: list[str], kind: str) -> Answers:
    session = onnxruntime.InferenceSession("graph.onnx", providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["fadeformer.classes"]) == classes
    assert json.loads(metadata["fadeformer.decision_weights"]) == (KINDS[kind][3].get("decision_weights") or None)
    (scores,) = session.run(["scores"], {"images": PIXELS})
    return scores, expected_decisions(scores, classes, json.loads(metadata["fadeformer.points"])[point], kind)


def check_columns(table: pd.DataFrame, classes: list[str], kind: str) -> None:
    """Check that no field is empty and that the decision agrees with the positive classes."""
    prefixes = ("probability.", "positive.")
    assert list(table) == [*(f"{prefix}{name}" for prefix in prefixes for name in classes), "decision"]
    assert table.notna().all(axis=None)
    for row in table.to_dict("records"):
        positive = [name for name in classes if row[f"positive.{name}"]]
        if kind == "binary":
            assert positive == [row["decision"]]
        elif kind == "findings":
            assert row["decision"] == ("; ".join(positive) or "no finding")


@pytest.mark.parametrize("point", POINTS)
def test_all_interfaces_give_same_predictions(project, request, point):
    kind = request.node.callspec.params["project"]
    classes = KINDS[kind][2]
    expected, decisions = predict_by_evaluate(point, classes, kind)
    assert len(set(decisions)) > 1
    for interface in (predict_by_command, predict_by_mlflow, predict_by_http, predict_by_onnx):
        scores, decided = interface(point, classes, kind)
        np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=0, err_msg=interface.__name__)
        assert decided == decisions, interface.__name__


def test_reduced_precision_of_the_caller_changes_nothing(binary, monkeypatch):
    """`predict` and the served model in one process, one of them called under autocast."""
    monkeypatch.chdir(binary)
    torch.set_float32_matmul_precision("medium")  # bfloat16 products on CPUs that have them, TF32 on GPUs
    Image.fromarray(PIXELS[0]).save("a.png")
    main.main(["predict", "a.png", "--model", "models", "--out", "a.parquet"])
    served = pyfunc_model.PyfuncClassifier(load(binary), max_pixels=10_000, batch_size=8)
    with torch.autocast("cpu", torch.bfloat16):
        table = served.predict({"image": [Path("a.png").read_bytes()]})
    score = pd.read_parquet("a.parquet")["malignant"][0]
    assert table["probability.malignant"][0] == pytest.approx(score, abs=1e-5)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.fixture(scope="module")
def binary(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("binary"), **SMALL)


def test_training_precision_and_batch_size_change_nothing(binary):
    metadata = json.loads((binary / "models" / "model.json").read_text())
    output = Classifier({**metadata, "precision": "bf16"}, binary / "models" / "best_model.pth").predict(PIXELS, 7)
    for actual, expected in zip(output, load(binary).predict(PIXELS), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_scores_are_calibrated_features_are_penultimate(binary):
    classifier = load(binary)
    raw, scores, features = classifier.predict(PIXELS)
    powered = raw**1.3
    np.testing.assert_allclose(scores, powered / powered.sum(axis=1, keepdims=True))
    np.testing.assert_array_equal(classifier.predict_proba(PIXELS), scores)
    with torch.inference_mode():
        logits = classifier.model.get_classifier()(torch.from_numpy(features))
    np.testing.assert_allclose(logits.softmax(dim=1), raw, atol=1e-6)


@pytest.mark.parametrize(
    ("backbone", "fade", "last"),
    [
        ("fadevit_nano", FADE, "classifier"), ("fadevit_nano", None, "head"), ("resnet18", None, "fc"),
        ("fadevit_nano", {"variant": "diffusion", "after_blocks": [1, "last"], "num_heads": 4}, "classifier"),
        ("efficientnet_b0", None, "classifier"), ("convnext_atto", None, "head.fc"),
        ("deit_tiny_distilled_patch16_224", None, "head"),
    ],
)  # fmt: skip
def test_features_are_input_of_last_layer(backbone, fade, last):
    torch.manual_seed(0)
    model = create_model(
        backbone=backbone, num_classes=3, image_size=32, in_chans=3, pretrained=False, dropout=0.5, drop_path=0.1,
        fade=fade,
    ).eval()  # fmt: skip
    inputs_of_head = []
    model.get_submodule(last).register_forward_pre_hook(lambda _, inputs: inputs_of_head.append(inputs[0]))
    if "distilled" in backbone:  # features are the mean input of both heads
        model.head_dist.register_forward_pre_hook(lambda _, inputs: inputs_of_head.append(inputs[0]))
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = model(images)
        expected_features = torch.stack(inputs_of_head).mean(dim=0)
        features, logits = features_and_logits(model, images)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(features, expected_features)
    assert features.shape == (2, model.head_hidden_size if hasattr(model, "head_hidden_size") else model.num_features)


def test_binary_threshold_is_of_last_class():
    two = TASKS["binary-class"], ("a", "b")
    scores = np.array([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.8, 0.2]])
    at = OperatingPoint.from_thresholds(*two, {"youden": {"b": {"threshold": 0.2}}}, "youden")
    assert at.format_decisions(scores) == ["a", "b", "b", "b"]
    assert at.is_positive(scores).tolist() == [[True, False], [False, True], [False, True], [False, True]]
    assert at.description == "decision at operating point youden"
    without = OperatingPoint.from_thresholds(*two, None, "youden")
    assert without.format_decisions(scores) == ["a", "a", "b", "a"]
    assert without.description == "decision threshold 0.5: the model has no operating points"


def test_unevaluable_finding_uses_default_threshold():
    points = {"youden": {"x": {"threshold": 0.3}, "y": {"threshold": 0.9}, "z": None}}
    at = OperatingPoint.from_thresholds(TASKS["multi-label, binary-class"], ("x", "y", "z"), points, "youden")
    scores = np.array([[0.4, 0.95, 0.6], [0.2, 0.8, 0.4], [0.31, 0.1, 0.1], [0.1, 0.1, 0.5]])
    assert at.format_decisions(scores) == ["x; y; z", "no finding", "x", "z"]
    fallback = "0.5 for z (no positives or no negatives in val or test)"
    assert at.description == f"decision at operating point youden; {fallback}"


def test_multi_class_decision_is_argmax():
    points = {"youden": {"a": {"threshold": 0.9}, "b": {"threshold": 0.1}, "c": None}}
    at = OperatingPoint.from_thresholds(TASKS["multi-class"], ("a", "b", "c"), points, "youden")
    scores = np.array([[0.4, 0.35, 0.25], [0.05, 0.05, 0.9]])
    assert at.format_decisions(scores) == ["a", "c"]
    assert at.is_positive(scores).tolist() == [[False, True, False], [False, False, True]]
    assert at.description == "decision: most probable class"


def test_decision_weights_decide_among_classes():
    task = TASKS["multi-class"].with_decision_weights((0.1, 0.3, 0.6))
    at = OperatingPoint.from_thresholds(task, ("a", "b", "c"), None, "youden")
    scores = np.array([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.4, 0.45, 0.15]])
    assert at.format_decisions(scores) == ["a", "c", "b"]
    assert task.decide(scores)[:, 0].tolist() == [0, 2, 1]
    weights = "a 0.1, b 0.3, c 0.6"
    assert at.description == f"decision: largest product of probability and decision weight ({weights})"


def test_decision_weights_set_default_threshold():
    task = TASKS["binary-class"].with_decision_weights((0.05, 0.95))
    without = OperatingPoint.from_thresholds(task, ("a", "b"), None, "youden")
    scores = np.array([[0.96, 0.04], [0.94, 0.06], [0.3, 0.7]])
    assert without.format_decisions(scores) == ["a", "b", "b"]
    assert task.decide(scores)[:, 0].tolist() == [0, 1, 1]
    assert without.description == "decision threshold 0.05: the model has no operating points"
    at = OperatingPoint.from_thresholds(task, ("a", "b"), {"youden": {"b": {"threshold": 0.5}}}, "youden")
    assert at.format_decisions(scores) == ["a", "a", "b"]


def test_operating_points_of_other_model_are_rejected(binary, tmp_path):
    two = TASKS["binary-class"], ("a", "b")
    with pytest.raises(UserError, match="operating_point: unknown value; this model has sensitivity, youden"):
        OperatingPoint.from_thresholds(*two, {"youden": {}, "sensitivity": {}}, "best")
    for points in ({"mass": None}, None, [], {"b": {"threshold": "high"}}, {"b": 0.5}):
        with pytest.raises(UserError, match="the operating points are for other classes"):
            OperatingPoint.from_thresholds(*two, {"youden": points}, "youden")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match=r"x\.json: not a valid operating points file"):
        Classifier.load(model_files.find_model_files(binary / "models", "it", tmp_path / "x.json"))
