"""Schedules in which fewer weight gradients wait: still schedules, with as many as asked, and all else in its order."""

import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.parallel.mesh import ParallelConfig
from deepseek_jax.parallel.pipeline.check import check
from deepseek_jax.parallel.pipeline.choice import ScheduleChoice
from deepseek_jax.parallel.pipeline.generators import make_schedule
from deepseek_jax.parallel.pipeline.put_off import PUTS_OFF, with_less_put_off
from deepseek_jax.parallel.pipeline.simulate import Costs, simulate
from deepseek_jax.parallel.pipeline.tables import make_tables

NAMES = PUTS_OFF


def most_waiting(schedule, rank):
    """How many weight gradients wait at a time."""
    waiting, most = set(), 0
    for cell in schedule.cells[rank]:
        for op in cell:
            if op.kind == "B" and op._replace(kind="W") not in cell:
                waiting.add(op._replace(kind="W"))
        waiting -= set(cell)
        most = max(most, len(waiting))
    assert not waiting
    return most


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [2, 4, 6, 16])
@pytest.mark.parametrize("most", [0, 1, 3])
def test_no_more_wait_than_may_and_forwards_and_backwards_keep_their_order(name, ranks, most):
    for microbatches in (2 * ranks, 2 * ranks + 8):
        whole = make_schedule(name, ranks, microbatches)
        less = with_less_put_off(whole, most)
        check(less)
        assert max(most_waiting(less, rank) for rank in range(ranks)) <= most
        assert (make_tables(less).rings.stash or 0) <= most
        for rank in range(ranks):
            before, after = ([op for _, op in one.ops(rank) if op.kind != "W"] for one in (whole, less))
            assert before == after


@pytest.mark.parametrize("name", NAMES)
def test_as_many_as_a_schedule_has_is_the_schedule(name):
    whole = make_schedule(name, 8, 24)
    most = max(most_waiting(whole, rank) for rank in range(8))
    assert with_less_put_off(whole, most) is whole
    assert with_less_put_off(whole, most - 1).name == f"{name}-put-off-{most - 1}"


def test_a_longer_bubble_in_fewer_ticks():
    """docs/pipeline.md: what waits fills the bubble of ranks apart, and takes ticks of its own in lock step."""
    costs = Costs()
    whole = make_schedule("dualpipe", 8, 20)
    none = with_less_put_off(whole, 0)
    assert simulate(none, costs).makespan > simulate(whole, costs).makespan
    assert make_tables(none).ticks < make_tables(whole).ticks


def test_schedules_that_put_off_nothing_stay_as_they_are():
    for name in ("gpipe", "one_f_one_b", "eager_one_f_one_b"):
        whole = make_schedule(name, 4, 8)
        assert with_less_put_off(whole, 0) is whole


def test_it_is_chosen_by_a_field_and_wrong_values_are_named(tmp_path):
    assert ParallelConfig(pipe=4, put_off=1).schedule_choice.make(8).name == "dualpipe-put-off-1"
    assert ScheduleChoice("dualpipe", 4).make(8).name == "dualpipe"
    with pytest.raises(ConfigError, match=r"^parallel.put_off must be 0 or more, or none, not -1$"):
        ParallelConfig(pipe=4, put_off=-1)
    with pytest.raises(ConfigError, match=r"^parallel.put_off=1 is for zb_h1, dualpipe, dualpipe_v: in parallel.sche"):
        ScheduleChoice("gpipe", 4, put_off=1).make(8)
    path = tmp_path / "own.txt"
    path.write_text("")
    with pytest.raises(ConfigError, match=r"parallel.put_off=1 does not go with a schedule of one's own"):
        ScheduleChoice(str(path), 2, put_off=1).make(4)
