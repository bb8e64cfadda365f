"""MLflow's model registry: versions, their tags, and the aliases `champion`, `challenger` and `previous`.

`apply_ledger_entry` moves the aliases after a decision; the decision is made in fadeformer/promotion/gate.py.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from fadeformer.errors import UserError
from pipelines.tracking.store import MLflowUnreachable, translate_mlflow_errors

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
ALIAS_NAMES = (CHAMPION, CHALLENGER, PREVIOUS)
FORCED_TAG, ROLLED_BACK_TAG = "forced", "rolled_back"  # permanent tags of a version; their value is the reason
REGISTRY_ID_TAG = "fadeformer.registry"  # tag of a registered model
LEDGER_TAG_PREFIX, GATE_TAG_PREFIX = "ledger.", "gate."  # tags with an entry of the ledger, and with a check's result
CELL_SEPARATOR = " | &emsp;"  # MLflow's page renders table cells without space between them
MAX_DESCRIPTION_LENGTH = 5000  # characters, in databases other than SQLite
TRUNCATION_NOTE = "\n\nTruncated: the whole card is the artifact `model_card.md` of the run."

Aliases = dict[str, str]


@dataclass(frozen=True)
class ModelVersion:
    """A version of a registered model.

    Attributes:
        name: Name of the registered model.
        number: Version number.
        run_id: MLflow run in which it was trained.
        ledger_entries: The ledger's entries about it, each as JSON.
    """

    name: str
    number: str
    run_id: str
    ledger_entries: tuple[str, ...] = field(default=(), compare=False)


@translate_mlflow_errors()
def list_versions(name: str) -> dict[str, ModelVersion]:
    """Return all versions of a registered model by number; empty if there is no such model."""
    result = {}
    for version in mlflow.search_model_versions(filter_string=f"name = '{name}'"):
        entries = tuple(text for key, text in version.tags.items() if key.startswith(LEDGER_TAG_PREFIX))
        result[str(version.version)] = ModelVersion(name, str(version.version), str(version.run_id), entries)
    return result


@translate_mlflow_errors()
def get_aliases(name: str) -> Aliases:
    """Return the version numbers of this project's aliases, by alias; empty if there is no such model."""
    models = MlflowClient().search_registered_models(f"name = '{name}'")
    return {alias: str(model.aliases[alias]) for model in models for alias in ALIAS_NAMES if alias in model.aliases}


@translate_mlflow_errors()
def get_registry_id(name: str) -> str | None:
    """Return the unique id of a registered model, a tag that is created on first use; None if there is no such model.

    It differs between models of the same name in different registries, and after a model was deleted and created again.
    """
    models = MlflowClient().search_registered_models(f"name = '{name}'")
    if not models:
        return None
    if REGISTRY_ID_TAG in models[0].tags:
        return str(models[0].tags[REGISTRY_ID_TAG])
    registry_id = uuid.uuid4().hex
    MlflowClient().set_registered_model_tag(name, REGISTRY_ID_TAG, registry_id)
    return registry_id


@translate_mlflow_errors()
def register_version(name: str, run_id: str, model_id: str) -> ModelVersion:
    """Register a run's package (`pipelines.registry.package`) as a new version. Idempotent."""
    client = MlflowClient()
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    source = f"models:/{model_id}"
    for existing in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        if existing.source == source:
            return ModelVersion(name, str(existing.version), run_id)
    created = client.create_model_version(name, source, run_id, model_id=model_id)
    return ModelVersion(name, str(created.version), run_id)


def download_result(version: ModelVersion, name: str, folder: Path) -> Path:
    """Download one of the files that evaluation logged to a version's run, such as predictions.parquet.

    Raises:
        UserError: The run has no such file.
        MLflowUnreachable: MLflow or its artifact store cannot be reached.
    """
    try:
        with translate_mlflow_errors():
            return Path(
                mlflow.artifacts.download_artifacts(run_id=version.run_id, artifact_path=name, dst_path=str(folder))
            )
    except MLflowUnreachable:
        raise
    except (UserError, OSError) as error:
        raise UserError(
            f"champion {version.name} version {version.number}: MLflow run {version.run_id} has no {name} ({error});"
            " remove the alias, or restore mlruns/"
        ) from error


@translate_mlflow_errors()
def set_description(version: ModelVersion, card: str) -> None:
    """Set a version's description to its model card, truncated at a line if the store refuses the full text."""
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
    """Set aliases and tags to the state of a ledger entry. Idempotent, so it also completes a killed attempt.

    The champion alias moves first and in one step, so it always exists. Versions that were deleted since are skipped.
    """
    client, name = MlflowClient(), str(entry["model"])
    existing, current = list_versions(name), get_aliases(name)
    for alias in ALIAS_NAMES:
        target = entry["aliases"].get(alias)
        if target in existing and current.get(alias) != target:
            client.set_registered_model_alias(name, alias, target)
        elif target is None and alias in current:
            client.delete_registered_model_alias(name, alias)
    number = str(entry["version"])
    for revoked in entry["revoked"]:
        if revoked["version"] in existing:
            client.set_model_version_tag(name, revoked["version"], ROLLED_BACK_TAG, str(entry["reason"]))
    if number not in existing:
        return
    tags = {
        f"{GATE_TAG_PREFIX}{c['name']}": f"{c['status']}: {c['requirement']}: {c['details']}" for c in entry["checks"]
    }
    if tags:
        for stale in client.get_model_version(name, number).tags.keys() - tags.keys():
            if stale.startswith(GATE_TAG_PREFIX):
                client.delete_model_version_tag(name, number, stale)
    if entry["action"] == "forced":
        tags[FORCED_TAG] = str(entry["reason"])
    tags[f"{LEDGER_TAG_PREFIX}{entry['number']:05d}"] = json.dumps(dict(entry), ensure_ascii=False)
    for tag, text in tags.items():
        client.set_model_version_tag(name, number, tag, text)
