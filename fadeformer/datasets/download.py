"""Remote files brought into a folder, several at once; see `transfer` for how one of them comes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout
from tqdm import tqdm

from fadeformer.datasets.transfer import Brought, NotThere, Patience, Remote, Stopped, Transfer
from fadeformer.errors import PassingError
from fadeformer.files import check_room

__all__ = ["Brought", "NotThere", "Patience", "Remote", "bring"]

PATIENCE = Patience()
GRACE = 2.0  # seconds for threads to end; one that waits for an answer ends later by itself, and writes nothing

T = TypeVar("T")


def bring(
    files: Sequence[Remote], folder: Path, *, remedy: str, parallel: int = 4, patience: Patience = PATIENCE
) -> dict[str, Brought]:
    """Brings files into `folder`; one that is there already and passes its checks is not fetched again.

    Args:
        files: what to bring, each under a name of its own.
        folder: where they go, and where what has arrived of them waits for the rest.
        remedy: what the user can do if a file cannot be had: the end of a message.
        parallel: the most files that are fetched at once.
        patience: how long to go on when a server fails.

    Returns:
        The files by name.

    Raises:
        UserError: a file cannot be had or is not the right one, the disk is too small, or another process is at it.
            What has arrived by then is kept, and taken up by the next call. `NotThere` where a server has no such file.
    """
    names = [file.name for file in files]
    if len(set(names)) < len(names) or any(name in ("", "..") or Path(name).name != name for name in names):
        raise ValueError("each file needs a name of its own, without a folder")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.parent / f".{folder.name}.lock", timeout=0):  # two writers of one part would mix it up
            return _bring([Transfer(file, folder, remedy, patience) for file in files], folder, parallel)
    except Timeout as error:
        raise PassingError(
            f"{folder}: another process is downloading into this folder; wait until it has ended, then run again"
        ) from error


def _bring(transfers: Sequence[Transfer], folder: Path, parallel: int) -> dict[str, Brought]:
    found = _side_by_side(transfers, Transfer.find, parallel)
    here = {file.path.name: file for file in found if file is not None}
    missing = [transfer for transfer in transfers if transfer.file.name not in here]
    if len(missing) > 1:  # there must be room for all of them; one alone is measured when its answer comes
        _side_by_side(missing, Transfer.ask_length, parallel)
    needed = sum(max(0, transfer.length - transfer.part.size) for transfer in missing if transfer.length)
    check_room(folder, needed, "the download")
    if missing:
        here |= {file.path.name: file for file in _fetch(missing, parallel)}
    return {transfer.file.name: here[transfer.file.name] for transfer in transfers}


def _fetch(transfers: Sequence[Transfer], parallel: int) -> list[Brought]:
    """Fetches files under one progress bar."""
    name = transfers[0].file.name if len(transfers) == 1 else f"{len(transfers)} files"
    held = sum(transfer.part.size for transfer in transfers)
    lock = threading.Lock()
    with tqdm(total=0, initial=held, desc=name, unit="B", unit_scale=True, disable=None) as bar:

        def show() -> None:
            with lock:
                bar.total = sum(transfer.length or 0 for transfer in transfers)
                bar.update(sum(transfer.part.size for transfer in transfers) - bar.n)

        for transfer in transfers:
            transfer.moved = show
        show()
        return _side_by_side(transfers, Transfer.fetch, parallel)


def _side_by_side(transfers: Sequence[Transfer], work: Callable[[Transfer], T], parallel: int) -> list[T]:
    """Does the same work on each transfer; the first error, or Ctrl-C, stops them all."""
    gate = threading.Semaphore(parallel)
    stop = threading.Event()
    futures: list[Future[T]] = [Future() for _ in transfers]

    def do(transfer: Transfer, future: Future[T]) -> None:
        with gate:
            try:
                if stop.is_set():
                    raise Stopped
                future.set_result(work(transfer))
            except BaseException as error:
                future.set_exception(error)
                stop.set()

    for pair in zip(transfers, futures, strict=True):
        # Daemons, and no executor: when the user has pressed Ctrl-C, Python would wait for one that waits for a server.
        threading.Thread(target=do, args=pair, daemon=True).start()
    try:
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            error = future.exception()
            if error is not None and not isinstance(error, Stopped):
                raise error
    except BaseException:
        stop.set()
        for transfer in transfers:
            transfer.stop()
        wait(futures, timeout=GRACE)
        raise
    return [future.result() for future in futures]
