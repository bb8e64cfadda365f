"""SIGTERM and Ctrl-C during training: the first asks it to stop after a checkpoint, the second stops it at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from fadeformer.errors import StageInterrupted

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def catch_stop_signals() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the number of the signal that asked to stop, or 0.

    Raises:
        Interrupted: A second signal was received.
    """
    received: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            name = signal.Signals(received[0]).name
            raise StageInterrupted(
                f"stopped by {name} at once; run again to go on from the last checkpoint", received[0]
            )

    before = {number: signal.signal(number, ask) for number in STOP_SIGNALS}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
