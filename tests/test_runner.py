"""A stage ends in its summary, or in one message and a non-zero exit."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fadeformer.errors import StageInterrupted, UserError
from pipelines import runner
from tests.conftest import ROOT


def raising(error: BaseException):
    def main() -> str:
        raise error

    return main


@pytest.fixture
def ending(capsys):
    """Runs a stage that ends early; gives its message and exit status."""

    def run(main) -> tuple[str, int]:
        with pytest.raises(SystemExit) as caught:
            runner.run("train", main)
        return capsys.readouterr().err.strip("\n"), caught.value.code

    return run


def test_the_summary_is_printed(capsys):
    runner.run("download", lambda: "three images")
    assert capsys.readouterr().out == "download: three images\n"


def test_a_command_may_end_well_with_a_status_of_its_own(capsys):
    with pytest.raises(SystemExit) as ended:
        runner.run("predict", lambda: runner.CommandResult("two images, one of them unreadable", 3))
    assert ended.value.code == 3
    assert capsys.readouterr().out == "predict: two images, one of them unreadable\n"
    runner.run("predict", lambda: runner.CommandResult("two images", 0))


def test_an_error_for_people_is_the_message_and_the_exit_is_not_0(ending):
    assert ending(raising(UserError("lower the learning rate"))) == ("train: lower the learning rate", 1)


def test_a_reader_that_has_enough_of_the_output_is_no_error():
    code = "from pipelines import runner\nrunner.run('registry', lambda: '\\n'.join(map(str, range(200_000))))"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "registry: 0\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGPIPE


def test_another_pipe_that_breaks_is_one():
    with pytest.raises(BrokenPipeError):
        runner.run("train", raising(BrokenPipeError()))


def test_an_error_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        runner.run("train", raising(ZeroDivisionError()))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_is_told_with_a_remedy(ending):
    message, status = ending(lambda: str(Path("/dev/full").write_text("x")))
    assert "train: No space left on device; free some space, then run again" in message
    assert status == 1


def test_a_folder_that_may_not_be_written_is_named(tmp_path, ending):
    (tmp_path / "file").write_text("")
    message, status = ending(lambda: str((tmp_path / "file" / "models").mkdir()))
    assert "file/models: Not a directory; mend the path" in message
    assert status == 1


def test_an_interruption_is_told_and_the_exit_is_that_of_its_signal(ending):
    assert ending(raising(KeyboardInterrupt())) == ("train: interrupted", 130)
    for number in (signal.SIGTERM, signal.SIGINT):
        told = f"stopped by {number.name} after step 417; run again to go on from there"
        assert ending(raising(StageInterrupted(told, number))) == (f"train: {told}", 128 + number)


# A stage of its own process. It forgives any error, as readers of damaged images do.
READS = """
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


def test_sigterm_ends_a_stage_with_one_line():
    process = subprocess.Popen([sys.executable, "-c", READS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    output, errors = process.communicate(timeout=60)
    assert (output, errors) == ("", "\ndownload: stopped by SIGTERM; run again: finished stages are kept\n")
    assert process.returncode == 143


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train", "now"]])
def test_an_unknown_stage_is_told(arguments):
    done = subprocess.run([sys.executable, "-m", "pipelines", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "usage: python -m pipelines {download,validate,preprocess,train,evaluate,promote}" in done.stderr


SLOW = {"dvc", "great_expectations", "mlflow", "pandas", "prefect", "scipy", "sklearn", "torch"}  # to be loaded


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("stages.download", SLOW - {"torch"}), ("stages.validate", SLOW - {"torch"}),
        ("stages.preprocess", SLOW - {"torch"}), ("stages.promote", SLOW - {"torch"}),
        ("orchestration.workspace", set()), ("orchestration.flows", {"prefect"}),  # every run of a deployment loads them first
    ],
)  # fmt: skip
def test_what_needs_no_torch_does_not_wait_for_it(name, needed):
    code = f"import sys, pipelines.__main__, pipelines.{name}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert SLOW & set(done.stdout.split()) <= needed


def test_of_several_stages_the_first_that_fails_is_the_last(tmp_path):
    command = [sys.executable, "-m", "pipelines", "download", "validate"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.findall(r"^(\w+): params\.yaml: cannot be read", done.stderr, re.MULTILINE) == ["download"]
