"""MLflow's model registry: versions, their tags, and the aliases `champion`, `challenger` and `previous`."""

from __future__ import annotations

import json
import re
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from fadeformer.errors import UserError
from fadeformer.evaluation import predictions
from fadeformer.evaluation.predictions import Predictions
from pipelines.tracking.store import MLflowUnreachable, translate_mlflow_errors

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
ALIAS_NAMES = (CHAMPION, CHALLENGER, PREVIOUS)
FORCED_TAG, ROLLED_BACK_TAG = "forced", "rolled_back"  # tags that stay for ever, with the reason
REGISTRY_ID_TAG = "fadeformer.registry"  # tag of a registered model
LEDGER_TAG_PREFIX, GATE_TAG_PREFIX = (
    "ledger.",
    "gate.",
)  # what tags with an entry of the ledger, or a rule's verdict, begin with
CELL_SEPARATOR = " | &emsp;"  # between cells of a table: MLflow's page sets them edge to edge
MAX_DESCRIPTION_LENGTH = 5000  # characters of a description that MLflow keeps in a database other than SQLite
TRUNCATION_NOTE = "\n\nThe rest stands in `model_card.md` of the run."

Aliases = dict[str, str]


@dataclass(frozen=True)
class ModelVersion:
    """A registered version and the run in which it was trained.

    Attributes:
        name: of the registered model.
        number: of the version.
        run_id: MLflow's.
        entries: what the ledger says of it, each as JSON.
    """

    name: str
    number: str
    run_id: str
    ledger_entries: tuple[str, ...] = field(default=(), compare=False)


@translate_mlflow_errors()
def list_versions(name: str) -> dict[str, ModelVersion]:
    """All versions of a registered model by number; none where there is no such model."""
    found = {}
    for one in mlflow.search_model_versions(filter_string=f"name = '{name}'"):
        entries = tuple(text for key, text in one.tags.items() if key.startswith(LEDGER_TAG_PREFIX))
        found[str(one.version)] = ModelVersion(name, str(one.version), str(one.run_id), entries)
    return found


@translate_mlflow_errors()
def get_aliases(name: str) -> Aliases:
    """The versions under the aliases of this project, by alias; none where there is no such model."""
    models = MlflowClient().search_registered_models(f"name = '{name}'")
    return {alias: str(one.aliases[alias]) for one in models for alias in ALIAS_NAMES if alias in one.aliases}


@translate_mlflow_errors()
def get_registry_id(name: str) -> str | None:
    """What tells a registered model from one of the same name in another registry, or after it was deleted; a tag.

    None where there is no such model.
    """
    models = MlflowClient().search_registered_models(f"name = '{name}'")
    if not models:
        return None
    if REGISTRY_ID_TAG in models[0].tags:
        return str(models[0].tags[REGISTRY_ID_TAG])
    made = uuid.uuid4().hex
    MlflowClient().set_registered_model_tag(name, REGISTRY_ID_TAG, made)
    return made


@translate_mlflow_errors()
def register_version(name: str, run_id: str, model_id: str) -> ModelVersion:
    """Registers a package of a run (`pipelines.registry.package`) as a new version, or finds the version that it already is."""
    client = MlflowClient()
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    source = f"models:/{model_id}"
    for known in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        if known.source == source:
            return ModelVersion(name, str(known.version), run_id)
    made = client.create_model_version(name, source, run_id, model_id=model_id)
    return ModelVersion(name, str(made.version), run_id)


def load_test_predictions(version: ModelVersion) -> Predictions:
    """What a version predicted on its test images.

    Raises:
        UserError: its run does not hold them.
        Unreachable: MLflow, or where it keeps files, is.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            with translate_mlflow_errors():
                path = mlflow.artifacts.download_artifacts(
                    run_id=version.run_id, artifact_path="predictions.parquet", dst_path=folder
                )
        except MLflowUnreachable:
            raise
        except (UserError, OSError) as error:
            raise UserError(
                f"champion {version.name} version {version.number}: MLflow run {version.run_id} has no"
                f" predictions.parquet ({error}); remove the alias, or restore mlruns/"
            ) from error
        return predictions.read(Path(path)).select_split("test")


@translate_mlflow_errors()
def set_description(version: ModelVersion, card: str) -> None:
    """Makes a model card a version's description; its first lines where the store takes no more."""
    client, text = MlflowClient(), re.sub(r" \| (?!---)", CELL_SEPARATOR, card)
    try:
        client.update_model_version(version.name, version.number, text)
    except MlflowException:
        if len(text) <= MAX_DESCRIPTION_LENGTH:
            raise
        head = text[: MAX_DESCRIPTION_LENGTH - len(TRUNCATION_NOTE)].rpartition("\n")[0]
        client.update_model_version(version.name, version.number, head + TRUNCATION_NOTE)


@translate_mlflow_errors()
def apply_ledger_entry(entry: Mapping[str, Any]) -> None:
    """Makes aliases and tags what an entry of the ledger says, wherever a process that was killed has left them.

    The champion moves first, and in one step: there is no moment in which the alias is gone. What an entry says of
    a version that was deleted since is left out.
    """
    client, name = MlflowClient(), str(entry["model"])
    there, now = list_versions(name), get_aliases(name)
    for alias in ALIAS_NAMES:
        wanted = entry["aliases"].get(alias)
        if wanted in there and now.get(alias) != wanted:
            client.set_registered_model_alias(name, alias, wanted)
        elif wanted is None and alias in now:
            client.delete_registered_model_alias(name, alias)
    number = str(entry["version"])
    for gone in entry["taken_back"]:
        if gone["version"] in there:
            client.set_model_version_tag(name, gone["version"], ROLLED_BACK_TAG, str(entry["reason"]))
    if number not in there:
        return
    tags = {f"{GATE_TAG_PREFIX}{r['name']}": f"{r['status']}: {r['requirement']}: {r['details']}" for r in entry["checks"]}
    if tags:
        for stale in client.get_model_version(name, number).tags.keys() - tags.keys():
            if stale.startswith(GATE_TAG_PREFIX):
                client.delete_model_version_tag(name, number, stale)
    if entry["action"] == "forced":
        tags[FORCED_TAG] = str(entry["reason"])
    tags[f"{LEDGER_TAG_PREFIX}{entry['number']:05d}"] = json.dumps(dict(entry), ensure_ascii=False)
    for tag, text in tags.items():
        client.set_model_version_tag(name, number, tag, text)
