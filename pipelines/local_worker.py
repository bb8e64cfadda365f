"""A Prefect worker for one command, which ends with it, however that ends.

`python -m pipelines.local_worker OWNER LIMIT`, where OWNER is the process that wants it. A worker that is told to end
ends its runs; what they leave behind is ended here.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from pipelines.deploy import POOL, QUEUE

POLL = 0.25  # seconds between two looks
ENDING = 45.0  # seconds that runs may take to end
LAST = 10.0  # and then their worker


@contextmanager
def working(limit: int, log: Path) -> Iterator[None]:
    """A worker on the server of `PREFECT_API_URL` while the block runs.

    Args:
        limit: runs at a time.
        log: what it and its runs print.
    """
    command = [sys.executable, "-m", __name__, str(psutil.Process().pid), str(limit)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            start_new_session=True,  # Ctrl-C reaches the command alone, which first asks its runs to end
        )  # fmt: skip
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def main(owner: psutil.Process, limit: int) -> None:
    """Runs the worker until its owner has ended, or this process is told to end."""
    told = False

    def end(number: int, frame: object) -> None:
        nonlocal told
        told = True

    signal.signal(signal.SIGTERM, end)
    program = str(Path(sys.executable).with_name("prefect"))
    options = ("--pool", POOL, "--work-queue", QUEUE, "--limit", str(limit))
    worker = subprocess.Popen([program, "worker", "start", *options])
    while not told and owner.is_running() and worker.poll() is None:
        time.sleep(POLL)
    below = psutil.Process(worker.pid).children(recursive=True) if worker.poll() is None else []
    worker.terminate()
    _, left = psutil.wait_procs(below, ENDING)
    with suppress(subprocess.TimeoutExpired):
        worker.wait(LAST)
    for process in (*left, worker):  # they hang now and then where their server is gone
        with suppress(psutil.NoSuchProcess):
            process.kill()


if __name__ == "__main__":
    main(psutil.Process(int(sys.argv[1])), int(sys.argv[2]))
