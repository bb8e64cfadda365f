"""Signals during training: the first requests a stop, the second interrupts immediately."""

import os
import signal
import time

import pytest

from fadeformer.errors import StageInterrupted
from pipelines.stages import signals


@pytest.fixture(autouse=True)
def handlers():
    """Check that the signal handlers are restored."""
    previous = [signal.getsignal(name) for name in signals.STOP_SIGNALS]
    yield
    assert [signal.getsignal(name) for name in signals.STOP_SIGNALS] == previous


@pytest.mark.parametrize("number", signals.STOP_SIGNALS)
def test_first_signal_is_recorded_without_interrupting(number):
    with signals.catch_stop_signals() as pending_signal:
        assert pending_signal() == 0
        os.kill(os.getpid(), number)
        assert pending_signal() == number


def test_second_signal_interrupts_immediately():
    def train() -> None:
        with signals.catch_stop_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

    with pytest.raises(StageInterrupted, match="stopped by SIGTERM at once; run again to resume") as caught:
        train()
    assert caught.value.signal_number == signal.SIGTERM
