"""A stage that is forked from a process with libraries loaded is, to all around it, the process that dvc started."""

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipelines import forked, orchestrator, preloaded

# What dvc does with stages: a process for each, in the folder and the environment of the project.
DVC = """
import os, subprocess, sys
for word in filter(None, sys.argv[1].split(",")):
    process = subprocess.Popen([sys.executable, "stage.py", word], env={**os.environ, "DVC_STAGE": word})
    print(process.pid, flush=True)
    print(word, "ended with", process.wait(), flush=True)
"""
# A stage as `python -m pipelines` begins it, but for libraries that take a while and for what is done then.
STAGE = """
import os, sys
from pipelines import forked
name = sys.argv[1]
forked.COMMAND = (sys.executable, "loading.py")
forked.BEFORE, forked.STAGES = ("begin",), (name,)
if name == "begin":
    forked.begin(name)
    sys.exit()
if name == "elsewhere":
    os.environ["NEW"] = "1"
status = forked.run(name)
sys.exit(99 if status is None else status)  # 99: it would load everything itself
"""
LOADING = """
import sys
import stages
from pipelines import preloaded
preloaded.LIBRARIES, preloaded.STAGES = ("library",), ("last",)
sys.modules["pipelines.__main__"] = stages
preloaded.main()
"""
STAGES = """
import os, signal, sys, threading, time
def load_and_run(name):
    from pipelines import orchestrator
    print(name, os.getpid(), orchestrator.dvc().pid, os.environ.get("DVC_STAGE"), os.getcwd(), sys.argv[1:], flush=True)
    kind, _, number = name.partition(":")
    if kind == "logs":
        import logging
        logging.getLogger("prefect").info("in colours")
    if kind == "fails":
        print("told", file=sys.stderr, flush=True)
        sys.exit(int(number))
    if kind == "dies":
        os.kill(os.getpid(), int(number))
    if kind == "counts":
        came = []
        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(one, lambda number, frame: came.append(number))
        print("ready", flush=True)
        while len(came) < int(number):
            time.sleep(0.01)
        time.sleep(0.3)
        return f"came {came}"
    if kind in ("waits", "last"):
        print("ready", flush=True)
        time.sleep(float(number or 2))
    return "done"
"""
LONG = "waits:600"
THREAD = "import threading, time; threading.Thread(target=time.sleep, args=[600], daemon=True).start()"


@pytest.fixture
def run(tmp_path: Path, in_background):
    """Starts stages by a fake dvc."""
    files = {"dvc": DVC, "stage.py": STAGE, "loading.py": LOADING, "stages.py": STAGES, "library.py": ""}
    for name, text in files.items():
        (tmp_path / name).write_text(text)

    def start(
        *words: str, asked: tuple[str, ...] = (), stdout: int = subprocess.PIPE, **environment: str
    ) -> subprocess.Popen[str]:
        env = {**os.environ, "PYTHONPATH": str(tmp_path), **environment}
        command = ("dvc", ",".join([*words, ""]), *asked)
        return in_background(*command, cwd=tmp_path, env=env, stdout=stdout, stderr=subprocess.STDOUT)

    return start


def copy_of(dvc: subprocess.Popen[str], word: str) -> tuple[psutil.Process, psutil.Process]:
    """The process that dvc has started for a stage, and the copy that runs it."""
    for line in dvc.stdout:
        if line.startswith(f"{word} ") and "ended" not in line:
            copy = psutil.Process(int(line.split()[1]))
            break
    assert dvc.stdout.readline() == "ready\n"
    asker = next(one for one in psutil.Process(dvc.pid).children() if word in one.cmdline())
    assert asker.pid != copy.pid
    return asker, copy


def comes_to(state: Callable[[], bool]) -> bool:
    """Whether something comes to be so."""
    deadline = time.monotonic() + 20
    while not state() and time.monotonic() < deadline:
        time.sleep(0.02)
    return state()


