"""Log a training to MLflow through a local journal: each epoch is written to `history.csv`, then to the MLflow run.

Training continues while MLflow is unreachable; missing epochs are logged later. `run.json` has the run's parameters and
tags, and its id once it exists. If the process is killed right after creating a run, the run is found by its tag.
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

TIMEOUT = 5  # seconds
RETRY_INTERVAL = 60  # seconds


class Journal:
    """Epoch history of one training, on disk and in MLflow.

    Args:
        folder: The folder of this training.
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
        self._logged: set[int] | None = None  # epochs that MLflow has; None if unknown
        self._next_try: float | None = None  # set after a failed one

    def start(self, params: Mapping[str, Any], meta: ArrayMetadata) -> None:
        """Store the run's parameters, tags and data set; a resumed training keeps those it started with."""
        if not self._run:
            self._run = {
                "identity": uuid.uuid4().hex, "time": time.time_ns() // 10**6, "run_id": None,
                "params": dict(params), "tags": runs.training_tags(meta),
                "dataset": {key: meta.dataset[key] for key in ("name", "file", "sha256")},
            }  # fmt: skip
            write_json(self._run_file, self._run)

    def add_epoch(self, metrics: Mapping[str, Any]) -> None:
        """Append an epoch's metrics to the history; an epoch that it already has is not overwritten."""
        if metrics["epoch"] not in [row["epoch"] for row in self._rows]:
            self._rows.append({**metrics, "time": time.time_ns() // 10**6})
            with atomic_write(self._history_file) as path:
                pd.DataFrame(self._rows).to_csv(path, index=False)

    def flush(self) -> None:
        """Log missing epochs to MLflow; if it cannot be reached, print a message and retry after `RETRY_INTERVAL`.

        Raises:
            UserError: The run or its experiment was deleted, or the run is in another store.
        """
        if self._next_try is not None and time.monotonic() < self._next_try:
            return
        try:
            self._sync()
        except store.MLflowUnreachable as error:
            if self._next_try is None:
                print(
                    f"MLflow at {locations.display_address()} cannot be reached: training continues, and its metrics"
                    f" are stored in {self._history_file} and logged later ({error.reason})"
                )
            self._next_try = time.monotonic() + RETRY_INTERVAL
        else:
            if self._next_try is not None:
                print(
                    f"MLflow at {locations.display_address()} can be reached again and has all {len(self._rows)} epochs"
                )
            self._next_try = None

    def finalize(self) -> str:
        """Log everything that is missing and return the run's id.

        Raises:
            TransientError: MLflow cannot be reached.
            UserError: As in `flush`.
        """
        try:
            self._sync()
        except store.MLflowUnreachable as error:
            raise TransientError(
                f"MLflow at {locations.display_address()} cannot be reached ({error.reason}); the training is finished"
                f" and stored in {self._history_file.parent}: {error.remedy}, then run again; no epoch is trained again"
            ) from error
        return str(self._run["run_id"])

    def close(self, status: Literal["FAILED", "KILLED"]) -> None:
        """Log missing epochs and set the run's status; errors of MLflow are printed, not raised."""
        if not self._run:
            return
        try:
            self._sync()
            runs.set_status(self._run["run_id"], status)
        except UserError as error:
            print(f"MLflow at {locations.display_address()} does not show the status {status}: {error}")

    def _sync(self) -> None:
        store.check_reachable(TIMEOUT)
        logged, self._logged = self._logged, None  # unknown until all requests succeeded: a failed one may have arrived
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
            f"restore it (`mlflow runs restore --run-id {run_id}`), set MLFLOW_TRACKING_URI as before, or remove"
            f" {self._run_file} to create a new run for this training",
        )
        if logged is None:
            runs.log_provenance(run_id, self._run["params"], self._run["tags"], self._run["dataset"])
            runs.set_status(run_id, "RUNNING")
            logged = runs.logged_epochs(run_id)
        missing = [row for row in self._rows if row["epoch"] not in logged]
        runs.log_epochs(run_id, missing)
        self._logged = logged | {row["epoch"] for row in missing}
