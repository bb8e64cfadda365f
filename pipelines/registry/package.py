"""The deployable MLflow model: a folder that loads in a clean environment from its own files.

`data/` has the weights as safetensors, `model.json` (architecture, classes, normalization, input, calibration),
`ood.safetensors` (out-of-distribution detector), `reference.parquet` (reference data for drift detection),
`training_images.parquet` (content hashes of the training images) and `operating_points.json`; `code/` has the library
and `pyfunc_model.py`. There are no pickles and no local paths in it.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.pyfunc import PyFuncModel
from PIL import Image

import fadeformer
from fadeformer.errors import UserError
from fadeformer.inference import model_files
from fadeformer.io.atomic import checksum, read_json
from pipelines import paths
from pipelines.tracking import locations, store
from pipelines.tracking.runs import LOGGED_MODEL_NAME

PYFUNC_MODULE = Path(__file__).with_name("pyfunc_model.py")
SERVER_TIMEOUT = 20  # seconds
CONTENT_TAG = "fadeformer.content"  # tag with the checksum of a package's content
# Packages that loading needs, pinned with their dependencies that must match; timm imports torchvision.
REQUIREMENTS = (
    "mlflow-skinny", "numpy", "pandas", "pillow", "safetensors", "scipy", "timm", "torch", "torchvision", "tqdm"
)  # fmt: skip


def log_package(run_id: str) -> LoggedModel:
    """Log models/ and reports/operating_points.json as a package of a run. Idempotent.

    Incomplete packages, left by a stage that was killed, are deleted.

    Args:
        run_id: The MLflow run in which the model was trained.
    """
    client = MlflowClient()
    content = compute_content_checksum()
    experiment = client.get_run(run_id).info.experiment_id
    for model in client.search_logged_models([experiment], f"source_run_id = '{run_id}'"):
        if model.status != LoggedModelStatus.READY:
            client.delete_logged_model(model.model_id)
        elif model.tags.get(CONTENT_TAG) == content:
            return model
    created = client.create_logged_model(
        experiment, name=LOGGED_MODEL_NAME, source_run_id=run_id, tags={CONTENT_TAG: content}
    )
    with tempfile.TemporaryDirectory() as temporary:
        package = Path(temporary) / LOGGED_MODEL_NAME
        _write_package(
            package, Model(artifact_path=LOGGED_MODEL_NAME, run_id=run_id, model_id=created.model_id), content
        )
        client.log_model_artifacts(created.model_id, str(package))
    client.log_outputs(run_id, [LoggedModelOutput(created.model_id, 0)])
    return client.finalize_logged_model(created.model_id, LoggedModelStatus.READY)


def fetch_package(name: str) -> Path:
    """Return the local folder of a package, which is downloaded if necessary.

    Args:
        name: `models:/NAME@champion`, `models:/NAME/VERSION`, `models:/m-ID` or `runs:/ID/model`, in the project's
            store or that of MLFLOW_TRACKING_URI; or a package's folder.

    Raises:
        UserError: There is no such model or no store, or it is not a package of this pipeline.
        MLflowUnreachable: MLflow cannot be reached.
    """
    folder = _download_model(name) if re.match(r"\w+:/", name) else Path(name)
    if not folder.is_dir():
        raise UserError(f"{name}: no such folder; name a package's folder, or a model such as models:/NAME@champion")
    find_data_folder(folder)
    return folder


def _download_model(uri: str) -> Path:
    """Return the folder of a model's files: in place in a local store, else downloaded."""
    if not locations.store_exists():
        raise UserError(
            f"{locations.display_address()}: there is no MLflow store; run `dvc repro`, or set MLFLOW_TRACKING_URI"
        )
    store.check_reachable(SERVER_TIMEOUT)
    store.connect()
    try:
        return Path(mlflow.artifacts.download_artifacts(uri))
    except (MlflowException, OSError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise UserError(
            f"{uri}: MLflow at {locations.display_address()} has no such model ({reason}); `make ui` shows all models"
        ) from error


def load_pyfunc(folder: Path, config: dict[str, Any]) -> PyFuncModel:
    """Load a package with MLflow and with the package's own code; `config` overrides `pyfunc_model.DEFAULT_CONFIG`."""
    return mlflow.pyfunc.load_model(str(folder), model_config=config)


def find_data_folder(folder: Path) -> Path:
    """Return the folder `data/` of a package, which has the weights.

    Raises:
        UserError: The folder is not a package of this pipeline.
    """
    try:
        flavor = Model.load(folder).flavors["python_function"]
        if flavor["loader_module"] != PYFUNC_MODULE.stem:
            raise KeyError
    except (MlflowException, OSError, KeyError) as error:
        raise UserError(f"{folder}: not a package of this pipeline; `dvc repro promote` creates one") from error
    return Path(folder, flavor["data"])


def compute_content_checksum() -> str:
    """Return the SHA-256 of weights, model.json, out-of-distribution detector and operating points."""
    files = (paths.WEIGHTS, paths.ARCHITECTURE, paths.OOD_STATISTICS, paths.OPERATING_POINTS)
    return hashlib.sha256("".join(checksum(file, "sha256") for file in files).encode()).hexdigest()


def _write_package(package: Path, model: Model, content: str) -> None:
    """Write the folder. Not with `mlflow.pyfunc.log_model`, which writes absolute paths of the store into it."""
    import torch  # slow to import, and not needed if the package already exists
    from safetensors.torch import save_file

    from pipelines.registry import pyfunc_model

    model_metadata = read_json(paths.ARCHITECTURE)
    data, code = (package.with_name("staging") / name for name in ("model", "code"))
    data.mkdir(parents=True)
    save_file(torch.load(paths.WEIGHTS, weights_only=True), data / model_files.WEIGHTS_FILE)
    files = (paths.ARCHITECTURE, paths.OPERATING_POINTS, paths.OOD_STATISTICS, paths.REFERENCE, paths.TRAINING_IMAGES)
    for path in files:
        shutil.copyfile(path, data / path.name)
    example = _example_image(model_metadata["input"]["image_size"], model_metadata["input"]["channels"])
    library = Path(fadeformer.__file__).parent
    shutil.copytree(library, code / library.name, ignore=shutil.ignore_patterns("__pycache__", "*.md"))
    shutil.copyfile(PYFUNC_MODULE, code / PYFUNC_MODULE.name)
    mlflow.pyfunc.save_model(
        package,
        mlflow_model=model,
        loader_module=PYFUNC_MODULE.stem,
        data_path=str(data),
        code_paths=[str(code / library.name), str(code / PYFUNC_MODULE.name)],
        signature=pyfunc_model.model_signature(tuple(model_metadata["classes"])),
        input_example=pd.DataFrame({pyfunc_model.IMAGE_INPUT: [example]}),
        pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS],
        model_config=pyfunc_model.DEFAULT_CONFIG,
        metadata={"content": content, "classes": model_metadata["classes"], "input": model_metadata["input"]},
    )


def _example_image(side: int, channels: int) -> bytes:
    """Return a black image as PNG, the input example of the package."""
    buffer = BytesIO()
    pixels = np.zeros((side, side, 3) if channels == 3 else (side, side), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
