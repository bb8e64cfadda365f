"""Prefect flows of the deployments: the pipeline, its last stages alone, a grid of pipelines, and the drift check.

In a workspace (`pipelines.orchestration.workspace`) the parameters and results of a run become a DVC experiment; in the
user's own folder params.yaml is restored after the run.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock
from prefect import State, flow
from prefect.artifacts import create_table_artifact
from prefect.concurrency.sync import concurrency
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from pydantic import Field

from fadeformer.config import schema
from fadeformer.errors import UserError
from pipelines import paths
from pipelines.config import check, overrides
from pipelines.environment import configure_environment
from pipelines.orchestration import artifacts, workspace
from pipelines.orchestration.dvc_task import pull_results, push_experiment, reproduce
from pipelines.stages import STAGES

PROMOTION_LIMIT = "fadeformer-promote"  # Prefect concurrency limit that serializes promotions on all machines
configure_environment()  # Prefect's workers load this file as the entry point of a run
# Prefect makes a pydantic model of a flow's arguments; `validate` is a section and also a method of such models.
warnings.filterwarnings("ignore", 'Field name "validate"', UserWarning)
# Defaults and comments for the forms in Prefect's UI. Prefect builds the parameter schema from the flow's signature,
# when it loads this file to deploy or to run it, so params.yaml has to be read at import.
CURRENT_PARAMS = overrides.read_current_params(Path(__file__).parents[2] / paths.PARAMS)
DatasetOverrides: Any = overrides.optional_section(schema.DatasetParams, "dataset", CURRENT_PARAMS)
SplitOverrides: Any = overrides.optional_section(schema.SplitParams, "split", CURRENT_PARAMS)
ValidateOverrides: Any = overrides.optional_section(schema.ValidateParams, "validate", CURRENT_PARAMS)
PreprocessOverrides: Any = overrides.optional_section(schema.PreprocessParams, "preprocess", CURRENT_PARAMS)
ModelOverrides: Any = overrides.optional_section(schema.ModelParams, "model", CURRENT_PARAMS)
AugmentOverrides: Any = overrides.optional_section(schema.AugmentParams, "augment", CURRENT_PARAMS)
TrainOverrides: Any = overrides.optional_section(schema.TrainParams, "train", CURRENT_PARAMS)
EvaluateOverrides: Any = overrides.optional_section(schema.EvaluateParams, "evaluate", CURRENT_PARAMS)
PromoteOverrides: Any = overrides.optional_section(schema.PromoteParams, "promote", CURRENT_PARAMS)
Hours = Annotated[float, Field(gt=0)]


@flow(name="pipeline", persist_result=False, log_prints=True)
def pipeline(
    seed: Annotated[int, Field(ge=0)] = CURRENT_PARAMS.values["seed"],
    dataset: DatasetOverrides = DatasetOverrides(),
    split: SplitOverrides = SplitOverrides(),
    validate: ValidateOverrides = ValidateOverrides(),
    preprocess: PreprocessOverrides = PreprocessOverrides(),
    model: ModelOverrides = ModelOverrides(),
    augment: AugmentOverrides = AugmentOverrides(),
    train: TrainOverrides = TrainOverrides(),
    evaluate: EvaluateOverrides = EvaluateOverrides(),
    promote: PromoteOverrides = PromoteOverrides(),
    stage_timeout_hours: Hours | None = None,
) -> None:
    """The pipeline from download to promote; each argument overrides keys of its section of params.yaml for this run.

    Args:
        seed: Training seed.
        dataset: Data set and its source.
        split: Training, validation and test split.
        validate: Limits of data validation.
        preprocess: Image size and arrays that training reads.
        model: Architecture and pretrained weights.
        augment: Data augmentation.
        train: Optimizer, schedule and training loop.
        evaluate: Predictions, metrics and figures.
        promote: Promotion gate.
        stage_timeout_hours: Time limit of a stage, which then stops with a checkpoint; no limit by default.
    """
    sections = {
        "dataset": dataset, "split": split, "validate": validate, "preprocess": preprocess, "model": model,
        "augment": augment, "train": train, "evaluate": evaluate, "promote": promote,
    }  # fmt: skip
    changes: dict[str, Any] = {name: overrides.explicit_values(section) for name, section in sections.items()}
    _run_stages(STAGES, {"seed": seed, **changes}, stage_timeout_hours)


@flow(name="evaluation", persist_result=False, log_prints=True)
def evaluation(
    experiment: str, evaluate: EvaluateOverrides = EvaluateOverrides(), stage_timeout_hours: Hours | None = None
) -> None:
    """Evaluate the model of an earlier run again and decide on its promotion.

    Args:
        experiment: DVC experiment or commit with the model.
        evaluate: Predictions, metrics and figures.
        stage_timeout_hours: Time limit of a stage.
    """
    changes = {"evaluate": overrides.explicit_values(evaluate)}
    _run_stages(("evaluate", "promote"), changes, stage_timeout_hours, experiment)


@flow(name="promotion", persist_result=False, log_prints=True)
def promotion(
    experiment: str, promote: PromoteOverrides = PromoteOverrides(), stage_timeout_hours: Hours | None = None
) -> None:
    """Run the promotion gate again for a model that an earlier run has evaluated.

    Args:
        experiment: DVC experiment or commit with the model.
        promote: Promotion gate.
        stage_timeout_hours: Time limit of a stage.
    """
    _run_stages(("promote",), {"promote": overrides.explicit_values(promote)}, stage_timeout_hours, experiment)


@flow(name="grid", persist_result=False, log_prints=True)
def grid(
    vary: dict[str, list[Any]], fixed: dict[str, Any] | None = None, deployment: str = "pipeline/train"
) -> State[None]:
    """Grid search: run the pipeline for each combination of values, in parallel on the workers; then show a table.

    Args:
        vary: Keys of params.yaml and their values, such as {"train.learning_rate": [0.001, 0.0003], "seed": [1, 2]}.
        fixed: Keys that are the same in every run, such as {"train.epochs": 30}.
        deployment: Name of the deployment to run.
    """
    from pipelines.experiments import engine, runners  # they import DVC and MLflow, which other flows do not need

    rows = [dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())]
    if not rows:
        raise UserError("vary has no values; give a list for each key, such as {'seed': [1, 2, 3]}")
    combinations = {", ".join(f"{key}={value}" for key, value in row.items()): row for row in rows}
    runs = {
        name: engine.PipelineRun(name, overrides.unflatten({**(fixed or {}), **row}), "")
        for name, row in combinations.items()
    }
    plan = engine.ListPlan(runs)
    runner = runners.PrefectRunner(deployment, lambda run: dict(run.params), str(flow_run.id))
    engine.execute(plan, runner, max_parallel=len(runs))
    table = []
    for name, row in combinations.items():
        state = plan.statuses[name].state
        summary = artifacts.read_run_summary(runner.flow_run_ids[name]) if state == "Completed" else {}
        table.append({**row, "state": state, **summary})
    create_table_artifact(table, key="grid", description=f"{len(table)} runs of {deployment}")
    failed = [row for row in table if row["state"] != "Completed"]
    if failed:
        return Failed(message=f"{len(failed)} of {len(table)} runs did not complete")
    return Completed(message=f"{len(table)} runs")


@flow(name="experiment", persist_result=False, log_prints=True)
def experiment(
    values: dict[str, Any], last_stage: str = "evaluate", trial: str = "", stage_timeout_hours: Hours | None = None
) -> None:
    """One run of a grid or sweep, without promotion: `fadeformer tables` and `fadeformer sweep` start these runs.

    Args:
        values: All of params.yaml, by section.
        last_stage: Last stage to run; sweep trials stop after train, so that test data cannot influence the search.
        trial: MLflow run of the sweep and number of the trial.
        stage_timeout_hours: Time limit of a stage.
    """
    if trial:
        from pipelines.tracking.runs import TRIAL_VARIABLE  # imports MLflow, which takes seconds

        os.environ[TRIAL_VARIABLE] = trial
    _run_stages(STAGES[: STAGES.index(last_stage) + 1], values, stage_timeout_hours)


@flow(name="drift", persist_result=False, log_prints=True)
def drift(
    images: list[str], model: str, out: str = "reports/drift", max_images: int = 5000, groups: str | None = None,
    independent: bool = False,
) -> State[None]:  # fmt: skip
    """Compare new images with the reference data of a model; the run fails if they have drifted.

    A run that could not assess everything completes under the name `Not assessed`.

    Args:
        images: Files, folders, zip archives or patterns.
        model: Model, such as models:/NAME@champion.
        out: Output folder.
        max_images: Number of images to sample if there are more.
        groups: CSV file with the columns path and group (patient, lesion or slide) of each image.
        independent: Whether each image is of another patient.
    """
    from pipelines.orchestration import drift_check  # imports torch, which other flows do not need

    table = Path(groups) if groups else None
    result = drift_check.check_drift(images, model, Path(out), max_images, table, independent=independent)
    print(result.summary)
    if result.status == drift_check.EXIT_DRIFT:
        return Failed(message=result.summary)
    name = "Not assessed" if result.status == drift_check.EXIT_NOT_ASSESSED else None
    return Completed(name=name, message=result.summary)


def _run_stages(
    stages: Sequence[str], changes: Mapping[str, Any], timeout_hours: float | None, revision: str | None = None
) -> None:
    """Bring stages up to date and publish their results as artifacts."""
    with _prepared_folder(changes, revision, stages if stages[-1] != STAGES[-1] else ()):
        for stage in stages:
            # One promotion at a time on all machines; in the user's own folder a file lock is enough.
            is_exclusive = stage == "promote" and workspace.is_workspace()
            with concurrency(PROMOTION_LIMIT, strict=True) if is_exclusive else nullcontext():
                reproduce.with_options(timeout_seconds=timeout_hours and timeout_hours * 3600)(stage)
        if "evaluate" in stages:
            artifacts.publish_metrics()
        if "promote" in stages:
            artifacts.publish_decision()


@contextmanager
def _prepared_folder(changes: Mapping[str, Any], revision: str | None, stages: Sequence[str]) -> Iterator[None]:
    """Prepare the current folder for a run with overrides of params.yaml; push a workspace as an experiment on success.

    Args:
        changes: Overrides by section.
        revision: Experiment or commit to start from.
        stages: Stages whose results to push; empty for all.
    """
    if not workspace.is_workspace():
        if revision is not None:
            raise UserError(
                f"{revision} can be evaluated only in a workspace; in this folder run `dvc exp apply {revision}`,"
                " then `dvc repro`"
            )
        # The lock: one run at a time in a folder.
        with FileLock(".prefect/pipeline.lock"), overrides.temporary_overrides(paths.PARAMS, changes):
            check.repair_dvc_files()
            yield
        return
    with workspace.exclusive_lock():
        if revision is not None:
            workspace.restore_revision(revision)
        overrides.apply_overrides(paths.PARAMS, changes)
        pull_results()
        yield
        name = push_experiment(f"{flow_run.name}-{str(flow_run.id)[:8]}", stages)
        artifacts.publish_experiment(name)
        artifacts.publish_links()
        workspace.FINISHED_MARKER.touch()
