"""The orchestration: one short module per stage, the flows over them, tracking and registry."""

import os
from pathlib import Path

# Read by the tools when they are imported, so set before any of them is: nothing is reported to anybody, nothing is
# written outside the project's folder, and a server that is gone is told in seconds rather than four minutes.
_CACHE = Path(__file__).resolve().parents[1] / ".cache"
for _name, _value in {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what cuBLAS needs to repeat itself
    "DO_NOT_TRACK": "1",
    "HF_HOME": str(_CACHE / "huggingface"),
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",  # files go through MLflow's server: its object store
    "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",  # may be reached by nobody else
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "ORT_DISABLE_TELEMETRY": "1",  # else onnxruntime puts an identity of this machine into the home
    "MPLCONFIGDIR": str(_CACHE / "matplotlib"),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "TORCH_HOME": str(_CACHE / "torch"),
    "TORCHINDUCTOR_CACHE_DIR": str(_CACHE / "torchinductor"),
}.items():
    os.environ.setdefault(_name, _value)
for _name in ("NO_PROXY", "no_proxy"):  # the servers that stages start for themselves are on this machine
    _given = filter(None, os.environ.get(_name, "").split(","))
    os.environ[_name] = ",".join(dict.fromkeys([*_given, "127.0.0.1", "localhost"]))  # once, also in a process below
