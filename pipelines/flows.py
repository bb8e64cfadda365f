"""The whole pipeline as one Prefect flow, for deployments: `dvc repro` by stage, with overrides of params.yaml."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock
from prefect import State, flow, task
from prefect.states import Completed, Failed

from fadeformer import params
from pipelines import overrides, paths
from pipelines.__main__ import STAGES

DatasetOverrides: Any = overrides.partial(params.DatasetParams)
SplitOverrides: Any = overrides.partial(params.SplitParams)
ValidateOverrides: Any = overrides.partial(params.ValidateParams)
PreprocessOverrides: Any = overrides.partial(params.PreprocessParams)
ModelOverrides: Any = overrides.partial(params.ModelParams)
AugmentOverrides: Any = overrides.partial(params.AugmentParams)
TrainOverrides: Any = overrides.partial(params.TrainParams)
EvaluateOverrides: Any = overrides.partial(params.EvaluateParams)
PromoteOverrides: Any = overrides.partial(params.PromoteParams)
GRACE = 15.0  # seconds that a stage may take to end; Prefect's worker gives the whole run 30


@task(task_run_name="{stage}", persist_result=False)
def reproduce(stage: str) -> None:
    """Brings one stage up to date by DVC, its output going to the log; a signal to end goes on to DVC and the stage."""
    command = [sys.executable, "-m", "dvc", "repro", stage]
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "PATH": search},
        start_new_session=True,  # a group of their own, so that a signal reaches DVC, its shell and the stage
    )  # fmt: skip
    try:
        last = _print(process)
    except BaseException:  # Prefect's TerminationSignal when the run is cancelled or its worker stops, or Ctrl-C
        _terminate(process)
        raise
    if process.wait() != 0:
        raise RuntimeError(f"stage {stage} failed: {last}")


def _print(process: subprocess.Popen[str]) -> str:
    """Prints what a process and those below it print, until all have ended, and gives the last line."""
    last = ""
    for line in process.stdout or ():
        if line.strip():
            print(line.rstrip())
            last = line.strip()
    return last


def _terminate(process: subprocess.Popen[str]) -> None:
    """Asks a group of processes to end and waits until they have: training writes a checkpoint first."""

    def signal_all(number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    last_resort = threading.Timer(GRACE, signal_all, [signal.SIGKILL])
    last_resort.start()
    signal_all(signal.SIGTERM)
    _print(process)
    process.wait()
    last_resort.cancel()


@flow(name="pipeline", persist_result=False, log_prints=True)
def pipeline(
    seed: int | None = None,
    dataset: DatasetOverrides | None = None,
    split: SplitOverrides | None = None,
    validate: ValidateOverrides | None = None,
    preprocess: PreprocessOverrides | None = None,
    model: ModelOverrides | None = None,
    augment: AugmentOverrides | None = None,
    train: TrainOverrides | None = None,
    evaluate: EvaluateOverrides | None = None,
    promote: PromoteOverrides | None = None,
) -> None:
    """From download to promote; each argument overrides keys of its section of params.yaml for this run.

    Args:
        seed: of training.
        dataset: which images.
        split: which of them train, choose and judge.
        validate: what the data gate lets pass.
        preprocess: arrays that training reads.
        model: the network.
        augment: random changes to each training image.
        train: how to train.
        evaluate: predictions, numbers, figures.
        promote: the registry gate.
    """
    sections = {
        "dataset": dataset, "split": split, "validate": validate, "preprocess": preprocess, "model": model,
        "augment": augment, "train": train, "evaluate": evaluate, "promote": promote,
    }  # fmt: skip
    changes: dict[str, Any] = {name: overrides.given(section) for name, section in sections.items() if section}
    if seed is not None:
        changes["seed"] = seed
    with FileLock(".prefect/pipeline.lock"), overrides.applied(paths.PARAMS, changes):  # one run in a folder at a time
        for stage in STAGES:
            reproduce(stage)


@flow(name="drift", persist_result=False, log_prints=True)
def drift(images: list[str], model: str, out: str = "reports/drift", most: int = 5000) -> State[None]:
    """Whether new images are like those that a model was made with; the run fails where they are not.

    Args:
        images: files, folders, zips or patterns.
        model: such as models:/NAME@champion.
        out: folder for the page.
        most: images that are looked at, drawn from more.
    """
    from pipelines.commands.drift import compare  # torch, which the pipeline's own flow does without

    ended = compare(images, model, Path(out), most)
    print(ended.summary)
    return Failed(message=ended.summary) if ended.status else Completed(message=ended.summary)
