"""Per-tick tables: a program that follows them alone finds every value where it expects it."""

from __future__ import annotations

import numpy as np
import pytest

from deepseek_jax.parallel.pipeline.generators import GENERATORS, dualpipe, make_schedule, one_f_one_b, one_rank
from deepseek_jax.parallel.pipeline.schedule import Op, Schedule
from deepseek_jax.parallel.pipeline.simulate import simulate
from deepseek_jax.parallel.pipeline.tables import END_COLUMNS, RANK_COLUMNS, Rings, TickTables, make_tables

EVEN = range(2, 17, 2)


class Rank:
    """A rank that runs the tables on labels instead of arrays, and knows nothing of the schedule."""

    def __init__(self, tables: TickTables, rank: int):
        self.tables, self.rank, self.stages = tables, rank, tables.schedule.stages
        self.rings = {ring: [None] * (rows + 1) for ring, rows in tables.rings._asdict().items()}
        self.carried: list[tuple[str, int, object]] = []
        self.done: list[Op] = []

    def entry(self, column: str, tick: int) -> int:
        return int(getattr(self.tables, column)[tick, self.rank])

    def write(self):
        """Write-behind: what the last tick made or received, before this tick reads."""
        for ring, row, value in self.carried:
            if row < self.tables.rings._asdict()[ring]:
                assert self.rings[ring][row] is None, f"{ring} row {row} still holds {self.rings[ring][row]}"
            self.rings[ring][row] = value
        self.carried = []

    def take(self, ring: str, row: int, *, last: bool = True):
        """A row's value; the last to read it leaves the row empty."""
        assert row < self.tables.rings._asdict()[ring], "nothing is read from the scratch row"
        value = self.rings[ring][row]
        if last:
            self.rings[ring][row] = None
        return value

    def run(self, tick: int) -> tuple:
        """One tick: what is sent, as (output of F, gradient of B)."""
        self.write()
        tables, stages, last_stage = self.tables, self.stages, self.stages.stages - 1
        output = gradient = stash = None
        slot, m = self.entry("f_slot", tick), self.entry("f_microbatch", tick)
        f = None
        if slot >= 0:
            stage, direction = stages.stage(self.rank, slot), stages.direction(slot)
            if stage == 0:
                assert tables.embed[tick, direction] == m
            else:
                assert self.take("activation", self.entry("f_input", tick)) == ("x", direction, stage, m)
            output = ("x", direction, stage + 1, m)
            f = ("residual", slot, m)
            self.done.append(Op("F", slot, m))
        slot, m = self.entry("b_slot", tick), self.entry("b_microbatch", tick)
        if slot >= 0:
            stage, direction = stages.stage(self.rank, slot), stages.direction(slot)
            if stage == last_stage:
                assert tables.head[tick, direction] == m
                assert self.take("output", self.entry("b_output", tick)) == ("x", direction, stage + 1, m)
            else:
                assert self.take("gradient", self.entry("b_cotangent", tick)) == ("dx", direction, stage, m)
            assert self.take("residual", self.entry("b_residual", tick), last=False) == ("residual", slot, m)
            gradient = ("dx", direction, stage - 1, m)
            if stage == 0:
                assert tables.embed_gradient[tick, direction] == m
            stash = ("stash", slot, m)
            self.done.append(Op("B", slot, m))
        slot, m = self.entry("w_slot", tick), self.entry("w_microbatch", tick)
        if slot >= 0:
            own = self.entry("w_own", tick)
            found = stash if own else self.take("stash", self.entry("w_stash", tick))
            assert found == ("stash", slot, m)
            assert self.take("residual", self.entry("w_residual", tick)) == ("residual", slot, m)
            self.done.append(Op("W", slot, m))
        self.carried += [
            ("residual", self.entry("f_residual", tick), f),
            ("output", self.entry("f_output", tick), output),
            ("stash", self.entry("b_stash", tick), stash),
        ]
        return output, gradient

    def receive(self, tick: int, sent: list[tuple]):
        """Every rank sends both ways in every tick; this rank's table says what becomes of it."""
        ranks = len(sent)
        for side, source in (("left", self.rank - 1), ("self", self.rank), ("right", self.rank + 1)):
            output, gradient = sent[source % ranks]
            self.carried.append(("activation", self.entry(f"x_from_{side}", tick), output))
            self.carried.append(("gradient", self.entry(f"dx_from_{side}", tick), gradient))


def replay(tables: TickTables) -> list[Rank]:
    ranks = [Rank(tables, rank) for rank in range(tables.schedule.ranks)]
    for tick in range(tables.ticks):
        sent = [rank.run(tick) for rank in ranks]
        for rank in ranks:
            rank.receive(tick, sent)
    for rank in ranks:
        rank.write()
    return ranks


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("ranks", EVEN)
def test_a_replay_finds_every_value(name, ranks):
    """No two live values share a row, each arrival is read exactly once, all rings are free at the end; even P ≤ 16.

    A row that is written while it holds something, or read while it holds something else, fails the replay.
    """
    schedule = make_schedule(name, ranks, 2 * ranks)
    for rank in replay(make_tables(schedule)):
        assert set(rank.done) == {op for _, op in schedule.ops(rank.rank)}
        assert len(rank.done) == len(set(rank.done))
        for ring in rank.rings.values():
            assert ring[:-1] == [None] * (len(ring) - 1)


