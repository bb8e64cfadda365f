"""The model as it leaves: one folder in MLflow's store that loads in a clean environment from its own files alone.

`data/` has the weights as safetensors, `model.json` (network, classes, normalisation, input, calibration),
`ood.safetensors`, `reference.parquet` (what new images are compared with) and `operating_points.json`; `code/`
the library and `pyfunc_model.py`. Nothing is pickled, and no file tells where it was made.
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
SERVER_TIMEOUT = 20  # seconds for MLflow's server to answer
CONTENT_TAG = "fadeformer.content"  # tag with the checksum of what is in a package
# What loading needs, and what these do not bring in a version of their own choice; timm imports torchvision.
REQUIREMENTS = (
    "mlflow-skinny", "numpy", "pandas", "pillow", "safetensors", "scipy", "timm", "torch", "torchvision", "tqdm"
)  # fmt: skip


def log_package(run_id: str) -> LoggedModel:
    """Packages what lies in models/ and reports/operating_points.json into a run, or finds that it is there.

    What a stage that was killed has left of one is deleted.

    Args:
        run_id: of the run in which the model was trained.
    """
    client = MlflowClient()
    content = compute_content_checksum()
    experiment = client.get_run(run_id).info.experiment_id
    for model in client.search_logged_models([experiment], f"source_run_id = '{run_id}'"):
        if model.status != LoggedModelStatus.READY:
            client.delete_logged_model(model.model_id)
        elif model.tags.get(CONTENT_TAG) == content:
            return model
    made = client.create_logged_model(
        experiment, name=LOGGED_MODEL_NAME, source_run_id=run_id, tags={CONTENT_TAG: content}
    )
    with tempfile.TemporaryDirectory() as temporary:
        package = Path(temporary) / LOGGED_MODEL_NAME
        _write_package(package, Model(artifact_path=LOGGED_MODEL_NAME, run_id=run_id, model_id=made.model_id), content)
        client.log_model_artifacts(made.model_id, str(package))
    client.log_outputs(run_id, [LoggedModelOutput(made.model_id, 0)])
    return client.finalize_logged_model(made.model_id, LoggedModelStatus.READY)


def fetch_package(name: str) -> Path:
    """The folder of a package, downloaded where it does not lie on this machine.

    Args:
        name: `models:/NAME@champion`, `models:/NAME/VERSION`, `models:/m-ID` or `runs:/ID/model`, in this project's
            store or where MLFLOW_TRACKING_URI says; or a package's folder.

    Raises:
        UserError: there is no such model, no store of this project, or it is none of this project's models.
        Unreachable: MLflow is.
    """
    folder = _download_model(name) if re.match(r"\w+:/", name) else Path(name)
    if not folder.is_dir():
        raise UserError(f"{name}: no such folder; name a package's folder, or a model such as models:/NAME@champion")
    find_data_folder(folder)
    return folder


def _download_model(uri: str) -> Path:
    """Where the files of a model in the store lie: in a local store where they are, else brought here."""
    if not locations.store_exists():
        raise UserError(
            f"{locations.display_address()}: no MLflow store is there; run `dvc repro`, or set MLFLOW_TRACKING_URI"
        )
    store.check_reachable(SERVER_TIMEOUT)
    store.connect()
    try:
        return Path(mlflow.artifacts.download_artifacts(uri))
    except (MlflowException, OSError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise UserError(
            f"{uri}: MLflow at {locations.display_address()} has no such model ({reason}); `make ui` shows what there is"
        ) from error


def load_pyfunc(folder: Path, config: dict[str, Any]) -> PyFuncModel:
    """The model of a package's folder, some of its settings changed; its code is the package's own."""
    return mlflow.pyfunc.load_model(str(folder), model_config=config)


def find_data_folder(folder: Path) -> Path:
    """Where the weights of a package lie.

    Raises:
        UserError: the folder is no package of this project's.
    """
    try:
        flavour = Model.load(folder).flavors["python_function"]
        if flavour["loader_module"] != PYFUNC_MODULE.stem:
            raise KeyError
    except (MlflowException, OSError, KeyError) as error:
        raise UserError(f"{folder}: is no package of this pipeline's; `dvc repro promote` makes one") from error
    return Path(folder, flavour["data"])


def compute_content_checksum() -> str:
    """SHA-256 of the weights, the architecture, what the network knows and the operating points."""
    parts = (paths.WEIGHTS, paths.ARCHITECTURE, paths.OOD_STATISTICS, paths.OPERATING_POINTS)
    return hashlib.sha256("".join(checksum(part, "sha256") for part in parts).encode()).hexdigest()


def _write_package(package: Path, model: Model, content: str) -> None:
    """Makes the folder. `mlflow.pyfunc.log_model` would write into it where MLflow keeps it, so it could not move."""
    import torch  # takes seconds, and who finds that a package is there already needs none of it
    from safetensors.torch import save_file

    from pipelines.registry import pyfunc_model

    described = read_json(paths.ARCHITECTURE)
    data, code = (package.with_name("parts") / name for name in ("model", "code"))
    data.mkdir(parents=True)
    save_file(torch.load(paths.WEIGHTS, weights_only=True), data / model_files.WEIGHTS_FILE)
    for path in (paths.ARCHITECTURE, paths.OPERATING_POINTS, paths.OOD_STATISTICS, paths.REFERENCE):
        shutil.copyfile(path, data / path.name)
    library = Path(fadeformer.__file__).parent
    shutil.copytree(library, code / library.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(PYFUNC_MODULE, code / PYFUNC_MODULE.name)
    mlflow.pyfunc.save_model(
        package,
        mlflow_model=model,
        loader_module=PYFUNC_MODULE.stem,
        data_path=str(data),
        code_paths=[str(code / library.name), str(code / PYFUNC_MODULE.name)],
        signature=pyfunc_model.model_signature(tuple(described["classes"])),
        input_example=pd.DataFrame(
            {
                pyfunc_model.IMAGE_INPUT: [
                    _example_image(described["input"]["image_size"], described["input"]["channels"])
                ]
            }
        ),
        pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS],
        model_config=pyfunc_model.DEFAULT_CONFIG,
        metadata={"content": content, "classes": described["classes"], "input": described["input"]},
    )


def _example_image(side: int, channels: int) -> bytes:
    """An image that shows what the input looks like, as PNG."""
    buffer = BytesIO()
    pixels = np.zeros((side, side, 3) if channels == 3 else (side, side), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
