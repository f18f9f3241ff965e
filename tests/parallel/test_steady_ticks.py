"""The steady run of a table: ticks that repeat a pattern, as the columns have it, and nothing that differs."""

from __future__ import annotations

import numpy as np
import pytest
from even_ranks import EVEN

from deepseek_jax.parallel.pipeline.generators import dualpipe, make_schedule
from deepseek_jax.parallel.pipeline.steady import Steady, find_steady
from deepseek_jax.parallel.pipeline.tables import END_COLUMNS, TickTables, make_tables


@pytest.mark.parametrize(("name", "least"), [("dualpipe", 4), ("dualpipe_v", 4), ("eager_one_f_one_b", 2)])
@pytest.mark.parametrize("ranks", EVEN)
def test_the_steady_state_has_no_branch(name, least, ranks):
    """In it every rank does a forward and a full backward in each tick, and it takes in all that is added to M."""
    shorter, longer = (make_tables(make_schedule(name, ranks, least * ranks + more)) for more in (0, 20))
    steady = longer.steady
    ticks = slice(steady.start, steady.end)
    for column in ("f_slot", "b_slot", "w_slot"):
        assert (getattr(longer, column)[ticks] >= 0).all()
    assert (longer.w_own[ticks] == 1).all()
    added = longer.ticks - shorter.ticks
    assert added == 20 * longer.schedule.stages.slots // longer.schedule.stages.directions
    assert (steady.end - steady.start) - (shorter.steady.end - shorter.steady.start) == added


@pytest.mark.parametrize(("name", "period"), [("dualpipe", 2), ("dualpipe_v", 2), ("eager_one_f_one_b", 1)])
@pytest.mark.parametrize("ranks", EVEN)
def test_the_steady_pattern_is_what_the_columns_say(name, period, ranks):
    """Slots, ends and arrivals of each steady tick; of those that arrive, one column of the three names the row."""
    tables = make_tables(make_schedule(name, ranks, 4 * ranks))
    steady = tables.steady
    assert steady.period == period
    assert (steady.end - steady.start) % period == 0
    assert (steady.f_slot.shape, steady.f_slot.dtype) == ((period, ranks), np.int32)
    assert (steady.x_row.shape, steady.x_row.dtype) == ((steady.end - steady.start, ranks), np.int32)
    for tick in range(steady.start, steady.end):
        phase, row = (tick - steady.start) % period, tick - steady.start
        assert (tables.f_slot[tick] == steady.f_slot[phase]).all()
        assert (tables.b_slot[tick] == steady.b_slot[phase]).all()
        for column in END_COLUMNS:
            assert (getattr(tables, column)[tick] >= 0).any() == getattr(steady, column)[phase]
        for what, ring in (("x", "activation"), ("dx", "gradient")):
            scratch = getattr(tables.rings, ring)
            expected = []
            for rank in range(ranks):
                rows = {
                    (rank + away) % ranks: entry
                    for side, away in (("left", -1), ("self", 0), ("right", 1))
                    if (entry := getattr(tables, f"{what}_from_{side}")[tick, rank]) != scratch
                }
                assert len(rows) <= 1
                assert getattr(steady, f"{what}_row")[row, rank] == next(iter(rows.values()), scratch)
                expected += [(source, rank) for source in rows]
            sends = getattr(steady, f"{what}_sends")[phase]
            assert sorted(sends) == sorted(expected)
            assert all(len(set(side)) == len(sends) for side in zip(*sends, strict=True))


@pytest.mark.parametrize("name", ["dualpipe", "dualpipe_v"])
@pytest.mark.parametrize("ranks", EVEN)
@pytest.mark.parametrize("times", [2, 4])
def test_two_slots_take_turns(name, ranks, times):
    """In a steady tick a rank's B is in the slot in which its F is not, which is the other a tick later."""
    steady = make_tables(make_schedule(name, ranks, times * ranks)).steady
    if steady is None:
        assert times == 2, "only the fewest microbatches leave no tick in which all ranks do both"
        return
    assert (steady.b_slot == 1 - steady.f_slot).all()
    if steady.period == 2:
        assert (steady.f_slot[1] == 1 - steady.f_slot[0]).all()


@pytest.mark.parametrize("name", ["gpipe", "one_f_one_b", "interleaved_one_f_one_b", "zb_h1"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_no_steady_state_where_ranks_alternate(name, ranks):
    """1F1B's neighbours do F and B in turn: no tick has all of them do both."""
    assert make_tables(make_schedule(name, ranks, 4 * ranks)).steady is None


def found_in(tables: TickTables, columns: dict[str, np.ndarray]) -> Steady | None:
    return find_steady(
        columns,
        slots=tables.schedule.stages.slots,
        activation=tables.rings.activation,
        gradient=tables.rings.gradient,
    )


@pytest.mark.parametrize("what", ["slot", "end", "put off", "sender"])
def test_a_tick_that_differs_ends_the_steady_state(what):
    """Another slot, an end that does not work, a W that is put off, a transfer that is not made."""
    tables = make_tables(make_schedule("eager_one_f_one_b", 4, 32))
    assert (tables.steady.start, tables.steady.end) == (7, 32)
    columns = {name: column.copy() for name, column in tables.columns.items()}
    if what == "slot":
        columns["b_slot"][12, 2] = 1
    elif what == "end":
        columns["embed"][12, 0] = -1
    elif what == "put off":
        columns["w_own"][12, 1] = 0
    else:
        columns["x_from_left"][12, 2] = tables.rings.activation
    steady = found_in(tables, columns)
    assert (steady.start, steady.end, steady.period) == (13, 32, 1)


@pytest.mark.parametrize(("rank", "clash"), [(1, "rank 1 receives from 2 and 0"), (3, "rank 2 sends to 1 and 3")])
def test_what_one_permutation_cannot_carry_is_not_steady(rank, clash):
    """Eager 1F1B's gradients go from rank r to r - 1; one more pair, the same in all ticks, and two share a rank."""
    tables = make_tables(make_schedule("eager_one_f_one_b", 4, 32))
    columns = {name: column.copy() for name, column in tables.columns.items()}
    columns["dx_from_left"][:, rank] = 0
    assert found_in(tables, columns) is None, clash


def test_whole_periods_only():
    """DualPipe's slots take turns: an odd tick that would be steady is left to what comes after."""
    tables = make_tables(dualpipe(8, 32))
    full = (tables.f_slot >= 0) & (tables.b_slot >= 0) & (tables.w_own > 0)
    ticks = np.flatnonzero(full.all(axis=1)).tolist()
    assert ticks == list(range(20, 35))
    assert (tables.steady.start, tables.steady.end, tables.steady.period) == (20, 34, 2)