@pytest.mark.parametrize("schedule", [one_rank(3), one_f_one_b(3, 7), make_schedule("dualpipe_v", 3, 7),
                                      make_schedule("dualpipe_v", 1, 2),
                                      make_schedule("interleaved_one_f_one_b", 3, 6, chunks=4)],
                         ids=lambda s: f"{s.name}-{s.ranks}")  # fmt: skip
def test_odd_numbers_of_ranks_and_microbatches(schedule):
    for rank in replay(make_tables(schedule)):
        assert len(rank.done) == 3 * schedule.stages.slots * schedule.microbatches // schedule.stages.directions


@pytest.mark.parametrize("ranks", EVEN)
@pytest.mark.parametrize("more", [0, 2, 10])
def test_dualpipes_rings(ranks, more):
    """P + 1 residuals, P/2 stashed weight gradients, and a few arrivals, whatever M."""
    rings = make_tables(dualpipe(ranks, 2 * ranks + more)).rings
    assert (rings.residual, rings.stash, rings.output) == (ranks + 1, ranks // 2, 1)
    assert max(rings.activation, rings.gradient) <= 2


@pytest.mark.parametrize("name", GENERATORS)
def test_rings_are_as_small_as_the_peaks(name):
    """Colouring intervals takes as many rows as are ever live at once, which is what the simulator counts."""
    schedule = make_schedule(name, 8, 32)
    timeline, rings = simulate(schedule), make_tables(schedule).rings
    assert rings.residual == max(timeline.peak_activations)
    assert rings.stash == max(timeline.peak_stash)


@pytest.mark.parametrize("name", [name for name in GENERATORS if name != "gpipe"])
def test_rings_do_not_grow_with_microbatches(name):
    assert make_tables(make_schedule(name, 4, 16)).rings == make_tables(make_schedule(name, 4, 64)).rings


def test_rows_are_reused_by_the_lowest_number():
    """1F1B on its last rank has one microbatch at a time: always row 0."""
    tables = make_tables(one_f_one_b(4, 8))
    assert set(tables.f_residual[tables.f_slot[:, 3] >= 0, 3]) == {0}
    assert tables.rings == Rings(residual=4, stash=0, activation=1, gradient=1, output=1)


@pytest.mark.parametrize("name", GENERATORS)
def test_what_nothing_happens_to_goes_to_the_scratch_row(name):
    """Rows are always valid, and the scratch row's index is the ring's size: no write needs a mask."""
    tables = make_tables(make_schedule(name, 4, 8))
    for column in RANK_COLUMNS:
        entries = getattr(tables, column)
        assert (entries.dtype, entries.shape) == (np.int32, (tables.ticks, 4))
        if not column.endswith(("slot", "microbatch")):
            assert entries.min() >= 0
    idle = tables.f_slot < 0
    assert (tables.f_residual[idle] == tables.rings.residual).all()
    assert (tables.f_input[idle] == tables.rings.activation).all()
    assert (tables.w_own[tables.w_slot < 0] == 0).all()
    for column in END_COLUMNS:
        assert getattr(tables, column).shape == (tables.ticks, tables.schedule.stages.directions)
    assert set(tables.columns) == {*RANK_COLUMNS, *END_COLUMNS}


def test_ends_are_named_once_per_microbatch():
    """Embedding, loss and the embedding's gradient of each microbatch in just one tick, of its direction."""
    tables = make_tables(dualpipe(4, 8))
    for column in END_COLUMNS:
        for direction, expected in enumerate((range(4), range(4, 8))):
            entries = getattr(tables, column)[:, direction]
            assert entries[entries >= 0].tolist() == list(expected)


@pytest.mark.parametrize("ranks", EVEN)
def test_the_steady_state_has_no_branch(ranks):
    """In it every rank does a forward and a full backward in each tick, and it takes in all that is added to M."""
    shorter, longer = (make_tables(dualpipe(ranks, microbatches)) for microbatches in (4 * ranks, 4 * ranks + 20))
    begin, end = longer.steady
    for column in ("f_slot", "b_slot", "w_slot"):
        assert (getattr(longer, column)[begin:end] >= 0).all()
    assert (longer.w_own[begin:end] == 1).all()
    assert (end - begin) - (shorter.steady[1] - shorter.steady[0]) == 20 == longer.ticks - shorter.ticks


def test_no_steady_state_where_ranks_alternate():
    """1F1B's neighbours do F and B in turn: no tick has all of them do both."""
    begin, end = make_tables(one_f_one_b(4, 16)).steady
    assert begin == end


def test_a_broken_schedule_has_no_tables():
    schedule = one_f_one_b(2, 2)
    broken = Schedule("broken", schedule.stages, 2, (schedule.cells[0][:-1], schedule.cells[1]))
    with pytest.raises(ValueError, match=r"rank 0: B0\.1"):
        make_tables(broken)
