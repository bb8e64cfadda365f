"""Log a training to MLflow: each epoch goes to `history.csv` first, and from there to the training's one MLflow run.

Training continues while MLflow is unreachable, and what the run lacks is logged later. `run.json` keeps what the run
starts with, and then its id; a run that was created just before a kill is found again by its tag.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from fadeformer.data.arrays import ArrayMetadata
from fadeformer.errors import TransientError, UserError
from fadeformer.io.atomic import atomic_write, read_json, write_json
from pipelines import paths
from pipelines.tracking import locations, runs, store

TIMEOUT = 5  # seconds for MLflow to answer
RETRY_INTERVAL = 60  # seconds from a failed try to the next


class Journal:
    """History of one training on disk and in MLflow.

    Args:
        folder: of this training alone.
    """

    def __init__(self, folder: Path) -> None:
        self._history_file, self._run_file = folder / paths.HISTORY.name, folder / paths.RUN.name
        table = (
            pd.read_csv(self._history_file, float_precision="round_trip")
            if self._history_file.is_file()
            else pd.DataFrame()
        )
        self._rows: list[Any] = table.to_dict("records")
        self._run = read_json(self._run_file) if self._run_file.is_file() else {}
        self._logged: set[int] | None = None  # epochs that MLflow has; None while that is not known for sure
        self._next_try: float | None = None  # after a failed one

    def start(self, params: Mapping[str, Any], meta: ArrayMetadata) -> None:
        """Keep a run's parameters, tags and data set; a resumed training keeps those it started with."""
        if not self._run:
            self._run = {
                "identity": uuid.uuid4().hex, "time": time.time_ns() // 10**6, "run_id": None,
                "params": dict(params), "tags": runs.training_tags(meta),
                "dataset": {key: meta.dataset[key] for key in ("name", "file", "sha256")},
            }  # fmt: skip
            write_json(self._run_file, self._run)

    def add_epoch(self, measured: Mapping[str, Any]) -> None:
        """Append an epoch's metrics to the history; an epoch that is already there stays as it was first measured."""
        if measured["epoch"] not in [row["epoch"] for row in self._rows]:
            self._rows.append({**measured, "time": time.time_ns() // 10**6})
            with atomic_write(self._history_file) as path:
                pd.DataFrame(self._rows).to_csv(path, index=False)

    def flush(self) -> None:
        """Log to MLflow what its run lacks. If MLflow cannot be reached, print that and try again after a pause.

        Raises:
            UserError: the run or its experiment was deleted, or the run is in another store than this.
        """
        if self._next_try is not None and time.monotonic() < self._next_try:
            return
        try:
            self._sync()
        except store.MLflowUnreachable as error:
            if self._next_try is None:
                print(
                    f"MLflow at {locations.display_address()} cannot be reached: training goes on, and its metrics are kept in"
                    f" {self._history_file} and logged later ({error.reason})"
                )
            self._next_try = time.monotonic() + RETRY_INTERVAL
        else:
            if self._next_try is not None:
                print(f"MLflow at {locations.display_address()} is reached again and has all {len(self._rows)} epochs")
            self._next_try = None

    def finalize(self) -> str:
        """Log everything that is left, and return the run's id.

        Raises:
            PassingError: MLflow cannot be reached.
            UserError: as by `deliver`.
        """
        try:
            self._sync()
        except store.MLflowUnreachable as error:
            raise TransientError(
                f"MLflow at {locations.display_address()} cannot be reached ({error.reason}); the training is finished and kept in"
                f" {self._history_file.parent}: {error.remedy}, then run again; nothing is trained again"
            ) from error
        return str(self._run["run_id"])

    def close(self, status: Literal["FAILED", "KILLED"]) -> None:
        """Log what is left and set the run's status; if MLflow prevents that, it is printed and not raised."""
        if not self._run:
            return
        try:
            self._sync()
            runs.set_status(self._run["run_id"], status)
        except UserError as error:
            print(f"MLflow at {locations.display_address()} does not show that this training is {status}: {error}")

    def _sync(self) -> None:
        store.check_reachable(TIMEOUT)
        logged, self._logged = self._logged, None  # until all went well: a request that failed may have arrived
        if logged is None:
            experiment = store.connect()
            if self._run["run_id"] is None:
                run_id = runs.find_or_create_run(
                    experiment, self._run["identity"], self._run["time"], self._run["tags"]
                )
                self._run["run_id"] = run_id
                write_json(self._run_file, self._run)
        run_id = self._run["run_id"]
        runs.check_run_exists(
            run_id,
            f"restore it (`mlflow runs restore --run-id {run_id}`), set MLFLOW_TRACKING_URI as it was, or remove"
            f" {self._run_file} to have a new run for this training",
        )
        if logged is None:
            runs.log_provenance(run_id, self._run["params"], self._run["tags"], self._run["dataset"])
            runs.set_status(run_id, "RUNNING")
            logged = runs.logged_epochs(run_id)
        left = [row for row in self._rows if row["epoch"] not in logged]
        runs.log_epochs(run_id, left)
        self._logged = logged | {row["epoch"] for row in left}
