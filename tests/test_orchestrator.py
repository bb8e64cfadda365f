"""Prefect's temporary server ends with the process that started it, however that ends."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from fadeformer.errors import UserError
from pipelines import orchestrator

STARTED = """
import time
from pipelines import orchestrator
orchestrator.start()
print(orchestrator._started[0].process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_stage_leaves_no_server_behind(how, tmp_path):
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", STARTED], stdout=subprocess.PIPE, text=True, env=environment) as stage:
        server = psutil.Process(int(stage.stdout.readline()))
        assert server.is_running()
        stage.send_signal(how)
    server.wait(60)
    assert not psutil.pid_exists(server.pid) or server.status() == psutil.STATUS_ZOMBIE


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
