"""`fadeformer serve` and `fadeformer export`, as a user runs them, in a project with a small champion."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import pytest
from mlflow import MlflowClient

from pipelines.cli import main
from pipelines.registry import package, versions
from pipelines.tracking import runs
from tests.conftest import ROOT
from tests.packages import images, load, png, project_with_store
from tests.pipeline.cluster import responds, wait_until
from tests.postgresql import free_port

CHAMPION = "models:/fadenet-phantom@champion"
COMMAND = [sys.executable, "-c", "from pipelines.cli.main import main; main()"]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    with project_with_store(tmp_path_factory.mktemp("project")) as folder:
        with runs.start_run() as run_id:
            pass
        versions.register_version("fadenet-phantom", run_id, package.log_package(run_id).model_id)
        MlflowClient().set_registered_model_alias("fadenet-phantom", "champion", "1")
    return folder


@pytest.fixture(scope="module")
def expected(project) -> np.ndarray:
    (folder,) = project.glob("mlruns/artifacts/models/*/artifacts")
    return load(package.find_data_folder(folder)).predict_proba(images(2))


def environment(project: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    return {**inherited, "PYTHONPATH": str(ROOT), "HOME": str(project)}


@pytest.fixture
def inside_project(project, monkeypatch) -> None:
    """Run the test in the project's folder, which is also the home folder."""
    monkeypatch.chdir(project)
    monkeypatch.setenv("HOME", str(project))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.mark.usefixtures("inside_project")
def test_exported_champion_has_the_same_scores(project, expected, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    main.main(["export", CHAMPION, "--format", "onnx", "--out", "champion.onnx"])
    output = capsys.readouterr().out
    assert output.startswith(f"export: champion.onnx: scores of {CHAMPION}, with a difference of at most ")
    session = onnxruntime.InferenceSession(project / "champion.onnx", providers=["CPUExecutionProvider"])
    (scores,) = session.run(["scores"], {"images": images(2)})
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert not (project / ".cache" / "Microsoft").exists()  # onnxruntime would store a machine identifier there


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "models:/nothing@champion", "--format", "onnx", "--out", "x.onnx"), "has no such model"),
        (("export", "nowhere", "--format", "onnx", "--out", "x.onnx"), "nowhere: no such folder"),
        (("export", "models", "--format", "onnx", "--out", "x.onnx"), "models: not a package of this pipeline"),
        (("export", CHAMPION, "--format", "program", "--out", "x.onnx"), "must end with .pt2"),
        (("serve", CHAMPION, "--max-images", "0"), "must be 1 or more"),
    ],
)
@pytest.mark.usefixtures("inside_project")
def test_invalid_arguments_are_reported(project, arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        main.main(list(arguments))
    assert error.value.code == 1
    output = capsys.readouterr().err
    assert message in output
    assert "Traceback" not in output
    assert not list(project.glob("x.*"))


def test_served_champion_does_not_log_requests(project, expected):
    port = free_port()
    address, log = f"http://127.0.0.1:{port}", project / "serve.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*COMMAND, "serve", CHAMPION, "--port", str(port)], cwd=project, env=environment(project),
            stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
    try:
        wait_until(lambda: responds(f"{address}/ping") or process.poll() is not None, describe=log.read_text)
        assert process.poll() is None, log.read_text()
        for image, scores in zip(images(2), expected, strict=True):
            request = Request(f"{address}/invocations?patient=Jane", png(image), {"content-type": "image/png"})
            with urlopen(request, timeout=60) as response:
                (row,) = json.load(response)["predictions"]
            served_scores = [row["probability.benign"], row["probability.malignant"]]
            np.testing.assert_allclose(served_scores, scores, atol=1e-6)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
    assert log.read_text().splitlines() == [f"serve: {CHAMPION} at {address}/invocations", "serve: stopped"]
