"""The flows of deployments: the whole pipeline, its last stages again, a grid of pipelines, and the watch for drift.

In a workspace (`pipelines.orchestration.workspace`) the parameters and results of a run become a DVC experiment; in the user's own
folder params.yaml is restored after the run.
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
from pipelines.orchestration import artifacts, workspace
from pipelines.orchestration.dvc_task import pull_results, push_experiment, reproduce
from pipelines.stages import STAGES

PROMOTION_LIMIT = "fadeformer-promote"  # Prefect's concurrency limit that keeps promotions on several machines apart
# Prefect makes a model of a flow's arguments, of which one has the name of a section, and of a method of models.
warnings.filterwarnings("ignore", 'Field name "validate"', UserWarning)
CURRENT_PARAMS = overrides.read_current_params(
    Path(__file__).parents[2] / paths.PARAMS
)  # defaults of the forms in Prefect's UI
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
    hours: Hours | None = None,
) -> None:
    """From download to promote; each argument overrides keys of its section of params.yaml for this run.

    Args:
        seed: of training.
        dataset: which images.
        split: training, validation and test images.
        validate: limits of data validation.
        preprocess: arrays that training reads.
        model: the network.
        augment: random changes to each training image.
        train: how to train.
        evaluate: predictions, numbers, figures.
        promote: the registry gate.
        hours: time limit of a stage, which then stops with a checkpoint; no limit if not given.
    """
    sections = {
        "dataset": dataset, "split": split, "validate": validate, "preprocess": preprocess, "model": model,
        "augment": augment, "train": train, "evaluate": evaluate, "promote": promote,
    }  # fmt: skip
    changes: dict[str, Any] = {name: overrides.explicit_values(section) for name, section in sections.items()}
    _run_stages(STAGES, {"seed": seed, **changes}, hours)


@flow(name="evaluation", persist_result=False, log_prints=True)
def evaluation(of: str, evaluate: EvaluateOverrides = EvaluateOverrides(), hours: Hours | None = None) -> None:
    """Evaluate a model of an earlier run again, and decide about its promotion.

    Args:
        of: DVC experiment or commit with the model.
        evaluate: overrides of predictions, numbers, figures.
        hours: time limit of a stage.
    """
    _run_stages(("evaluate", "promote"), {"evaluate": overrides.explicit_values(evaluate)}, hours, of)


@flow(name="promotion", persist_result=False, log_prints=True)
def promotion(of: str, promote: PromoteOverrides = PromoteOverrides(), hours: Hours | None = None) -> None:
    """Decide again about the promotion of a model that an earlier run has evaluated.

    Args:
        of: DVC experiment or commit with the model.
        promote: overrides of the registry gate.
        hours: time limit of a stage.
    """
    _run_stages(("promote",), {"promote": overrides.explicit_values(promote)}, hours, of)


@flow(name="grid", persist_result=False, log_prints=True)
def grid(
    vary: dict[str, list[Any]], fixed: dict[str, Any] | None = None, deployment: str = "pipeline/train"
) -> State[None]:
    """A run of the whole pipeline for each combination of some values, side by side on the workers; then a table.

    Args:
        vary: keys of params.yaml and their values, such as {"train.learning_rate": [0.001, 0.0003], "seed": [1, 2]}.
        fixed: keys that are the same in every run, such as {"train.epochs": 30}.
        deployment: which is run.
    """
    from pipelines.experiments import engine, runners  # with DVC and MLflow, which no other flow loads

    rows = [dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())]
    if not rows:
        raise UserError("vary names no values; a grid is such as {'seed': [1, 2, 3]}")
    named = {", ".join(f"{key}={value}" for key, value in row.items()): row for row in rows}
    plan = engine.ListPlan(
        {
            name: engine.PipelineRun(name, overrides.unflatten({**(fixed or {}), **row}), "")
            for name, row in named.items()
        }
    )
    runner = runners.PrefectRunner(deployment, lambda run: dict(run.params), str(flow_run.id))
    engine.execute(plan, runner, max_parallel=len(named))
    table = []
    for name, row in named.items():
        state = plan.statuses[name].state
        table.append(
            {
                **row,
                "state": state,
                **(artifacts.read_run_summary(runner.flow_run_ids[name]) if state == "Completed" else {}),
            }
        )
    create_table_artifact(table, key="grid", description=f"{len(table)} runs of {deployment}")
    failed = [row for row in table if row["state"] != "Completed"]
    if failed:
        return Failed(message=f"{len(failed)} of {len(table)} runs did not end Completed")
    return Completed(message=f"{len(table)} runs")


@flow(name="experiment", persist_result=False, log_prints=True)
def experiment(values: dict[str, Any], until: str = "evaluate", trial: str = "", hours: Hours | None = None) -> None:
    """One run of a grid or a sweep, which no model is registered of: `fadeformer tables` and `sweep` start them.

    Args:
        values: of params.yaml, by section.
        until: the last stage; a trial ends with train, so that no image of test judges it.
        trial: MLflow run of a sweep and number of the trial.
        hours: that a stage may take.
    """
    if trial:
        from pipelines.tracking.runs import TRIAL_VARIABLE  # takes a while to import

        os.environ[TRIAL_VARIABLE] = trial
    _run_stages(STAGES[: STAGES.index(until) + 1], values, hours)


@flow(name="drift", persist_result=False, log_prints=True)
def drift(images: list[str], model: str, out: str = "reports/drift", most: int = 5000) -> State[None]:
    """Whether new images are like those that a model was made with; the run fails where they are not.

    Args:
        images: files, folders, zips or patterns.
        model: such as models:/NAME@champion.
        out: folder for the page.
        most: images that are looked at, drawn from more.
    """
    from pipelines.orchestration.drift_check import check_drift  # torch, which the pipeline's own flow does without

    ended = check_drift(images, model, Path(out), most)
    print(ended.summary)
    return Failed(message=ended.summary) if ended.status else Completed(message=ended.summary)


def _run_stages(stages: Sequence[str], changes: Mapping[str, Any], hours: float | None, of: str | None = None) -> None:
    """Bring stages up to date and show their results."""
    with _prepared_folder(changes, of, stages if stages[-1] != STAGES[-1] else ()):
        for stage in stages:
            # One promotion at a time, on all machines; in the user's own folder a file lock is enough.
            alone = stage == "promote" and workspace.is_workspace()
            with concurrency(PROMOTION_LIMIT, strict=True) if alone else nullcontext():
                reproduce.with_options(timeout_seconds=hours and hours * 3600)(stage)
        if "evaluate" in stages:
            artifacts.publish_metrics()
        if "promote" in stages:
            artifacts.publish_decision()


@contextmanager
def _prepared_folder(changes: Mapping[str, Any], of: str | None, stages: Sequence[str]) -> Iterator[None]:
    """Prepare the current folder for a run, params.yaml changed; save a workspace as an experiment at the end.

    Args:
        changes: by section.
        of: experiment or commit to start from.
        stages: whose results there are at the end; empty for all.
    """
    if not workspace.is_workspace():
        if of is not None:
            raise UserError(f"{of} is evaluated in a workspace; here use `dvc exp apply {of}` and `dvc repro`")
        with (
            FileLock(".prefect/pipeline.lock"),
            overrides.temporary_overrides(paths.PARAMS, changes),
        ):  # one run in a folder
            check.repair_dvc_files()
            yield
        return
    with workspace.exclusive_lock():
        if of is not None:
            workspace.restore_revision(of)
        overrides.apply_overrides(paths.PARAMS, changes)
        pull_results()
        yield
        name = push_experiment(f"{flow_run.name}-{str(flow_run.id)[:8]}", stages)
        artifacts.publish_experiment(name)
        artifacts.publish_links()
        workspace.FINISHED_MARKER.touch()
