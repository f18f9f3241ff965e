"""A rank that is stuck is found, says where, and ends: within twice the limit, whatever it is stuck in."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import re
import subprocess
import sys
import threading
import time

import pytest
from tiny_run import STEPS, experiment, quick_runs, train, write_texts

from deepseek_jax.config import ConfigError
from deepseek_jax.training import loop
from deepseek_jax.training.experiment import LoggingConfig
from deepseek_jax.training.watchdog import SLOW, Watchdog

LIMIT = 1.0
LATE = 15
"""Seconds by which a machine that is busy with other tests may be late. What hangs, hangs for a minute."""

HANG = """
import ctypes, sys, threading, time
from deepseek_jax.training.watchdog import Watchdog

def keeps_the_lock():
    ctypes.PyDLL(None).sleep(60)

def lets_it_go():
    time.sleep(60)

def another_thread():
    time.sleep(60)

threading.Thread(target=another_thread, daemon=True).start()
with Watchdog({limit}, process=3) as watchdog:
    for step in range(1, 6):
        watchdog.beat(step)
        time.sleep(0.01)
    print(time.monotonic(), flush=True)
    {section}
        {hang}()
"""


def stuck(hang, section="if True:"):
    """Exit code, stderr and the seconds that it was stuck, of a process that hangs after five steps."""
    code = HANG.format(limit=LIMIT, hang=hang, section=section)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    return done.returncode, done.stderr, time.monotonic() - float(done.stdout)


def test_a_stuck_rank_says_where_and_ends_within_twice_the_limit():
    code, errors, seconds = stuck("lets_it_go")
    assert code == 1
    assert LIMIT < seconds < 2 * LIMIT + LATE
    first, *stacks = errors.splitlines()
    assert re.match(r"error: process 3 \([^ ]+, pid \d+\) has made no step for 1 s, since step 5: ", first)
    assert any("in lets_it_go" in line for line in stacks)
    assert any("in another_thread" in line for line in stacks)


def test_one_that_keeps_pythons_lock_is_found_as_well():
    code, errors, seconds = stuck("keeps_the_lock")
    assert code == 1
    assert LIMIT < seconds < 2 * LIMIT + LATE
    assert errors.startswith("Timeout (0:00:0")
    assert "in keeps_the_lock" in errors
    assert "in another_thread" in errors


def test_what_is_slow_is_found_after_its_longer_limit():
    code, errors, seconds = stuck("lets_it_go", section="with watchdog.slow():")
    assert (code, SLOW) == (1, 4)
    assert SLOW * LIMIT < seconds < 2 * SLOW * LIMIT + LATE
    assert "no step for 4 s, since step 5" in errors


@pytest.fixture
def ended(monkeypatch):
    """The steps at which a watchdog of this process would have ended it."""
    found = []

    def end(self, step, limit):
        found.append(step)
        self._over.set()
        faulthandler.cancel_dump_traceback_later()  # it would end the tests

    monkeypatch.setattr(Watchdog, "_end", end)
    return found


def test_steps_within_the_limit_keep_it_quiet(ended):
    with Watchdog(0.5) as watchdog:
        for step in range(12):
            time.sleep(0.1)
            watchdog.beat(step)
    assert ended == []


def test_the_time_for_a_step_begins_anew_after_what_is_slow(ended):
    with Watchdog(0.5) as watchdog:
        time.sleep(0.3)
        with watchdog.slow():
            time.sleep(0.7)
        time.sleep(0.3)
    assert ended == []


def test_the_steps_after_what_is_slow_may_wait_for_others_that_are_still_at_it(ended):
    """One process finds its program in a cache, and waits in the first step for another that compiles it."""
    with Watchdog(0.3) as watchdog:
        for step in (1, 2, 3):
            watchdog.beat(step)
        with watchdog.slow():
            pass
        watchdog.beat(4)
        time.sleep(0.6)
        assert ended == []
        watchdog.beat(5)
        time.sleep(0.6)
    assert ended == [5]


def test_without_a_beat_it_strikes(ended):
    with Watchdog(0.3) as watchdog:
        watchdog.beat(6)
        time.sleep(0.6)  # the beginning, where others may still be compiling
        assert ended == []
        watchdog.beat(7)
        time.sleep(0.6)
    assert ended == [7]


def test_nothing_is_left_when_it_is_over_or_off(ended):
    before = threading.active_count()
    for limit in (0.2, 0.0):
        with Watchdog(limit) as watchdog, watchdog.slow():
            pass
        with watchdog.slow():  # a timer set here would end the tests
            pass
    time.sleep(0.5)
    assert ended == []
    assert threading.active_count() == before


def test_several_processes_are_watched_unless_a_config_says_otherwise():
    assert (LoggingConfig().watchdog_limit(1), LoggingConfig().watchdog_limit(2)) == (0, 1800)
    assert LoggingConfig(watchdog_seconds=0).watchdog_limit(2) == 0
    assert LoggingConfig(watchdog_seconds=60).watchdog_limit(1) == 60
    for wrong in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=r"logging\.watchdog_seconds must be"):
            LoggingConfig(watchdog_seconds=wrong)


def test_a_run_beats_at_every_step_and_is_slow_where_it_makes_none(tmp_path, monkeypatch):
    beats, slow = [], []

    class Noted(Watchdog):
        def beat(self, step):
            beats.append(step)
            super().beat(step)

        @contextlib.contextmanager
        def slow(self):
            slow.append(beats[-1] if beats else 0)
            with super().slow():
                yield

    monkeypatch.setattr(loop, "Watchdog", Noted)
    run = experiment(write_texts(tmp_path / "texts"))
    logging = LoggingConfig(every_steps=5, tensorboard=False, watchdog_seconds=600)
    with quick_runs() as patch:
        patch.setattr(loop, "finish_run", lambda *arguments, heldout, **settings: heldout)
        train(dataclasses.replace(run, logging=logging), tmp_path / "run")
    assert beats == list(range(1, STEPS + 1))
    # Compiled before the first step and for later batch sizes; saved and evaluated at the end.
    assert slow[0] == 0
    assert any(0 < step < STEPS for step in slow)
    assert slow.count(STEPS) == 2
