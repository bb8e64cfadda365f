"""MLflow's model registry: versions and the aliases `champion` and `challenger`."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from fadeformer import predictions
from fadeformer.errors import UserError
from fadeformer.gate import Decision
from fadeformer.predictions import Predictions

CHAMPION = "champion"
CHALLENGER = "challenger"
CELL = " | &emsp;"  # between cells of a table: MLflow's page sets them edge to edge


@dataclass(frozen=True)
class Version:
    """A registered version and the run in which it was trained."""

    name: str
    number: str
    run_id: str


def champion(name: str) -> Version | None:
    """The version of a registered model under the alias `champion`, if there is one."""
    client = MlflowClient()
    number = client.get_registered_model(name).aliases.get(CHAMPION)
    return None if number is None else Version(name, str(number), client.get_model_version(name, str(number)).run_id)


def register(name: str, run_id: str, model_id: str) -> Version:
    """Registers a package of a run (`pipelines.packaged`) as a new version, or finds the version that it already is."""
    client = MlflowClient()
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    source = f"models:/{model_id}"
    for known in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        if known.source == source:
            return Version(name, str(known.version), run_id)
    made = client.create_model_version(name, source, run_id, model_id=model_id)
    return Version(name, str(made.version), run_id)


def test_predictions(version: Version) -> Predictions:
    """What a version predicted on its test images.

    Raises:
        UserError: its run does not hold them.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = mlflow.artifacts.download_artifacts(
                run_id=version.run_id, artifact_path="predictions.parquet", dst_path=folder
            )
        except (MlflowException, OSError) as error:
            raise UserError(
                f"champion {version.name} version {version.number}: MLflow run {version.run_id} has no"
                f" predictions.parquet ({error}); remove the alias, or restore mlruns/"
            ) from error
        return predictions.read(Path(path)).of("test")


def place(version: Version, decision: Decision, card: str) -> list[str]:
    """Gives a version the alias it earned, the decision as tags, the card as description; returns all its aliases.

    A champion that is judged again and refused keeps its alias until another one takes it: none is demoted silently.
    """
    client = MlflowClient()
    client.update_model_version(version.name, version.number, re.sub(r" \| (?!---)", CELL, card))
    tags = {f"gate.{r.name}": f"{'passed' if r.passed else 'failed'}: {r.rule}: {r.figures}" for r in decision.rules}
    for stale in client.get_model_version(version.name, version.number).tags.keys() - tags.keys():
        if stale.startswith("gate."):
            client.delete_model_version_tag(version.name, version.number, stale)
    for name, value in tags.items():
        client.set_model_version_tag(version.name, version.number, name, value)
    if decision.promoted:
        client.set_registered_model_alias(version.name, CHAMPION, version.number)
        if CHALLENGER in client.get_model_version(version.name, version.number).aliases:
            client.delete_registered_model_alias(version.name, CHALLENGER)
    elif champion(version.name) != version:
        client.set_registered_model_alias(version.name, CHALLENGER, version.number)
    return list(client.get_model_version(version.name, version.number).aliases)
