"""Signals during training: the first asks it to stop, a second stops it at once."""

import os
import signal
import time

import pytest

from fadeformer.errors import StageInterrupted
from pipelines.stages import signals


@pytest.fixture(autouse=True)
def handlers():
    """What handles signals is afterwards what it was before."""
    before = [signal.getsignal(name) for name in signals.STOP_SIGNALS]
    yield
    assert [signal.getsignal(name) for name in signals.STOP_SIGNALS] == before


@pytest.mark.parametrize("number", signals.STOP_SIGNALS)
def test_a_signal_is_noticed_and_nothing_is_broken_off(number):
    with signals.catch_stop_signals() as asked:
        assert asked() == 0
        os.kill(os.getpid(), number)
        assert asked() == number


def test_a_second_signal_leaves_at_once():
    def train() -> None:
        with signals.catch_stop_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

    with pytest.raises(StageInterrupted, match="stopped by SIGTERM at once; run again to resume") as told:
        train()
    assert told.value.signal_number == signal.SIGTERM
