"""SIGINT and SIGTERM: noted, answered in words that are true where the run is, and given back."""

from __future__ import annotations

import os
import signal

import pytest

from deepseek_jax.training.signals import Signals, StoppedAtOnce


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_answer_is_what_the_run_says_that_it_does(number, capfd):
    with Signals() as signals:
        os.kill(os.getpid(), number)
        assert signals.received == number
    assert capfd.readouterr().err == f"{number.name}: saving after this step; once more stops at once\n"
    with Signals() as signals:
        signals.answer = "the report is being written"
        os.kill(os.getpid(), number)
        with pytest.raises(StoppedAtOnce, match=f"{number.name} again: stopped at once"):
            os.kill(os.getpid(), number)
    assert capfd.readouterr().err == f"{number.name}: the report is being written; once more stops at once\n"


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Signals():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
