"""What a training tells MLflow, on disk first: a training goes on without MLflow, and is told there once and in order.

`journal.jsonl` holds a record a line: first the start, then epochs and other numbers, each with the time when it was
written. `delivered.json` holds the run that was made for them, where, and how many of them it has. A kill in between
does no harm: the run is found again by a name that the journal gave it, and MLflow is asked what it has before it is
told more.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fadeformer import lines
from fadeformer.arrays import Meta
from fadeformer.errors import PassingError, UserError
from fadeformer.files import read_json, write_json
from pipelines import places, store, tracking

PATIENCE = 5  # seconds that MLflow may take to answer a training
PAUSE = 60  # seconds from a failed try to the next, in which a training is not held up
LAST_TRIES, LAST_PATIENCE = 3, 20  # once the training is finished, there is time


class Journal:
    """What one training tells MLflow: written to disk first, delivered in order, each once.

    A folder has one Journal at a time.

    Attributes:
        run_id: of its MLflow run, once there is one.
    """

    def __init__(self, folder: Path) -> None:
        """Takes up what a folder holds; the half line of a writer that was killed is dropped.

        Args:
            folder: of this training alone; made if it is not there.

        Raises:
            UserError: the journal is damaged.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._file, self._note = folder / "journal.jsonl", folder / "delivered.json"
        for half in folder.glob(f".{self._note.name}.*"):
            half.unlink()
        self._records = self._read()
        note = read_json(self._note) if self._note.is_file() else {"address": None, "run_id": None, "records": 0}
        self.run_id: str | None = note["run_id"]
        self._address, self._delivered = note["address"], note["records"]
        self._met = False  # whether what MLflow has is known for sure
        self._held: set[tuple[str, int]] = set()  # what it has beyond the delivered records: metric and step
        self._next_try = float("-inf")
        self._lost: int | None = None  # records delivered when MLflow was lost, while it is

    def start(self, params: Mapping[str, Any], meta: Meta) -> None:
        """Begins a journal with a run's parameters, tags and data set; one that was begun stays as it is."""
        if not self._records:
            self._write(
                "start",
                identity=uuid.uuid4().hex,
                params={name: str(value) for name, value in params.items()},
                tags=tracking.describe(meta),
                card={key: meta.dataset[key] for key in ("name", "file", "sha256")},
            )

    def epoch(self, measured: Mapping[str, Any]) -> None:
        """Keeps what an epoch measured, at step `measured["epoch"]`, but for None; an epoch that is there stays."""
        step = int(measured["epoch"])
        if not any(record["kind"] == "epoch" and record["step"] == step for record in self._records):
            values = {name: value for name, value in measured.items() if name != "epoch" and value is not None}
            self._write(
                "epoch", step=step, metrics={tracking.plain(key): float(value) for key, value in values.items()}
            )

    def metrics(self, values: Mapping[str, Any]) -> None:
        """Keeps the finite numbers of a nested dictionary, under dotted names; a name that is there stays."""
        there = {name for record in self._records if record["kind"] == "metrics" for name in record["metrics"]}
        new = {name: value for name, value in tracking.flat(values).items() if name not in there}
        if new:
            self._write("metrics", step=0, metrics=new)

    def deliver(self) -> bool:
        """Sends MLflow what it has not, and tells when MLflow is lost and found again.

        Returns:
            Whether nothing is left. After a failed try the next is made when a pause has passed.

        Raises:
            UserError: the run or its experiment was deleted, is of another MLflow than this, or has other parameters.
        """
        if not self._records or (self._met and self._delivered == len(self._records)):
            return True
        if time.monotonic() < self._next_try:
            return False
        try:
            self._send(PATIENCE)
        except store.Unreachable as error:
            self._next_try = time.monotonic() + PAUSE
            if self._lost is None:
                self._lost = self._delivered
                print(
                    f"MLflow at {places.address()} cannot be reached: training goes on, and what it measures is kept"
                    f" in {self._file} and delivered later ({error.reason})"
                )
            return False
        return True

    def settle(self) -> str:
        """Delivers all that is left, and gives the run's id.

        Raises:
            UserError: MLflow cannot be reached, or as by `deliver`.
        """
        for left in reversed(range(LAST_TRIES)):
            try:
                self._send(LAST_PATIENCE)
                break
            except store.Unreachable as error:
                if not left:
                    raise PassingError(
                        f"MLflow at {places.address()} cannot be reached ({error.reason}); the training is finished"
                        f" and kept in {self._file.parent}: {error.remedy}, then run again; nothing is trained again"
                    ) from error
                time.sleep(1)
        return str(self.run_id)

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """Delivers what it can and sets the run's status; where MLflow prevents it, that is printed, not raised."""
        if not self._records:
            return
        reason = "it cannot be reached"
        try:
            if time.monotonic() >= self._next_try:
                self._send(PATIENCE)
                with store.patience(PATIENCE):
                    tracking.mark(str(self.run_id), status)
                return
        except (UserError, OSError) as error:
            reason = error.reason if isinstance(error, store.Unreachable) else str(error)
        named = f"run {self.run_id}" if self.run_id else "run of this training"
        print(f"MLflow at {places.address()} was not told that the {named} is {status}: {reason}")

    def _send(self, seconds: int) -> None:
        """Delivers all; raises Unreachable, or UserError as `deliver` does."""
        with store.patience(seconds):
            met, self._met = self._met, False  # until all went well, since what was under way may have arrived
            if not met:
                self._meet()
            try:
                if self._delivered < len(self._records):
                    self._send_all()
            except store.Unreachable:
                raise
            except UserError as error:
                self._meet()  # which tells of a deleted run or experiment in plainer words
                raise UserError(
                    f"{error}; delete run {self.run_id} there and {self._note} here, and this training gets a new run"
                ) from error
            self._met = True
        if self._lost is not None:
            print(f"MLflow at {places.address()} is reached again: {self._delivered - self._lost} records delivered")
            self._lost = None

    def _send_all(self) -> None:
        run_id, first = str(self.run_id), self._records[0]
        if self._delivered == 0:
            tracking.log_origin(run_id, first["params"], first["tags"], first["card"])
            self._remember(1)
        points = [
            (name, value, record["time"], record["step"])
            for record in self._records[self._delivered :]
            for name, value in record["metrics"].items()
            if (name, record["step"]) not in self._held
        ]
        tracking.log_points(run_id, points)
        self._remember(len(self._records))

    def _meet(self) -> None:
        """Connects, finds the run or makes it, and asks what it has of what is not known to be delivered."""
        experiment, here = store.connect(), places.address()
        if self.run_id is None:
            start = self._records[0]
            self.run_id = tracking.open_run(experiment, start["identity"], start["time"], start["tags"])
        elif (stage := tracking.stage_of(self.run_id)) == "deleted":
            raise UserError(
                f"MLflow run {self.run_id} of this training was deleted; restore it with `mlflow runs restore --run-id"
                f" {self.run_id}`, or remove {self._note}, and this training gets a new run"
            )
        elif stage is None and here == self._address:
            raise UserError(
                f"MLflow at {here} has no run {self.run_id} of this training any more; restore its store, or remove"
                f" {self._note}, and this training gets a new run"
            )
        elif stage is None:
            raise UserError(
                f"the MLflow run {self.run_id} of this training is at {self._address}, and MLflow is now at {here}; set"
                f" MLFLOW_TRACKING_URI as it was, or remove {self._note}, and this training gets a new run at {here}"
            )
        self._address = here
        self._remember(self._delivered)
        tracking.mark(self.run_id, "RUNNING")
        left = self._records[self._delivered :]
        wanted = {(name, record["step"]) for record in left for name in record.get("metrics", ())}
        self._held = tracking.logged(self.run_id, wanted) if wanted else set()

    def _remember(self, delivered: int) -> None:
        write_json(self._note, {"address": self._address, "run_id": self.run_id, "records": delivered})
        self._delivered = delivered

    def _read(self) -> list[dict[str, Any]]:
        return lines.read(self._file, f"remove {self._file.parent} to train anew", mend=True)

    def _write(self, kind: str, **record: Any) -> None:
        """Appends a record, whole or not at all; raises OSError when the disk is full."""
        record = {"kind": kind, "time": time.time_ns() // 10**6, **record}
        lines.append(self._file, record)
        self._records.append(record)
