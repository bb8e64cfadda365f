"""Signals while a network is trained: noticed, and obeyed at once when the training takes too long or another comes."""

import os
import signal
import threading
import time

import pytest

from fadeformer.errors import Interrupted
from pipelines import signals


@pytest.fixture(autouse=True)
def handlers():
    """What handles signals is afterwards what it was before."""
    names = (*signals.ASKING, signal.SIGALRM)
    before = [signal.getsignal(name) for name in names]
    yield
    assert [signal.getsignal(name) for name in names] == before


@pytest.mark.parametrize("number", signals.ASKING)
def test_a_signal_is_noticed_and_nothing_is_broken_off(number):
    with signals.asked_to_leave() as asked:
        assert asked() == 0
        os.kill(os.getpid(), number)
        assert asked() == number


def send(*numbers: int) -> None:
    """Sends signals to a training that is in a long step."""
    with signals.asked_to_leave():
        for number in numbers:
            os.kill(os.getpid(), number)
        time.sleep(5)


def test_a_second_signal_leaves_at_once():
    with pytest.raises(Interrupted, match="stopped by SIGTERM at once") as told:
        send(signal.SIGTERM, signal.SIGINT)
    assert told.value.signal_number == signal.SIGTERM


def test_a_step_that_takes_too_long_is_left(monkeypatch):
    monkeypatch.setattr(signals, "GRACE", 0.2)
    with pytest.raises(Interrupted, match="run again to go on from the last checkpoint"):
        send(signal.SIGTERM)


def test_outside_the_main_thread_none_is_noticed():
    found = []

    def work() -> None:
        with signals.asked_to_leave() as asked:
            found.append(asked())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [0]
