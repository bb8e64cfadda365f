"""One temporary Prefect server serves the stages of a `dvc repro`, and ends with it, however that ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fadeformer.errors import UserError
from pipelines import orchestrator

# What dvc does with stages: a shell for each, to which it leaves Ctrl-C, and the first that fails is the last.
DVC = """
import signal, subprocess, sys
for stage in filter(lambda word: ":" in word, sys.argv[1:]):
    shell = subprocess.Popen(["sh", "-c", f"{sys.executable} stage.py {stage}; exit $?"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if shell.wait() != 0:
        sys.exit(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
"""
STAGE = """
import sys, time
from pipelines import orchestrator
kind, seconds = sys.argv[1].split(":")
if kind == "early":
    orchestrator.start_early("before")
    print(orchestrator._started[0].process.pid if orchestrator._started else "none", flush=True)
    orchestrator.leave()
    orchestrator.give_up()
    sys.exit()
orchestrator.start(last=kind == "last")
with orchestrator.orchestrated():
    print(orchestrator._started[0].process.pid, flush=True)
    if kind == "failing":
        raise RuntimeError
    time.sleep(float(seconds))
"""
LONG = "600"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefect's folder: its database is made once."""
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture
def run(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, in_background):
    """Starts stages in the background, by a fake dvc or directly."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dvc").write_text(DVC)
    (tmp_path / "stage.py").write_text(STAGE)
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    environment["PREFECT_HOME"] = str(home)

    def start(*command: str) -> subprocess.Popen[str]:
        return in_background(*command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)

    return start


def server_of(process: subprocess.Popen[str]) -> psutil.Process:
    return psutil.Process(int(process.stdout.readline()))


def gone(process: psutil.Process) -> bool:
    """Whether it ends soon."""
    deadline = time.monotonic() + 30
    while orchestrator.alive(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not orchestrator.alive(process)


def test_the_stages_of_one_dvc_share_a_server_that_ends_with_the_last(run, tmp_path):
    dvc = run("dvc", "first:0", "last:0")
    server = server_of(dvc)
    assert server_of(dvc) == server
    assert dvc.wait(60) == 0
    assert not orchestrator.alive(server)
    assert list((tmp_path / ".prefect").glob("*.json")) == []


def test_a_server_that_still_comes_up_is_waited_for(run):
    dvc = run("dvc", "early:0", "first:0", "last:0")
    server = server_of(dvc)
    assert server_of(dvc) == server == server_of(dvc)
    assert dvc.wait(60) == 0
    assert not orchestrator.alive(server)


def test_a_server_that_no_flow_came_to_need_ends_with_dvc(run):
    dvc = run("dvc", "early:0")
    server = server_of(dvc)
    assert dvc.wait(60) == 0
    assert gone(server)


@pytest.mark.parametrize(
    "command", [("stage.py", "early:0"), ("dvc", "before", "early:0"), ("dvc", orchestrator.GRID, "early:0")]
)
def test_no_server_is_begun_early_where_no_flow_comes_next(run, command):
    stage = run(*command)
    assert stage.stdout.readline() == "none\n"
    assert stage.wait(60) == 0


def test_a_server_ends_with_a_dvc_that_runs_no_last_stage(run):
    dvc = run("dvc", "first:0")
    server = server_of(dvc)
    assert dvc.wait(60) == 0
    assert gone(server)


def test_a_stage_that_fails_takes_the_server_with_it(run):
    dvc = run("dvc", "failing:0")
    server = server_of(dvc)
    dvc.wait(60)
    assert not orchestrator.alive(server)


def test_a_stage_without_dvc_ends_its_server(run, tmp_path):
    stage = run("stage.py", "first:0")
    server = server_of(stage)
    assert stage.wait(60) == 0
    assert not orchestrator.alive(server)
    assert list((tmp_path / ".prefect").glob("*.json")) == []


@pytest.mark.parametrize("command", [("dvc", f"first:{LONG}"), ("stage.py", f"first:{LONG}")])
def test_a_kill_of_all_leaves_no_server_behind(run, command):
    process = run(*command)
    server = server_of(process)
    os.killpg(process.pid, signal.SIGKILL)
    assert gone(server)


def test_a_kill_of_dvc_leaves_the_server_to_the_stage_alone(run):
    dvc = run("dvc", f"first:{LONG}")
    server = server_of(dvc)
    stage = next(child for child in psutil.Process(dvc.pid).children(recursive=True) if "stage.py" in child.cmdline())
    dvc.kill()
    dvc.wait(60)
    time.sleep(4 * orchestrator.POLL)
    assert orchestrator.alive(server)  # the stage has its end to tell yet
    stage.kill()
    assert gone(server)


def test_ctrl_c_ends_the_stage_and_not_the_server_under_it(run):
    dvc = run("dvc", f"first:{LONG}")
    server = server_of(dvc)
    assert os.getpgid(server.pid) != os.getpgid(dvc.pid)
    os.killpg(dvc.pid, signal.SIGINT)
    dvc.wait(60)
    assert not orchestrator.alive(server)  # it was ended by the stage


def test_two_dvc_have_a_server_each(run):
    one, other = run("dvc", f"first:{LONG}"), run("dvc", "first:0", "last:0")
    servers = server_of(one), server_of(other)
    assert servers[0] != servers[1] == server_of(other)
    assert other.wait(60) == 0
    assert orchestrator.alive(servers[0])


def test_a_server_that_died_is_not_trusted(run, tmp_path):
    dvc = run("dvc", "first:0", "first:2", "last:0")
    first = server_of(dvc)
    assert server_of(dvc) == first
    first.kill()
    assert server_of(dvc) != first
    assert dvc.wait(60) == 0


def test_a_process_of_the_same_number_is_not_the_one_that_was_noted():
    this = psutil.Process()
    assert orchestrator.found(orchestrator.named(this)) == this
    assert orchestrator.found({"pid": this.pid, "created": this.create_time() - 60}) is None
    assert orchestrator.found(None) is None


@pytest.mark.parametrize("text", ["", "{", json.dumps({"server": {"pid": 2**22 + 1, "created": 0.0}})])
def test_a_note_that_tells_nothing_is_forgotten(monkeypatch, tmp_path, text):
    monkeypatch.setattr(orchestrator, "HOME", tmp_path)
    (tmp_path / "server.7.json").write_text(text)
    orchestrator._forget_the_dead()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/api", "nowhere"])
def test_a_server_that_does_not_answer_is_told(monkeypatch, url):
    monkeypatch.setenv("PREFECT_API_URL", url)
    with pytest.raises(UserError, match=f"PREFECT_API_URL is {url}, but no"), orchestrator.orchestrated():
        pass


def test_a_proxy_is_not_asked_for_this_machine():
    assert {"127.0.0.1", "localhost"} <= set(os.environ["NO_PROXY"].split(","))


def test_a_server_that_was_given_is_used_and_none_is_started(monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    orchestrator.start()
    assert orchestrator._started == []


def test_a_grid_runs_stages_as_dvc_does():
    child = "from pipelines import orchestrator; found = orchestrator.dvc(); print(found and found.pid)"
    parent = f"import os, subprocess, sys; print(os.getpid(), flush=True); subprocess.run(['python', '-c', {child!r}])"
    for options, found in ((["-m", "pipelines.tables"], True), ([], False)):
        command = [sys.executable, "-c", parent.replace("'python'", "sys.executable"), *options]
        pid, told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        assert told == (pid if found else "None")
