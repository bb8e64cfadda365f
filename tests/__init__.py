"""Tests of the project; sets the environment before any test module imports a library that reads it.

With pytest-xdist each worker uses its share of the cores: by default every worker would start a thread on every core,
and stages would take twice the time. Child processes of the tests inherit the variables.
"""

import os

from pipelines.environment import configure_environment

configure_environment()  # before conftest.py imports MLflow and Prefect
CORES = os.cpu_count() or 1
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CORES // _WORKERS)))
