"""Running a stage: it prints a summary, or one error message with a non-zero exit status."""

import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from fadeformer.errors import StageInterrupted, UserError
from pipelines import runner
from tests.conftest import ROOT


def raise_error(error: BaseException):
    def main() -> str:
        raise error

    return main


@pytest.fixture
def run_and_exit(capsys):
    """Return a function that runs a failing stage and returns its message and exit status."""

    def run(main) -> tuple[str, int]:
        with pytest.raises(SystemExit) as raised:
            runner.run("train", main)
        return capsys.readouterr().err.strip("\n"), raised.value.code

    return run


def test_summary_is_printed(capsys):
    runner.run("download", lambda: "three images")
    assert capsys.readouterr().out == "download: three images\n"


def test_command_can_return_its_own_exit_status(capsys):
    with pytest.raises(SystemExit) as exited:
        runner.run("predict", lambda: runner.CommandResult("two images, one of them unreadable", 3))
    assert exited.value.code == 3
    assert capsys.readouterr().out == "predict: two images, one of them unreadable\n"
    runner.run("predict", lambda: runner.CommandResult("two images", 0))


def test_user_error_is_one_message_and_status_1(run_and_exit):
    assert run_and_exit(raise_error(UserError("lower the learning rate"))) == ("train: lower the learning rate", 1)


def test_closed_stdout_exits_silently():
    code = "from pipelines import runner\nrunner.run('registry', lambda: '\\n'.join(map(str, range(200_000))))"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "registry: 0\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGPIPE


def test_other_broken_pipe_is_raised():
    with pytest.raises(BrokenPipeError):
        runner.run("train", raise_error(BrokenPipeError()))


def test_unexpected_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        runner.run("train", raise_error(ZeroDivisionError()))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_full_disk_is_reported_with_a_remedy(run_and_exit):
    message, status = run_and_exit(lambda: str(Path("/dev/full").write_text("x")))
    assert "train: No space left on device; free some space, then run again" in message
    assert status == 1


def test_unwritable_path_is_named(tmp_path, run_and_exit):
    (tmp_path / "file").write_text("")
    message, status = run_and_exit(lambda: str((tmp_path / "file" / "models").mkdir()))
    assert "file/models: Not a directory; fix the path" in message
    assert status == 1


def test_interruption_exits_with_signal_status(run_and_exit):
    assert run_and_exit(raise_error(KeyboardInterrupt())) == ("train: interrupted", 130)
    for number in (signal.SIGTERM, signal.SIGINT):
        message = f"stopped by {number.name} after step 417; run again to resume from there"
        assert run_and_exit(raise_error(StageInterrupted(message, number))) == (f"train: {message}", 128 + number)


# A stage in a separate process that catches every Exception, as readers of damaged images do.
READER = """
import time
from pipelines import runner
def main():
    print("ready", flush=True)
    while True:
        try:
            time.sleep(600)
        except Exception:
            print("a damaged image", flush=True)
runner.run("download", main)
"""


def test_sigterm_stops_a_stage_with_one_line():
    process = subprocess.Popen(
        [sys.executable, "-c", READER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    output, errors = process.communicate(timeout=60)
    assert (output, errors) == ("", "\ndownload: stopped by SIGTERM; run again: finished stages are kept\n")
    assert process.returncode == 143


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train", "now"]])
def test_unknown_stage_prints_usage(arguments):
    process = subprocess.run(
        [sys.executable, "-m", "pipelines", *arguments], capture_output=True, text=True, check=False
    )
    assert process.returncode != 0
    assert "usage: python -m pipelines {download,validate,preprocess,train,evaluate,promote}" in process.stderr


SLOW_MODULES = {"dvc", "great_expectations", "mlflow", "pandas", "prefect", "scipy", "sklearn", "torch"}  # libraries


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("stages.download", SLOW_MODULES - {"torch"}), ("stages.validate", SLOW_MODULES - {"torch"}),
        ("stages.preprocess", SLOW_MODULES - {"torch"}), ("stages.promote", SLOW_MODULES - {"torch"}),
        ("orchestration.workspace", set()), ("orchestration.flows", {"prefect"}),  # for each deployment run
    ],
)  # fmt: skip
def test_module_does_not_import_slow_libraries(name, allowed):
    code = f"import sys, pipelines.__main__, pipelines.{name}; print(*sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert SLOW_MODULES & set(process.stdout.split()) <= allowed


def test_first_failing_stage_stops_the_others(tmp_path):
    command = [sys.executable, "-m", "pipelines", "download", "validate"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert re.findall(r"^(\w+): params\.yaml: cannot be read", process.stderr, re.MULTILINE) == ["download"]


def test_warnings_of_image_readers_are_not_printed(capsys):
    def main() -> str:
        for module in ("pydicom.valuerep", "PIL.TiffImagePlugin", "fadeformer.data.dicom.dicom_image", "elsewhere"):
            warnings.warn_explicit(f"from {module}", UserWarning, f"{module}.py", 1, module=module)
        return "done"

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        runner.run("download", main)
    assert capsys.readouterr().err == "warning: from elsewhere\n"
