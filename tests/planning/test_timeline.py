"""The composition of a step by a schedule: the simulator's where stages are equal, and by hand where they are not."""

import dataclasses

import pytest

from deepseek_jax.parallel.pipeline.choice import ScheduleChoice
from deepseek_jax.parallel.pipeline.simulate import Costs, simulate
from deepseek_jax.planning.stages import StageTime, even_stages
from deepseek_jax.planning.timeline import CellTimes, compose, kind_of

SCHEDULES = ["one_f_one_b", "eager_one_f_one_b", "interleaved_one_f_one_b", "zb_h1", "dualpipe", "dualpipe_v"]


def equal(choice: ScheduleChoice, *, transfer: float = 0.0, exchange: float = 0.0, units: float = 0.0) -> CellTimes:
    """F 1, B 1.5, W 0.5 of compute, and as much of exchange in F as in B."""
    stage = StageTime(1.0, 1.5, 0.5, exchange, exchange)
    return CellTimes((stage,) * choice.stage_map.stages, transfer, True, units)


@pytest.mark.parametrize("name", SCHEDULES)
def test_equal_stages_take_what_the_simulator_says(name):
    choice = ScheduleChoice(name, 4)
    found = compose(choice, 16, equal(choice, transfer=0.25, exchange=0.4), "free")
    # Alone a pass waits for its exchange; in a pair both hide under 3 of compute.
    costs = Costs(1.4, 1.9, 0.5, overlapped=3.0, transfer=0.25)
    timeline = simulate(choice.make(16), costs)
    assert found.makespan == pytest.approx(timeline.makespan)
    assert sum(found.parts.values()) == pytest.approx(sum(timeline.work) / 4)
    assert found.bubble == pytest.approx(sum(timeline.idle) / 4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_in_lock_step_too(name):
    """Without exchanges, since only steady ticks overlap there; and messages are sent in every tick."""
    choice = ScheduleChoice(name, 4)
    found = compose(choice, 16, equal(choice), "lock_step")
    timeline = simulate(choice.make(16), Costs(1.0, 1.5, 0.5), "lock_step")
    assert found.makespan == pytest.approx(timeline.makespan)
    sent = compose(choice, 16, equal(choice, transfer=0.25), "lock_step")
    assert sent.makespan == pytest.approx(timeline.makespan + 0.25 * timeline.number_of_ticks)


def test_in_lock_step_only_steady_ticks_hide_exchanges():
    choice = ScheduleChoice("dualpipe", 4)
    hidden, alone = (compose(choice, m, equal(choice, exchange=0.4), "lock_step").makespan for m in (32, 8))
    assert hidden < simulate(choice.make(32), Costs(1.4, 1.9, 0.5), "lock_step").makespan
    steady = 26  # ticks of 40, as docs/pipeline.md has them
    assert hidden == pytest.approx(
        simulate(choice.make(32), Costs(1.4, 1.9, 0.5), "lock_step").makespan - steady * 0.8, rel=1e-6
    )
    assert alone > 0


@pytest.mark.parametrize("execution", ["free", "lock_step"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_each_microbatch_more_takes_as_long_as_every_other(name, execution, monkeypatch):
    """What is not simulated one by one is what the whole simulation gives, with unequal stages."""
    choice = ScheduleChoice(name, 4)
    times = equal(choice, exchange=0.3, units=0.1)
    slow = tuple(stage.times(1 + 0.1 * (i % 3)) for i, stage in enumerate(times.stages))
    times = dataclasses.replace(times, stages=slow)
    quick = compose(choice, 64, times, execution)
    monkeypatch.setattr("deepseek_jax.planning.timeline.EXACT_UP_TO", 64)
    compose.cache_clear()
    whole = compose(choice, 64, times, execution)
    compose.cache_clear()
    assert quick.makespan == pytest.approx(whole.makespan, rel=2e-3)
    assert dict(quick.parts) == pytest.approx(dict(whole.parts), rel=1e-6)


def test_unequal_stages_by_hand():
    """1F1B over two ranks and two microbatches: F 1 and 2, a full backward 2 and 4.

    Rank 0: F0 0-1, F1 1-2; rank 1: F0 1-3, BW0 3-7, F1 7-9, BW1 9-13; rank 0: BW0 7-9, BW1 13-15.
    """
    stages = StageTime(1.0, 1.0, 1.0, 0.0, 0.0), StageTime(2.0, 2.0, 2.0, 0.0, 0.0)
    found = compose(ScheduleChoice("one_f_one_b", 2), 2, CellTimes(stages, 0.0, True, 0.0), "free")
    assert found.makespan == 15
    assert found.parts == {"F": (2 + 4) / 2, "B": (4 + 8) / 2, "W": 0, "F&B": 0}
    assert found.bubble == 15 - 9


def test_one_rank_takes_turns():
    times = CellTimes((StageTime(1.0, 1.0, 1.0, 0.5, 0.5),), 0.0, True, 0.0)
    assert compose(ScheduleChoice("dualpipe", 1), 7, times, "lock_step").makespan == pytest.approx(7 * 4)


def test_a_pair_is_as_long_as_the_longer_of_compute_and_exchange():
    """Compute loses the units that exchanges take; and no pair is longer than its parts one after the other."""
    choice = ScheduleChoice("dualpipe", 2)
    schedule = choice.make(8)
    rank, pair = next((r, cell) for r in range(2) for cell in schedule.cells[r] if kind_of(cell) == "F&B")
    for exchange, expected in ((0.1, 3.2), (0.5, 3 / 0.8), (4.0, 8.0)):
        assert equal(choice, exchange=exchange, units=0.2).seconds(schedule, rank, pair) == pytest.approx(expected)
    apart = dataclasses.replace(equal(choice, exchange=0.5, units=0.2), overlap=False)
    assert apart.seconds(schedule, rank, pair) == 4.0


def test_stages_are_as_even_as_they_can_be():
    assert even_stages((1.0,) * 8, 0.0, 4) == (2, 2, 2, 2)
    assert even_stages((1.0,) * 7, 2.0, 3) == (3, 3, 1), "the last one has a tail"
    assert even_stages((1.0,) * 3, 9.0, 3) == (1, 2, 0) or even_stages((1.0,) * 3, 9.0, 3) == (2, 1, 0)
    sizes = even_stages((2.0, 1.0, 1.0, 1.0, 1.0), 0.0, 3)
    assert sizes == (1, 2, 2)
