"""The progress display, with and without a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from deepseek_jax.training.progress import Progress, TrainingClock, human_count, human_time


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (999.7, "1k"),
        (12345, "12.3k"),
        (3.2e6, "3.2M"),
        (14.8e12, "14.8T"),
        (2e9, "2G"),
    ],
)
def test_counts_in_human_units(number, text):
    assert human_count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59, "59s"), (60, "1m00s"), (200, "3m20s"), (3599.6, "1h00m"), (7265, "2h01m"), (200_000, "2d07h")],
)
def test_times_in_human_units(seconds, text):
    assert human_time(seconds) == text


def lines_of(reports, *, terminal=False, **settings):
    """What is printed for `reports`: (time, step, tokens, values)."""
    out, times = io.StringIO(), iter([0.0, *(r[0] for r in reports)])
    console = Console(file=out, force_terminal=terminal, width=160, highlight=False)
    with Progress(console=console, clock=lambda: next(times), **settings) as progress:
        for _, step, tokens, values in reports:
            progress.advance(tokens)
            progress.report(step, tokens, values)
        progress.log("[saved] checkpoint")
    return out.getvalue()


def test_plain_lines_without_a_terminal():
    reports = [
        (50, 10, 1000, {"loss": 6.2109}),  # 20 tok/s: it compiled
        (60, 20, 2000, {"loss": 3.5, "bpb": 2.0}),  # 100 tok/s, which replaces it
        (80, 30, 3000, {"loss": 3.0}),  # 50 tok/s, smoothed to 85
        (90, 40, 4000, {"loss": 2.0}),
    ]
    assert lines_of(reports, total_tokens=4000, total_steps=40).splitlines() == [
        "step 10/40 | loss 6.211 | 20 tok/s | 1k/4k tokens | eta 2m30s",
        "step 20/40 | loss 3.5 | bpb 2 | 100 tok/s | 2k/4k tokens | eta 20s",
        "step 30/40 | loss 3 | 50 tok/s | 3k/4k tokens | eta 12s",
        "step 40/40 | loss 2 | 100 tok/s | 4k/4k tokens",
        "[saved] checkpoint",
    ]


def test_a_training_clock_leaves_out_its_pauses():
    time = [100.0]
    clock = TrainingClock(lambda: time[0])
    begin = clock()
    time[0] += 3
    with clock.paused():
        time[0] += 50
    time[0] += 4
    assert clock() - begin == 7


def test_a_resumed_run_counts_its_own_rate():
    text = lines_of([(10, 11, 1100, {})], total_tokens=2000, start_tokens=1000)
    assert text.startswith("step 11 | 10 tok/s | 1.1k/2k tokens | eta 1m30s\n")


def test_lines_are_not_broken_at_the_width_of_a_pipe():
    values = {f"metric_{i}": 1.0 for i in range(30)}
    assert len(lines_of([(1, 1, 1, values)], total_tokens=2).splitlines()) == 2


def test_a_bar_on_a_terminal():
    text = lines_of([(10, 5, 500, {"loss": 2.5})], total_tokens=1000, terminal=True)
    assert "━" in text
    assert " 50% | step 5 | loss 2.5 | 50 tok/s | 500/1k tokens | eta 10s" in text
    assert "[saved] checkpoint" in text
