"""The served app in this process: the same scores as ever, and for whatever is sent an answer that is no 5xx."""

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

from pipelines.registry import package as packaged
from pipelines.serving import http
from pipelines.tracking import runs
from tests.packages import images, load, png, project_with_store

JSON = {"content-type": "application/json"}
TEXTS = [base64.b64encode(png(image)).decode() for image in images(3)]
FORMS = [
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
    """The folder of a package, and in it the path that no answer may tell."""
    with project_with_store(tmp_path_factory.mktemp("served")):
        with runs.start_run() as run_id:
            pass
        yield packaged.fetch_package(f"models:/{packaged.log_package(run_id).model_id}")


@pytest.fixture(scope="module")
def model(package):
    return mlflow.pyfunc.load_model(str(package), model_config={"max_pixels": 10_000})


@pytest.fixture(scope="module")
def client(model):
    with TestClient(http.create_app(model, max_bytes=50_000, max_images=5), raise_server_exceptions=True) as client:
        yield client


@pytest.fixture(scope="module")
def expected(package) -> list[float]:
    return load(packaged.find_data_folder(package)).predict_proba(images(3))[:, 1].tolist()


def scores(answer) -> list[float]:
    assert answer.status_code == 200, answer.text
    return [row["probability.malignant"] for row in answer.json()["predictions"]]


@pytest.fixture(scope="module")
def of_mlflow(model):
    """A client of MLflow's own app."""
    with TestClient(scoring_server.init(model)) as client:
        yield client


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_request_has_the_same_answer_in_mlflows_own_app_too(client, of_mlflow, expected, form):
    assert scores(client.post("/invocations", json=form)) == pytest.approx(expected, abs=1e-6)
    if form != FORMS[4]:  # MLflow hands a list of records on to no model with one input
        assert scores(of_mlflow.post("/invocations", json=form)) == pytest.approx(expected, abs=1e-6)


def test_a_file_can_be_sent_as_it_is(client, expected):
    answer = client.post("/invocations", content=png(images(3)[0]), headers={"content-type": "image/png"})
    assert scores(answer) == pytest.approx(expected[:1], abs=1e-6)


def test_an_operating_point_is_chosen_in_params(client):
    answer = client.post("/invocations", json={"inputs": TEXTS, "params": {"operating_point": "sensitivity"}})
    assert {row["decision"] for row in answer.json()["predictions"]} == {"malignant"}


BIG = base64.b64encode(png(np.zeros((101, 100), np.uint8))).decode()


@pytest.mark.parametrize(
    ("status", "reason", "request_"),
    [
        (400, "image 0: has 100 x 101 pixels, more than the limit of 10,000", {"json": {"inputs": [BIG]}}),
        (400, "image 1: is not valid base64", {"json": {"inputs": [TEXTS[0], "?"]}}),
        (400, "there are no images", {"json": {"inputs": []}}),
        (400, "not one of this model's", {"json": {"inputs": TEXTS, "params": {"operating_point": "x"}}}),
        (400, "params has only operating_point", {"json": {"inputs": TEXTS, "params": {"threshold": 0.5}}}),
        (400, "not in one form", {"json": {"inputs": TEXTS, "instances": TEXTS}}),
        (400, "not in one form", {"json": [1]}),
        (400, "not in a form that is known", {"json": {"dataframe_records": [{"file": "x"}]}}),
        (400, "not in a form that is known", {"json": {"messages": [{"role": "user", "content": "x"}]}}),
        (400, "no common form|rows differ in length|shape", {"json": {"inputs": [[[1, 2], [3]], [[1]]]}}),
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
def test_a_bad_request_is_told_why(client, status, reason, request_):
    answer = client.post("/invocations", **request_)
    assert answer.status_code == status
    assert any(part in answer.json()["error"] for part in reason.split("|")), answer.text


def test_other_addresses_and_methods_are_refused(client):
    assert [client.get(path).status_code for path in ("/ping", "/health", "/version")] == [200] * 3
    assert [client.get(path).status_code for path in ("/docs", "/openapi.json", "/../etc/passwd")] == [404] * 3
    assert client.get("/invocations").status_code == 405


def test_an_error_of_the_models_own_is_a_500_that_tells_and_logs_nothing(client, model, monkeypatch, caplog):
    def fail(*_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(type(model.get_raw_model()), "scores", fail)
    with caplog.at_level(logging.DEBUG):
        answer = client.post("/invocations", json={"inputs": TEXTS})
    assert (answer.status_code, answer.json()) == (500, {"error": "an error of the server's own"})
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
NEAR = st.dictionaries(
    KEYS, VALUES | st.dictionaries(KEYS, VALUES, max_size=3) | st.lists(st.dictionaries(KEYS, VALUES))
)
TYPES = st.sampled_from(
    ["application/json", "application/json; charset=utf-8", "application/json;charset=latin-1", "text/csv",
     "application/vnd.apache.parquet", "image/png", "application/octet-stream", "", "x", "multipart/form-data"]
)  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A valid request with a few bytes changed, or cut off; or a file that is damaged so, in a valid request."""
    is_file = draw(st.booleans())
    body = bytearray(png(images(1)[0]) if is_file else json.dumps(draw(st.sampled_from(FORMS))).encode())
    for place, value in draw(st.lists(st.tuples(st.integers(0, len(body) - 1), st.integers(0, 255)), max_size=5)):
        body[place] = value
    cut = bytes(body[: draw(st.integers(0, len(body)))]) if draw(st.booleans()) else bytes(body)
    return json.dumps({"inputs": [base64.b64encode(cut).decode()]}).encode() if is_file else cut


BODIES = st.one_of(
    st.binary(max_size=200),
    VALUES.map(lambda value: json.dumps(value).encode()),
    NEAR.map(lambda value: json.dumps(value).encode()),
    damaged(),
    st.text(max_size=50).map(lambda text: f"image\n{text}\n".encode("utf-8", "replace")),
)


@settings(max_examples=150)
@given(body=BODIES, kind=TYPES, mostly=st.booleans())
def test_whatever_is_sent_is_no_error_of_the_server(client, package, body, kind, mostly):
    headers = JSON if mostly else {"content-type": kind}
    answer = client.post("/invocations", content=body, headers=headers)
    assert answer.status_code in (200, 400, 413, 415), answer.text
    for leak in ("Traceback", 'File \\"', "site-packages", str(package), "/home", ".py"):
        assert leak not in answer.text


def test_nothing_that_was_sent_is_logged(client, caplog, capfd):
    patient = "Jane Doe 1950-01-01"
    with caplog.at_level(logging.DEBUG):
        for document in (
            {"inputs": [patient]}, {patient: 1}, {"inputs": TEXTS, "params": {patient: 1}},
            {"inputs": TEXTS, "params": {"operating_point": patient}},
            {"dataframe_records": [{"image": 1, patient: 2}]},
        ):  # fmt: skip
            answer = client.post(f"/invocations?{patient}", json=document)
            assert answer.status_code == 400
            assert patient not in answer.text
    told = [record.getMessage() for record in caplog.records if not record.name.startswith("httpx")]  # of the client
    assert not any("Jane" in text for text in told)
    assert "Jane" not in "".join(capfd.readouterr())