def test_it_has_the_streams_the_folder_and_the_environment_of_the_stage(run, tmp_path):
    dvc = run("begin", "works", "fails:3")
    told = dvc.communicate(timeout=60)[0]
    assert f"{dvc.pid} works {tmp_path} ['works']\nworks: done\nworks ended with 0\n" in told
    assert f"{dvc.pid} fails:3 {tmp_path} ['fails:3']\ntold\nfails:3 ended with 3\n" in told


def test_in_a_terminal_prefect_logs_in_colours(run, tmp_path):
    (tmp_path / "library.py").write_text("import prefect")
    here, terminal = pty.openpty()
    dvc = run("begin", "logs", stdout=terminal, TERM="xterm")
    os.close(terminal)
    assert dvc.wait(60) == 0
    told = os.read(here, 10_000).decode()
    os.close(here)
    assert "logs ended with 0" in told
    assert re.search(r"\x1b\[[\d;]*mINFO\x1b\[0m .*in colours", told)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_what_ends_it_ends_the_process_that_dvc_waits_for(run, number):
    told = run("begin", f"dies:{int(number)}").communicate(timeout=60)[0]
    assert f"dies:{int(number)} ended with {128 + 15 if number == signal.SIGTERM else -int(number)}\n" in told


@pytest.mark.parametrize("to_all", [True, False])
def test_each_signal_comes_to_it_once(run, to_all):
    dvc = run("begin", "counts:3")
    asker, _ = copy_of(dvc, "counts:3")
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    for number in signals:
        if to_all:  # as Ctrl-C in a terminal, from which only dvc itself is spared here
            os.kill(asker.pid, number)
        else:
            asker.send_signal(number)
        time.sleep(0.2)
    assert f"counts:3: came {[int(number) for number in signals]}" in dvc.communicate(timeout=60)[0]


def test_a_kill_of_the_stage_is_a_kill_of_it(run):
    asker, copy = copy_of(run("begin", LONG), LONG)
    asker.kill()
    assert comes_to(lambda: not orchestrator.alive(copy))


def test_a_kill_of_all_leaves_nothing_behind(run):
    dvc = run("begin", LONG)
    _, copy = copy_of(dvc, LONG)
    begun = copy.parent().parent()
    assert "loading.py" in begun.cmdline()
    os.killpg(dvc.pid, signal.SIGKILL)
    assert comes_to(lambda: not orchestrator.alive(copy) and not orchestrator.alive(begun))


def test_a_stage_whose_keeper_is_killed_is_told_to_end_and_says_so(run):
    dvc = run("begin", LONG)
    _, copy = copy_of(dvc, LONG)
    copy.parent().kill()
    told = dvc.communicate(timeout=60)[0]
    assert f"{LONG}: stopped by SIGTERM; run again" in told
    assert f"{LONG}: the process that waits for it was killed; run again: finished stages are kept\n" in told
    assert f"{LONG} ended with 1\n" in told


def test_a_stage_that_is_paused_pauses_it(run):
    dvc = run("begin", LONG)
    asker, copy = copy_of(dvc, LONG)
    asker.send_signal(signal.SIGTSTP)
    assert comes_to(lambda: asker.status() == copy.status() == psutil.STATUS_STOPPED)
    asker.send_signal(signal.SIGCONT)
    assert comes_to(lambda: psutil.STATUS_STOPPED not in {asker.status(), copy.status()})
    asker.send_signal(signal.SIGTERM)
    told = f"{LONG}: stopped by SIGTERM; run again: finished stages are kept\n{LONG} ended with 143\n"
    assert told in dvc.communicate(timeout=60)[0]


