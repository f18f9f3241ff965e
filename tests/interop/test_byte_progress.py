"""Progress in bytes: a bar on a terminal that leaves nothing behind, now and then a line elsewhere, or nothing."""

from __future__ import annotations

import io
import re

import pytest

from deepseek_jax.interop import progress
from deepseek_jax.interop.progress import ByteProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so; called with how many."""
    seconds = [1000.0]

    class Time:
        monotonic = staticmethod(lambda: seconds[0])

    monkeypatch.setattr(progress, "time", Time)
    return lambda count: seconds.__setitem__(0, seconds[0] + count)


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    return Terminal()


def test_a_terminal_shows_a_bar_of_bytes_and_is_clean_at_the_end(terminal, clock):
    with ByteProgress("loading", 4_000_000, stream=terminal) as done:
        done.add(1_000_000)
        done.add(2_000_000)
        done._bar.refresh()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "loading" in shown
    assert "3.0/4.0 MB" in shown
    assert terminal.getvalue().endswith("\x1b[2K")  # the line is erased
    assert " of " not in shown


def fail_after(done: ByteProgress, count: int, clock, seconds: float) -> None:
    with done:
        clock(seconds)
        done.add(count)
        clock(seconds)
        raise OSError("full")


def test_a_bar_is_taken_away_when_the_work_fails(terminal, clock):
    done = ByteProgress("writing", 10, stream=terminal)
    with pytest.raises(OSError, match="full"):
        fail_after(done, 3, clock, 100)
    assert not done._bar.live.is_started
    assert " of " not in terminal.getvalue()


def test_a_long_work_on_a_terminal_ends_with_a_line(terminal, clock):
    with ByteProgress("writing", 2_000_000_000, stream=terminal) as done:
        clock(20)
        done.add(2_000_000_000)
    assert terminal.getvalue().endswith("writing: 2.0 of 2.0 GB, 100 MB/s\n")


def test_elsewhere_a_slow_work_says_a_line_every_ten_seconds_and_one_at_the_end(clock):
    stream = io.StringIO()
    with ByteProgress("loading", 10_000_000_000, stream=stream) as done:
        for _ in range(8):  # 3 seconds each
            clock(3)
            done.add(1_000_000_000)
        assert stream.getvalue() == "loading: 4.0 of 10.0 GB, 333 MB/s\nloading: 8.0 of 10.0 GB, 333 MB/s\n"
        clock(1)
        done.add(2_000_000_000)
    assert stream.getvalue().splitlines()[2:] == ["loading: 10.0 of 10.0 GB, 400 MB/s"]


def test_elsewhere_a_short_work_says_nothing(clock):
    stream = io.StringIO()
    with ByteProgress("loading", 10, stream=stream) as done:
        clock(9)
        done.add(10)
    assert stream.getvalue() == ""


def test_a_slow_work_that_fails_says_no_last_line(clock):
    stream = io.StringIO()
    with pytest.raises(OSError, match="full"):
        fail_after(ByteProgress("writing", 10_000_000_000, stream=stream), 1_100_000_000, clock, 11)
    assert stream.getvalue() == "writing: 1.1 of 10.0 GB, 100 MB/s\n"


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_quiet_is_quiet_wherever_it_is(kind, clock):
    stream = kind()
    with ByteProgress("loading", 10, stream=stream, quiet=True) as done:
        clock(100)
        done.add(10)
    assert stream.getvalue() == ""


def test_standard_error_is_where_it_goes(capsys, clock):
    with ByteProgress("loading", 0) as done:
        clock(11)
        done.add(0)
    assert capsys.readouterr() == ("", "loading: 0.0 of 0.0 GB, 0 MB/s\n" * 2)
