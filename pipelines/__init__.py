"""The orchestration: one short module per stage, the flows over them, tracking and registry."""

import os
from pathlib import Path

# Read by the tools when they are imported, so set before any of them is: nothing is reported to anybody, and nothing
# is written outside the project's folder.
_CACHE = Path(__file__).resolve().parents[1] / ".cache"
for _name, _value in {
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MPLCONFIGDIR": str(_CACHE / "matplotlib"),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}.items():
    os.environ.setdefault(_name, _value)
