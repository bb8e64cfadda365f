"""A stage ends in its summary, or in one message and a non-zero exit."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fadeformer.errors import Interrupted, UserError
from pipelines import orchestrator, stage
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
            stage.run("train", main)
        return capsys.readouterr().err.strip("\n"), caught.value.code

    return run


def test_the_summary_is_printed(capsys):
    stage.run("download", lambda: "three images")
    assert capsys.readouterr().out == "download: three images\n"


def test_a_command_may_end_well_with_a_status_of_its_own(capsys):
    with pytest.raises(SystemExit) as ended:
        stage.run("predict", lambda: stage.Ended("two images, one of them unreadable", 3))
    assert ended.value.code == 3
    assert capsys.readouterr().out == "predict: two images, one of them unreadable\n"
    stage.run("predict", lambda: stage.Ended("two images", 0))


def test_an_error_for_people_is_the_message_and_the_exit_is_not_0(ending):
    assert ending(raising(UserError("lower the learning rate"))) == ("train: lower the learning rate", 1)


def test_a_reader_that_has_enough_of_the_output_is_no_error():
    code = "from pipelines import stage\nstage.run('registry', lambda: '\\n'.join(map(str, range(200_000))))"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "registry: 0\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGPIPE


def test_another_pipe_that_breaks_is_one():
    with pytest.raises(BrokenPipeError):
        stage.run("train", raising(BrokenPipeError()))


def test_an_error_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        stage.run("train", raising(ZeroDivisionError()))


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
        assert ending(raising(Interrupted(told, number))) == (f"train: {told}", 128 + number)


def test_the_handler_of_sigterm_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    stage.run("download", lambda: "three images")
    assert signal.getsignal(signal.SIGTERM) is before


DVC = 'import subprocess, sys\nsubprocess.run([sys.executable, "stage.py"])\n'
# A stage of its own process. It forgives any error, as readers of damaged images do.
READS = """
import time
from pipelines import stage
def main():
    print("ready", flush=True)
    while True:
        try:
            time.sleep(600)
        except Exception:
            print("a damaged image", flush=True)
stage.run("download", main)
"""
# A signal that comes while garbage is collected: what its handler raises there is lost.
COLLECTS = """
import os, signal, time
from pipelines import stage
class Garbage:
    def __del__(self):
        os.kill(os.getpid(), NUMBER)
        time.sleep(600)
def main():
    Garbage()
    time.sleep(600)
stage.run("download", main)
"""
# A stage with a flow, whose end is told to the server.
FLOWS = """
import time
from prefect import flow, task
from pipelines import orchestrator, stage
from fadeformer.errors import Interrupted
@task
def work():
    print(orchestrator._started[0].process.pid, flush=True)
    time.sleep(600) if PATIENT else stops()
def stops():
    raise Interrupted("stopped by SIGTERM after step 417", 15)
@flow
@stage.body()
def evaluate():
    work()
def main():
    with orchestrator.orchestrated():
        evaluate()
