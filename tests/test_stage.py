"""A stage ends in its summary, or in one message and a non-zero exit."""

import subprocess
import sys
from pathlib import Path

import pytest

from fadeformer.errors import UserError
from pipelines import stage


def raising(error: BaseException):
    def main() -> str:
        raise error

    return main


def test_the_summary_is_printed(capsys):
    stage.run("download", lambda: "three images")
    assert capsys.readouterr().out == "download: three images\n"


def test_an_error_for_people_is_the_message_and_the_exit_is_not_0():
    with pytest.raises(SystemExit, match="\ntrain: lower the learning rate"):
        stage.run("train", raising(UserError("lower the learning rate")))


def test_an_error_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        stage.run("train", raising(ZeroDivisionError()))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_is_told_with_a_remedy():
    with pytest.raises(SystemExit, match=r"train: No space left on device; free some space, then run again"):
        stage.run("train", lambda: str(Path("/dev/full").write_text("x")))


def test_a_folder_that_may_not_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"train: .*file/models: Not a directory; mend the path"):
        stage.run("train", lambda: str((tmp_path / "file" / "models").mkdir()))


def test_an_interruption_is_told():
    with pytest.raises(SystemExit, match="train: interrupted"):
        stage.run("train", raising(KeyboardInterrupt()))


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train", "now"]])
def test_an_unknown_stage_is_told(arguments):
    done = subprocess.run([sys.executable, "-m", "pipelines", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "usage: python -m pipelines {download,validate,preprocess,train,evaluate,promote}" in done.stderr
