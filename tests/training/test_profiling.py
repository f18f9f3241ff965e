"""Traces of chosen steps, and the measured matmul rate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.training.profiling import StepTrace, measure_matmul_peak, parse_steps


def test_steps_to_trace():
    assert parse_steps("10:15") == (10, 15)
    assert parse_steps("3:3") == (3, 3)


@pytest.mark.parametrize("text", ["10", "10:", "a:b", "-1:3", "10-15", "1:2:3"])
def test_steps_to_trace_refuse(text):
    with pytest.raises(ConfigError, match=f"profile={text} must be first:last, two step numbers such as 10:15"):
        parse_steps(text)


def test_steps_to_trace_refuse_a_backward_range():
    with pytest.raises(ConfigError, match="profile=15:10 ends before it begins"):
        parse_steps("15:10")


def calls_of(monkeypatch, steps, numbers):
    """What the profiler is asked to do, and when."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(f"start {folder}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with StepTrace("there", steps) as trace:
        for number in numbers:
            with trace.step(number):
                calls.append(number)
    return calls


def test_traces_from_the_first_step_to_the_last(monkeypatch):
    assert calls_of(monkeypatch, (2, 3), range(1, 6)) == [1, "start there", 2, 3, "stop", 4, 5]


def test_a_run_that_stops_early_ends_its_trace(monkeypatch):
    assert calls_of(monkeypatch, (2, 9), range(1, 4)) == [1, "start there", 2, 3, "stop"]


def test_a_run_that_resumes_late_traces_what_is_left(monkeypatch):
    assert calls_of(monkeypatch, (2, 5), range(4, 7)) == ["start there", 4, 5, "stop", 6]


def test_no_trace_unless_asked(monkeypatch):
    assert calls_of(monkeypatch, None, range(3)) == [0, 1, 2]


def test_a_trace_is_written(tmp_path):
    with StepTrace(tmp_path, (1, 1)) as trace, trace.step(1):
        jnp.ones((64, 64)) @ jnp.ones((64, 64))
    assert list(tmp_path.rglob("*.xplane.pb"))


@pytest.mark.parametrize("dtype", [jnp.float32, "bfloat16"])
def test_matmul_peak_is_a_plausible_rate(dtype):
    assert 1e8 < measure_matmul_peak(dtype) < 1e16
