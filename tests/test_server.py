"""The Prefect server of a command: temporary or at PREFECT_API_URL, and its shutdown."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fadeformer.errors import TransientError
from pipelines import server
from tests.conftest import ROOT

# A stage with a flow, as run by `dvc repro`.
STAGE = """
import time
from prefect import flow
from pipelines import runner, server
@flow
def evaluate():
    print("started", flush=True)
    time.sleep(SECONDS)
def main():
    with server.temporary_server():
        evaluate()
    return "done"
runner.run("evaluate", main)
"""
# Like DVC, which ignores Ctrl-C while its stage runs and does not handle SIGTERM.
DVC = """
import signal, subprocess, sys
stage = subprocess.Popen([sys.executable, "stage.py"])
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.exit(stage.wait())
"""


@pytest.fixture
def started(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, in_background, interruptible):
    """Starts a command with a stage that takes some seconds; waits until its flow has started."""
    home = tmp_path_factory.getbasetemp() / "prefect"  # shared by all tests: its database is created once
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    environment |= {"PREFECT_HOME": str(home), "PYTHONPATH": str(ROOT)}

    def start(*command: str, seconds: float) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
        (tmp_path / "dvc.py").write_text(DVC)
        (tmp_path / "stage.py").write_text(STAGE.replace("SECONDS", str(seconds)))
        process = in_background(*command, cwd=tmp_path, env=environment, stderr=subprocess.STDOUT)
        for line in process.stdout:
            if line == "started\n":
                return process, psutil.Process(process.pid).children(recursive=True)
        raise AssertionError(process.wait())

    return start


def test_temporary_server_has_its_own_database(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    code = "from pipelines import server\nwith server.temporary_server(): pass"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    assert [path.name for path in tmp_path.glob("*.db")] == ["temporary.db"]


def test_command_has_one_server_and_its_exit_status(started):
    process, descendants = started("-m", "pipelines.server", sys.executable, "dvc.py", seconds=0.1)
    assert len(descendants) == 3  # the server, DVC and its stage
    output = process.communicate(timeout=120)[0]
    assert output.endswith("evaluate: done\n")
    assert process.returncode == 0
    assert psutil.wait_procs(descendants, timeout=10)[1] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_group_stops_all_processes(started, number):
    process, descendants = started("-m", "pipelines.server", sys.executable, "dvc.py", seconds=600)
    os.killpg(process.pid, number)
    output = process.communicate(timeout=60)[0]
    assert "Finished in state Crashed" in output
    assert re.search(r"^evaluate: (interrupted|stopped by SIGTERM; run again)", output, re.MULTILINE)
    assert "Traceback" not in output
    assert process.returncode == 128 + number
    assert psutil.wait_procs(descendants, timeout=10)[1] == []


def test_killed_group_leaves_no_server(started):
    process, descendants = started("-m", "pipelines.server", sys.executable, "dvc.py", seconds=600)
    os.killpg(process.pid, signal.SIGKILL)
    assert psutil.wait_procs(descendants, timeout=10)[1] == []


def test_stage_fails_when_its_server_dies(started):
    process, (server_process,) = started("stage.py", seconds=1)
    server_process.kill()
    output = process.communicate(timeout=60)[0]
    assert re.search(r"^evaluate: the Prefect server at \S+ no longer answers; run again$", output, re.MULTILINE)
    assert "Traceback" not in output
    assert process.returncode == os.EX_TEMPFAIL


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/api", "nowhere"])
def test_unreachable_server_is_reported(monkeypatch, url):
    monkeypatch.setenv("PREFECT_API_URL", url)
    with pytest.raises(TransientError, match=f"PREFECT_API_URL is {url}, but no"), server.temporary_server():
        pass


def test_existing_server_is_used(monkeypatch, prefect_server):
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
    with server.temporary_server() as url:
        assert url == prefect_server
    assert server.is_reachable(prefect_server)


def test_proxy_is_bypassed_for_local_hosts():
    assert {"127.0.0.1", "localhost"} <= set(os.environ["NO_PROXY"].split(","))