stage.run("evaluate", main)
"""


def started(folder: Path, *command: str, **variables: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"} | variables
    environment["PREFECT_HOME"] = str(folder / ".prefect")
    return subprocess.Popen(
        [sys.executable, *command], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def ends_once_killed(dvc: subprocess.Popen[str], *others: psutil.Process) -> bool:
    """Whether the stage below a dvc ends by itself when that one and others are killed."""
    below = [one for one in psutil.Process(dvc.pid).children() if one not in others]
    assert below
    for process in (*others, dvc):
        process.kill()
    _, left = psutil.wait_procs(below, timeout=120)
    for process in left:
        process.kill()
    dvc.communicate()
    return not left


def test_sigterm_ends_a_stage_with_one_line(tmp_path):
    process = started(tmp_path, "-c", READS)
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    output, errors = process.communicate(timeout=60)
    assert (output, errors) == ("", "\ndownload: stopped by SIGTERM; run again: finished stages are kept\n")
    assert process.returncode == 143


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_not_lost_in_the_collection_of_garbage(tmp_path, number):
    process = started(tmp_path, "-c", COLLECTS.replace("NUMBER", str(int(number))))
    errors = process.communicate(timeout=60)[1]
    assert errors.startswith("\ndownload: ")
    assert len(errors.splitlines()) == 2
    assert process.returncode == 128 + number


def test_sigterm_ends_a_flow_with_one_line_and_its_server(tmp_path):
    process = started(tmp_path, "-c", f"PATIENT = True\n{FLOWS}")
    server = psutil.Process(int(process.stdout.readline()))
    process.terminate()
    errors = process.communicate(timeout=60)[1]
    assert errors.endswith("\nevaluate: stopped by SIGTERM; run again: finished stages are kept\n")
    assert "Traceback" not in errors
    assert process.returncode == 143
    assert not orchestrator.alive(server)


def test_a_flow_that_was_stopped_in_its_own_way_tells_no_traceback(tmp_path):
    process = started(tmp_path, "-c", f"PATIENT = False\n{FLOWS}")
    errors = process.communicate(timeout=120)[1]
    assert errors.endswith("\nevaluate: stopped by SIGTERM after step 417\n")
    assert "Traceback" not in errors
    assert process.returncode == 143


def test_a_stage_ends_when_the_dvc_that_ran_it_is_killed(tmp_path):
    (tmp_path / "dvc").write_text(DVC)
    (tmp_path / "stage.py").write_text(READS)
    dvc = started(tmp_path, "dvc")
    assert dvc.stdout.readline() == "ready\n"
    dvc.kill()
    errors = dvc.communicate(timeout=60)[1]  # that is, until the stage has closed them too
    assert errors == "\ndownload: stopped by SIGTERM; run again: finished stages are kept\n"


def test_a_stage_ends_when_the_run_that_asked_dvc_for_it_is_killed(tmp_path):
    (tmp_path / "dvc").write_text(DVC)
    (tmp_path / "stage.py").write_text(READS)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as run:
        name = json.dumps(orchestrator.named(psutil.Process(run.pid)))
        dvc = started(tmp_path, "dvc", **{orchestrator.RUN: name})
        assert dvc.stdout.readline() == "ready\n"
        run.kill()
    errors = dvc.communicate(timeout=60)[1]
    assert errors == "\ndownload: stopped by SIGTERM; run again: finished stages are kept\n"


def test_a_flow_whose_dvc_and_server_are_killed_asks_neither_for_long(tmp_path):
    (tmp_path / "dvc").write_text(DVC)
    (tmp_path / "stage.py").write_text(f"PATIENT = True\n{FLOWS}".replace("stage.run", "stage.LAST = 600\nstage.run"))
    dvc = started(tmp_path, "dvc", PREFECT_CLIENT_MAX_RETRIES="20")
    server = psutil.Process(int(dvc.stdout.readline()))
    assert ends_once_killed(dvc, server)  # it would ask for days


def test_a_stage_that_waits_for_something_else_at_its_end_is_ended_all_the_same(tmp_path):
    """As one does whose Prefect server has gone together with dvc: the client asks again, for longer each time."""
    (tmp_path / "dvc").write_text(DVC)
    stubborn = READS.replace("def main", "stage.LAST = 0.5\ndef main").replace(
        "except Exception", "except BaseException"
    )
    (tmp_path / "stage.py").write_text(stubborn)
    dvc = started(tmp_path, "dvc")
    assert dvc.stdout.readline() == "ready\n"
    dvc.kill()
    assert dvc.communicate(timeout=60)[0] == "a damaged image\n"  # SIGTERM came, and did not end it


@pytest.mark.parametrize(("main", "status"), [("lambda: stage.Ended('done', 3)", 3), ("lambda: 1 / 0", 1)])
def test_a_program_that_is_kept_from_its_exit_exits_all_the_same(tmp_path, main, status):
    """As Prefect keeps it, which at the exit has events to send to a server that is gone."""
    hangs = "import threading, time\nfrom pipelines import stage\nthreading._register_atexit(time.sleep, 600)\n"
    (tmp_path / "stage.py").write_text(f"{hangs}stage.LAST = 0.5\nstage.run('download', {main})\n")
    process = started(tmp_path, "stage.py")
    process.communicate(timeout=60)
    assert process.returncode == status


def test_and_sooner_when_nobody_waits_for_it(tmp_path):
    hangs = "import threading, time\nfrom pipelines import stage\nthreading._register_atexit(time.sleep, 600)\n"
    (tmp_path / "dvc").write_text(DVC)
    (tmp_path / "stage.py").write_text(f"{hangs}stage.LAST = 600\nstage.run('download', lambda: 'done')\n")
    dvc = started(tmp_path, "dvc")
    assert dvc.stdout.readline() == "download: done\n"
    assert ends_once_killed(dvc)


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train", "now"]])
def test_an_unknown_stage_is_told(arguments):
    done = subprocess.run([sys.executable, "-m", "pipelines", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "usage: python -m pipelines {download,validate,preprocess,train,evaluate,promote}" in done.stderr


SLOW = {"dvc", "great_expectations", "mlflow", "pandas", "prefect", "scipy", "sklearn", "torch"}  # to be loaded


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("download", SLOW - {"torch"}), ("validate", SLOW - {"torch"}), ("preprocess", SLOW - {"torch"}),
        ("promote", SLOW - {"torch"}),
        ("working_copy", set()), ("flows", {"prefect"}),  # every run of a deployment loads them first
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
