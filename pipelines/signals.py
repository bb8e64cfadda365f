"""SIGTERM and Ctrl-C while a network is trained: it is asked to stop, and left if it takes too long."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from fadeformer.errors import Interrupted

GRACE = 7.0  # seconds; ten are what those who send the signal may wait, and leaving takes some
ASKING = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def asked_to_leave() -> Iterator[Callable[[], int]]:
    """Gives a function that returns the number of the signal that asked to stop, or 0.

    A second signal, or `GRACE` seconds, leave at once: what is kept is then the last checkpoint. In another thread than
    the main one, where Python lets nobody handle signals, none is noticed.

    Raises:
        Interrupted: the block did not end in time.
    """
    received: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            leave(number, frame)
        signal.setitimer(signal.ITIMER_REAL, GRACE)

    def leave(number: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        name = signal.Signals(received[0]).name
        raise Interrupted(f"stopped by {name} at once; run again to go on from the last checkpoint", received[0])

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    before = {number: signal.signal(number, ask) for number in ASKING}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, leave)
    try:
        yield lambda: received[0] if received else 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
