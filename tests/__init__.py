"""Tests of the project; of workers that run side by side (pytest-xdist) each keeps to its share of the cores.

Libraries start a thread on every core, and where those of several workers wait for one another, stages take twice the
time. Here, since libraries read it when they are first imported; programs that tests start inherit it.
"""

import os

CORES = os.cpu_count() or 1
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CORES // _WORKERS)))
