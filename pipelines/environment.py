"""Environment variables that keep the tools reproducible, inside the project's folder, and free of telemetry."""

import os
from pathlib import Path

LOCAL_HOSTS = ("127.0.0.1", "localhost")


def configure_environment() -> None:
    """Set defaults for PyTorch, MLflow, Prefect and others. Existing values stay; child processes inherit all of them.

    Matplotlib's backend is always set, since figures are only written to files.

    Every entry point calls it first: most of these tools read their variables when they are imported.
    """
    cache = Path(__file__).resolve().parents[1] / ".cache"
    defaults = {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # makes cuBLAS deterministic
        "DO_NOT_TRACK": "1",
        "HF_HOME": str(cache / "huggingface"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",  # files go through MLflow's server: clients may have no
        "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",  # access to its object store
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",  # these three: report an unreachable server in seconds, not minutes
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        "MPLCONFIGDIR": str(cache / "matplotlib"),
        "ORT_DISABLE_TELEMETRY": "1",  # otherwise onnxruntime stores a machine identifier in the home directory
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "TORCH_HOME": str(cache / "torch"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "torchinductor"),
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ["MPLBACKEND"] = "agg"  # a notebook passes on its own backend, which may not be installed here
    for name in ("NO_PROXY", "no_proxy"):  # temporary servers run on this machine; dict.fromkeys removes duplicates
        hosts = filter(None, os.environ.get(name, "").split(","))
        os.environ[name] = ",".join(dict.fromkeys([*hosts, *LOCAL_HOSTS]))
