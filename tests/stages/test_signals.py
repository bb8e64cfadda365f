"""Signals during training: the first asks it to stop, a second stops it at once."""

import os
import signal
import time

import pytest

from fadeformer.errors import Interrupted
from pipelines.stages import signals


@pytest.fixture(autouse=True)
def handlers():
    """What handles signals is afterwards what it was before."""
    before = [signal.getsignal(name) for name in signals.ASKING]
    yield
    assert [signal.getsignal(name) for name in signals.ASKING] == before


@pytest.mark.parametrize("number", signals.ASKING)
def test_a_signal_is_noticed_and_nothing_is_broken_off(number):
    with signals.asked_to_leave() as asked:
        assert asked() == 0
        os.kill(os.getpid(), number)
        assert asked() == number


def test_a_second_signal_leaves_at_once():
    def train() -> None:
        with signals.asked_to_leave():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

    with pytest.raises(Interrupted, match="stopped by SIGTERM at once; run again to go on") as told:
        train()
    assert told.value.signal_number == signal.SIGTERM
