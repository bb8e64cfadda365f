"""Handle SIGTERM and Ctrl-C during training: the first saves a checkpoint and stops, the second stops immediately."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from fadeformer.errors import StageInterrupted

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def catch_stop_signals() -> Iterator[Callable[[], int]]:
    """Install handlers and yield a function that returns the number of the received signal, or 0.

    Raises:
        StageInterrupted: A second signal was received.
    """
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            name = signal.Signals(received[0]).name
            raise StageInterrupted(
                f"stopped by {name} at once; run again to resume from the last checkpoint", received[0]
            )

    previous = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
