"""DeepSeek-V3's pre-training course in tokens (section 4.2)."""

import dataclasses
import math

import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.training.schedules import Curve, Phase, ScheduleConfig, constant, paper_schedule, stepped

B, T = 10**9, 10**12
WARMUP = 25 * B
V3 = paper_schedule(int(14.8 * T), warmup_tokens=WARMUP, rows=15360, start_rows=3072, batch_multiple=256)
PEAK = 2.2e-4


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (0, 0.0),
        (WARMUP // 2, 1.1e-4),  # half-way up
        (WARMUP, 2.2e-4),
        (5 * T, 2.2e-4),
        (10 * T, 2.2e-4),
        (12_150 * B, (2.2e-4 + 2.2e-5) / 2),  # the middle of the cosine
        (11_075 * B, 2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + math.cos(math.pi / 4)) / 2),
        (14_300 * B, 2.2e-5),
        (14_632 * B, 2.2e-5),  # constant for 333B tokens
        (14_634 * B, 7.3e-6),  # and 7.3e-6 for the last 167B
        (14_800 * B - 1, 7.3e-6),
        (15 * T, 7.3e-6),
    ],
)
def test_learning_rate_of_v3(tokens, expected):
    assert PEAK * V3.learning_rate(tokens) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("tokens", "rows"),
    [(0, 3072), (469 * B // 2, 9216), (469 * B - 1, 15104), (469 * B, 15360), (14 * T, 15360)],
)
def test_batch_ramp_of_v3(tokens, rows):
    assert V3.rows(tokens) == rows


def test_a_ramping_batch_is_always_a_multiple():
    for tokens in range(0, 500 * B, 7 * B):
        assert V3.rows(tokens) % 256 == 0
    assert [V3.rows(t) for t in range(0, 500 * B, B)] == sorted(V3.rows(t) for t in range(0, 500 * B, B))


def test_switch_points_of_v3():
    assert [V3.mtp_weight(t) for t in (0, 10 * T - 1, 10 * T, 14 * T)] == [0.3, 0.3, 0.1, 0.1]
    assert [V3.bias_rate(t) for t in (0, 14_300 * B - 1, 14_300 * B, 14_800 * B)] == [0.001, 0.001, 0.0, 0.0]
    assert V3.balance_weight == 1e-4


def test_milestones_scale_with_the_run():
    tiny = paper_schedule(14_800, warmup_tokens=100, rows=8)
    assert tiny.learning_rate(10_000) == 1.0
    assert tiny.learning_rate(12_150) == pytest.approx(0.55)
    assert tiny.learning_rate(14_300) == pytest.approx(0.1)
    assert [tiny.mtp_weight(t) for t in (9_999, 10_000)] == [0.3, 0.1]
    assert [tiny.bias_rate(t) for t in (14_299, 14_300)] == [0.001, 0.0]
    assert tiny.rows(0) == tiny.rows(14_000) == 8


def test_a_length_that_its_learning_rate_was_not_made_for_is_told():
    made = paper_schedule(800_000, warmup_tokens=40_000, rows=8)
    assert made.mismatch() is None
    assert dataclasses.replace(made, total_tokens=200_000).mismatch() == (
        "schedule.total_tokens is 200,000, but the learning rate's curve is made for 800,000: it ends at 1 x, not "
        "0.0332 x optimizer.peak_lr; for the whole course in 200,000 write schedule=paper_schedule(200000, ...) in the "
        "recipe, or set schedule.learning_rate.phases.N.until, and those of the other curves"
    )
    longer = dataclasses.replace(made, total_tokens=900_000).mismatch()
    assert longer is not None
    assert "made for 800,000: it stays at 0.0332 x optimizer.peak_lr from there on; " in longer


@pytest.mark.parametrize(
    ("curve", "is_constant"),
    [
        (constant(1.0), True),
        (Curve(phases=(Phase(until=50, value=1.0), Phase(until=70, value=1.0))), True),
        (Curve(phases=(Phase(until=50, value=1.0, shape="linear"),)), False),
        (stepped((50, 1.0), final=0.5), False),
    ],
)
def test_a_constant_learning_rate_fits_every_length(curve, is_constant):
    schedule = ScheduleConfig(total_tokens=100, learning_rate=curve, batch_rows=constant(1))
    assert (schedule.mismatch() is None) == is_constant


def test_pieces():
    assert [constant(0.5)(t) for t in (0, 1, 10**15)] == [0.5] * 3
    steps = stepped((10, 1.0), (20, 2.0), final=3.0)
    assert [steps(t) for t in (0, 9, 10, 19, 20, 21, 22, 10**9)] == [1, 1, 2, 2, 3, 3, 3, 3]
    ramp = Curve(start=4.0, phases=(Phase(until=8, value=8.0, shape="linear"),))
    assert [ramp(t) for t in (0, 2, 4, 8, 100)] == [4, 5, 6, 8, 8]


@pytest.mark.parametrize(
    ("rows", "least"),
    [
        (constant(0), "0"),
        (constant(-5), "-5"),
        (stepped((10, 8), final=0.5), "0.5"),
        (Curve(phases=(Phase(until=10, value=8, shape="linear"),)), "0"),  # Curve.start is 0 unless it is given
        (Curve(start=-2, phases=(Phase(until=10, value=8, shape="cosine"),)), "-2"),
    ],
)
def test_no_part_of_a_batch_schedule_is_below_one_row(rows, least):
    with pytest.raises(ConfigError, match=rf"^schedule\.batch_rows must be at least 1 everywhere, .*, not {least}$"):
        ScheduleConfig(total_tokens=100, learning_rate=constant(1.0), batch_rows=rows)
    unused_start = Curve(start=0, phases=(Phase(until=10, value=1),))
    assert ScheduleConfig(total_tokens=100, learning_rate=constant(1.0), batch_rows=unused_start).rows(0) == 1


def test_bad_schedules_say_what_is_wrong():
    with pytest.raises(ConfigError, match="one after another"):
        Curve(phases=(Phase(until=10, value=1.0), Phase(until=5, value=1.0)))
    with pytest.raises(ConfigError, match="at least one phase"):
        Curve(phases=())
    with pytest.raises(ConfigError, match="total_tokens"):
        ScheduleConfig(total_tokens=0, learning_rate=constant(1.0), batch_rows=constant(1))
    with pytest.raises(ConfigError, match="one after another"):
        paper_schedule(1000, warmup_tokens=900, rows=8)
