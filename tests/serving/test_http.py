"""The served app in this process: scores are unchanged, and no request causes a response with status 5xx."""

import base64
import json
import logging

import mlflow
import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.pyfunc import scoring_server

from pipelines.registry.package import fetch_package, find_data_folder, log_package
from pipelines.serving import http
from pipelines.tracking import runs
from tests.packages import images, load, png, project_with_store

JSON = {"content-type": "application/json"}
TEXTS = [base64.b64encode(png(image)).decode() for image in images(3)]
FORMATS = [
    {"inputs": {"image": TEXTS}},
    {"inputs": TEXTS},
    {"inputs": images(3).tolist()},
    {"inputs": {"image": images(3).tolist()}},
    {"inputs": [{"image": text} for text in TEXTS]},
    {"instances": TEXTS},
    {"instances": [{"image": text} for text in TEXTS]},
    {"dataframe_records": [{"image": text} for text in TEXTS]},
    {"dataframe_split": {"columns": ["image"], "data": [[text] for text in TEXTS]}},
]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Folder of a package; no response may contain its path."""
    with project_with_store(tmp_path_factory.mktemp("served")):
        with runs.start_run() as run_id:
            pass
        yield fetch_package(f"models:/{log_package(run_id).model_id}")


@pytest.fixture(scope="module")
def model(package):
    return mlflow.pyfunc.load_model(str(package), model_config={"max_pixels": 10_000})


@pytest.fixture(scope="module")
def client(model):
    with TestClient(http.create_app(model, max_bytes=50_000, max_images=5), raise_server_exceptions=True) as client:
        yield client


@pytest.fixture(scope="module")
def expected(package) -> list[float]:
    return load(find_data_folder(package)).predict_proba(images(3))[:, 1].tolist()


def scores(response) -> list[float]:
    assert response.status_code == 200, response.text
    return [row["probability.malignant"] for row in response.json()["predictions"]]


@pytest.fixture(scope="module")
def mlflow_client(model):
    """Client of the unwrapped MLflow app."""
    with TestClient(scoring_server.init(model)) as client:
        yield client


@pytest.mark.parametrize("request_format", FORMATS)
def test_all_request_formats_give_the_same_scores(client, mlflow_client, expected, request_format):
    assert scores(client.post("/invocations", json=request_format)) == pytest.approx(expected, abs=1e-6)
    if request_format != FORMATS[4]:  # MLflow supports no list of records for models with one input
        assert scores(mlflow_client.post("/invocations", json=request_format)) == pytest.approx(expected, abs=1e-6)


def test_image_file_can_be_the_request_body(client, expected):
    response = client.post("/invocations", content=png(images(3)[0]), headers={"content-type": "image/png"})
    assert scores(response) == pytest.approx(expected[:1], abs=1e-6)


def test_params_select_the_operating_point(client):
    response = client.post("/invocations", json={"inputs": TEXTS, "params": {"operating_point": "sensitivity"}})
    assert {row["decision"] for row in response.json()["predictions"]} == {"malignant"}


BIG = base64.b64encode(png(np.zeros((101, 100), np.uint8))).decode()


@pytest.mark.parametrize(
    ("status", "reason", "request_"),
    [
        (400, "image 0: has 100 x 101 pixels, more than the limit of 10,000", {"json": {"inputs": [BIG]}}),
        (400, "image 1: is not valid base64", {"json": {"inputs": [TEXTS[0], "?"]}}),
        (400, "there are no images", {"json": {"inputs": []}}),
        (400, "unknown value; this model has", {"json": {"inputs": TEXTS, "params": {"operating_point": "x"}}}),
        (400, "params can contain only operating_point", {"json": {"inputs": TEXTS, "params": {"threshold": 0.5}}}),
        (400, "must have one of the supported formats", {"json": {"inputs": TEXTS, "instances": TEXTS}}),
        (400, "must have one of the supported formats", {"json": [1]}),
        (400, "unsupported request format", {"json": {"dataframe_records": [{"file": "x"}]}}),
        (400, "unsupported request format", {"json": {"messages": [{"role": "user", "content": "x"}]}}),
        (400, "differ in shape|rows differ in length|has shape", {"json": {"inputs": [[[1, 2], [3]], [[1]]]}}),
        (400, "is not JSON", {"content": b"{", "headers": JSON}),
        (400, "is not JSON", {"content": b"[" * 40_000, "headers": JSON}),
        (400, "is not JSON", {"content": b"\xff", "headers": JSON}),
        (413, "more than 50,000 bytes", {"content": b" " * 50_001, "headers": JSON}),
        (413, "more than 50,000 bytes", {"content": iter([b" " * 30_000] * 2), "headers": JSON}),
        (413, "more than 5 images", {"json": {"inputs": TEXTS * 2}}),
        (415, "content type", {"content": b"image\nabc", "headers": {"content-type": "text/csv"}}),
        (415, "content type", {"content": b"abc"}),
    ],
)  # fmt: skip
def test_invalid_request_gets_a_reason(client, status, reason, request_):
    response = client.post("/invocations", **request_)
    assert response.status_code == status
    assert any(part in response.json()["error"] for part in reason.split("|")), response.text


def test_other_paths_and_methods_are_rejected(client):
    assert [client.get(path).status_code for path in ("/ping", "/health", "/version")] == [200] * 3
    assert [client.get(path).status_code for path in ("/docs", "/openapi.json", "/../etc/passwd")] == [404] * 3
    assert client.get("/invocations").status_code == 405


def test_model_error_is_neither_returned_nor_logged(client, model, monkeypatch, caplog):
    def fail(*_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(type(model.get_raw_model()), "predict_proba", fail)
    with caplog.at_level(logging.DEBUG):
        response = client.post("/invocations", json={"inputs": TEXTS})
    assert (response.status_code, response.json()) == (500, {"error": "internal server error"})
    assert "secret" not in caplog.text


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(TEXTS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
KEYS = st.sampled_from(
    ["inputs", "instances", "dataframe_records", "dataframe_split", "params", "image", "columns", "data", "index",
     "messages", "prompt", "input", "signature_name"]
)  # fmt: skip
NEARLY_VALID = st.dictionaries(
    KEYS, VALUES | st.dictionaries(KEYS, VALUES, max_size=3) | st.lists(st.dictionaries(KEYS, VALUES))
)
TYPES = st.sampled_from(
    ["application/json", "application/json; charset=utf-8", "application/json;charset=latin-1", "text/csv",
     "application/vnd.apache.parquet", "image/png", "application/octet-stream", "", "x", "multipart/form-data"]
)  # fmt: skip


@st.composite
def corrupted(draw: st.DrawFn) -> bytes:
    """A request, or a file in a valid request, that is truncated or has a few changed bytes."""
    is_file = draw(st.booleans())
    body = bytearray(png(images(1)[0]) if is_file else json.dumps(draw(st.sampled_from(FORMATS))).encode())
    for index, value in draw(st.lists(st.tuples(st.integers(0, len(body) - 1), st.integers(0, 255)), max_size=5)):
        body[index] = value
    data = bytes(body[: draw(st.integers(0, len(body)))]) if draw(st.booleans()) else bytes(body)
    return json.dumps({"inputs": [base64.b64encode(data).decode()]}).encode() if is_file else data


BODIES = st.one_of(
    st.binary(max_size=200),
    VALUES.map(lambda value: json.dumps(value).encode()),
    NEARLY_VALID.map(lambda value: json.dumps(value).encode()),
    corrupted(),
    st.text(max_size=50).map(lambda text: f"image\n{text}\n".encode("utf-8", "replace")),
)


@settings(max_examples=150)
@given(body=BODIES, content_type=TYPES, is_json=st.booleans())
def test_no_request_causes_a_server_error(client, package, body, content_type, is_json):
    headers = JSON if is_json else {"content-type": content_type}
    response = client.post("/invocations", content=body, headers=headers)
    assert response.status_code in (200, 400, 413, 415), response.text
    for leak in ("Traceback", 'File \\"', "site-packages", str(package), "/home", ".py"):
        assert leak not in response.text


def test_request_data_are_not_logged(client, caplog, capfd):
    patient = "Jane Doe 1950-01-01"
    with caplog.at_level(logging.DEBUG):
        for document in (
            {"inputs": [patient]}, {patient: 1}, {"inputs": TEXTS, "params": {patient: 1}},
            {"inputs": TEXTS, "params": {"operating_point": patient}},
            {"dataframe_records": [{"image": 1, patient: 2}]},
        ):  # fmt: skip
            response = client.post(f"/invocations?{patient}", json=document)
            assert response.status_code == 400
            assert patient not in response.text
    # httpx is the client of the test.
    messages = [record.getMessage() for record in caplog.records if not record.name.startswith("httpx")]
    assert not any("Jane" in message for message in messages)
    assert "Jane" not in "".join(capfd.readouterr())