@pytest.mark.parametrize(("number", "told"), [
    (signal.SIGINT, "works: interrupted"), (signal.SIGTERM, "works: stopped by SIGTERM; run again"),
])  # fmt: skip
def test_a_signal_while_libraries_load_ends_the_stage(run, tmp_path, number, told):
    (tmp_path / "library.py").write_text("import time; time.sleep(20)")
    dvc = run("begin", "works")
    for line in dvc.stdout:
        if line == "begin ended with 0\n":
            break
    asker = psutil.Process(int(dvc.stdout.readline()))
    assert comes_to(lambda: forked.PASSED_ON[-1] in caught(asker))
    asker.send_signal(number)
    text = dvc.communicate(timeout=60)[0]
    assert told in text
    assert f"works ended with {128 + number}\n" in text


def caught(process: psutil.Process) -> set[int]:
    """Numbers of the signals that a process has a handler for."""
    mask = int(Path(f"/proc/{process.pid}/status").read_text().partition("SigCgt:")[2].split()[0], 16)
    return {bit + 1 for bit in range(64) if mask >> bit & 1}


@pytest.mark.parametrize(("words", "library", "environment"), [
    (["works"], "", {}),  # nothing was begun
    (["begin", "elsewhere"], "", {}),  # in another environment
    (["begin", "works"], "", {"FADEFORMER_PRELOAD": "no"}),
    (["begin", "works"], "raise ImportError", {}),
    (["begin", "works"], THREAD, {}),
])  # fmt: skip
def test_else_a_stage_loads_for_itself(run, tmp_path, words, library, environment):
    (tmp_path / "library.py").write_text(library)
    assert f"{words[-1]} ended with 99\n" in run(*words, **environment).communicate(timeout=60)[0]


def test_else_also_where_it_ends_before_it_can_be_asked(monkeypatch):
    address = f"\0fadeformer-test-{os.getpid()}"
    monkeypatch.setattr(forked, "_address", lambda owner: address)
    monkeypatch.setattr(orchestrator, "dvc", psutil.Process)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(address)
    listening.listen()
    threading.Timer(0.3, listening.close).start()
    assert forked.run("train") is None


@pytest.mark.parametrize(("asked", "status"), [
    (("begin",), 99), (("preprocess",), 99), (("train",), 0), ((), 0),
])  # fmt: skip
def test_libraries_are_loaded_where_dvc_was_asked_for_what_needs_them(run, asked, status):
    assert f"works ended with {status}\n" in run("begin", "works", asked=asked).communicate(timeout=60)[0]


def test_the_process_with_the_libraries_ends_as_the_last_stage_begins(run):
    dvc = run("begin", "waits:0.5", "last")
    _, copy = copy_of(dvc, "waits:0.5")
    begun = copy.parent().parent()
    _, last = copy_of(dvc, "last")
    assert comes_to(lambda: not orchestrator.alive(begun))
    assert orchestrator.alive(last)
    assert "last ended with 0\n" in dvc.communicate(timeout=60)[0]


def test_nothing_is_forked_beside_an_accelerator(monkeypatch):
    assert forked._possible()
    monkeypatch.setattr(forked, "ACCELERATORS", ("nul[l]",))
    assert not forked._possible()


def test_only_the_same_user_is_answered(monkeypatch):
    one, other = socket.socketpair()
    with one, other:
        assert preloaded.of_this_user(one)
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        assert not preloaded.of_this_user(one)


def test_stages_find_nearly_all_libraries_loaded():
    told = """
import importlib, json, sys, threading
import fadeformer
from pipelines import beside, preloaded
for library in preloaded.LIBRARIES:
    importlib.import_module(library)
threads, before = threading.active_count(), set(sys.modules)
for stage in preloaded.STAGES:
    importlib.import_module(f"pipelines.{stage}")
importlib.import_module(beside.OF_STAGE["evaluate"])
late = [name for name in set(sys.modules) - before if not name.startswith(("fadeformer", "pipelines"))]
print(json.dumps([threads, late]))
"""
    output = subprocess.run([sys.executable, "-c", told], check=True, capture_output=True, text=True).stdout
    threads, late = json.loads(output)
    assert threads == 1
    assert len(late) < 40, late
