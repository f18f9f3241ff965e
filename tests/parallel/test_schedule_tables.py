"""Per-tick tables: a program that follows them alone finds every value where it expects it."""

from __future__ import annotations

import numpy as np
import pytest
from even_ranks import EVEN

from deepseek_jax.parallel.pipeline.generators import GENERATORS, dualpipe, make_schedule, one_f_one_b, one_rank
from deepseek_jax.parallel.pipeline.schedule import Op, Schedule
from deepseek_jax.parallel.pipeline.simulate import simulate
from deepseek_jax.parallel.pipeline.tables import END_COLUMNS, RANK_COLUMNS, Rings, TickTables, make_tables


class Rank:
    """A rank that runs the tables on labels instead of arrays, and knows nothing of the schedule."""

    def __init__(self, tables: TickTables, rank: int):
        self.tables, self.rank, self.stages = tables, rank, tables.schedule.stages
        self.rings = {ring: [None] * (rows + 1) for ring, rows in tables.rings._asdict().items()}
        self.carried: list[tuple[str, int, object]] = []
        self.done: list[Op] = []
        self.losses: list[int] = []

    def entry(self, column: str, tick: int) -> int:
        return int(getattr(self.tables, column)[tick, self.rank])

    def slots(self, tick: int) -> tuple[int, int, int, int]:
        """Slots of F, B and W, and whether the W is of that B: in a steady tick as the pattern has them."""
        phase = steady_phase(self.tables, tick)
        if phase is None:
            f, b, w, own = (self.entry(column, tick) for column in ("f_slot", "b_slot", "w_slot", "w_own"))
            return f, b, w, own
        pattern = self.tables.steady
        b = int(pattern.b_slot[phase, self.rank])
        return int(pattern.f_slot[phase, self.rank]), b, b, 1

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
        f_slot, b_slot, w_slot, own = self.slots(tick)
        output = gradient = stash = f = None
        cotangents = {}
        for direction, m in enumerate(ends(tables, "head", tick)):
            if m >= 0 and stages.home(direction, last_stage)[0] == self.rank:
                assert self.take("output", self.entry("b_output", tick)) == ("x", direction, last_stage + 1, m)
                cotangents[direction] = m
                self.losses.append(m)
        slot, m = f_slot, self.entry("f_microbatch", tick)
        if slot >= 0:
            stage, direction = stages.stage(self.rank, slot), stages.direction(slot)
            if stage == 0:
                assert ends(tables, "embed", tick)[direction] == m
            else:
                assert self.take("activation", self.entry("f_input", tick)) == ("x", direction, stage, m)
            output = ("x", direction, stage + 1, m)
            f = ("residual", slot, m)
            self.done.append(Op("F", slot, m))
        slot, m = b_slot, self.entry("b_microbatch", tick)
        if slot >= 0:
            stage, direction = stages.stage(self.rank, slot), stages.direction(slot)
            if stage == last_stage:
                assert cotangents[direction] == m
            else:
                assert self.take("gradient", self.entry("b_cotangent", tick)) == ("dx", direction, stage, m)
            assert self.take("residual", self.entry("b_residual", tick), last=False) == ("residual", slot, m)
            gradient = ("dx", direction, stage - 1, m)
            if stage == 0:
                assert ends(tables, "embed_gradient", tick)[direction] == m
            stash = ("stash", slot, m)
            self.done.append(Op("B", slot, m))
        slot, m = w_slot, self.entry("w_microbatch", tick)
        if slot >= 0:
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
        """What arrives: in a steady tick by one permutation each of activations and gradients, else from both sides."""
        ranks, phase, pattern = len(sent), steady_phase(self.tables, tick), self.tables.steady
        if phase is not None:
            for what, (ring, sends, rows) in enumerate(
                (
                    ("activation", pattern.x_sends, pattern.x_row),
                    ("gradient", pattern.dx_sends, pattern.dx_row),
                )
            ):
                source = {to: source for source, to in sends[phase]}.get(self.rank)
                row = int(rows[tick - pattern.start, self.rank])
                self.carried.append((ring, row, None if source is None else sent[source][what]))
            return
        for side, source in (("left", self.rank - 1), ("self", self.rank), ("right", self.rank + 1)):
            output, gradient = sent[source % ranks]
            self.carried.append(("activation", self.entry(f"x_from_{side}", tick), output))
            self.carried.append(("gradient", self.entry(f"dx_from_{side}", tick), gradient))


def steady_phase(tables: TickTables, tick: int) -> int | None:
    """Which tick of the steady pattern a tick is, if it is steady."""
    steady = tables.steady
    if steady is None or not steady.start <= tick < steady.end:
        return None
    return (tick - steady.start) % steady.period


def ends(tables: TickTables, column: str, tick: int) -> list[int]:
    """The microbatches of an end in a tick: none in a steady tick in which the pattern says that it does not work."""
    phase = steady_phase(tables, tick)
    if phase is not None and not getattr(tables.steady, column)[phase]:
        return [-1] * tables.schedule.stages.directions
    return getattr(tables, column)[tick].tolist()


def replay(tables: TickTables) -> list[Rank]:
    ranks = [Rank(tables, rank) for rank in range(tables.schedule.ranks)]
    for tick in range(tables.ticks):
        sent = [rank.run(tick) for rank in ranks]
        for rank in ranks:
            rank.receive(tick, sent)
    for rank in ranks:
        rank.write()
    return ranks


def assert_all_done(tables: TickTables, kinds: str):
    """A replay does every op of these kinds once, makes each microbatch's loss once, and leaves all rings empty."""
    schedule = tables.schedule
    ranks = replay(tables)
    for rank in ranks:
        assert sorted(rank.done) == sorted(op for _, op in schedule.ops(rank.rank) if op.kind in kinds)
        for ring in rank.rings.values():
            assert ring[:-1] == [None] * (len(ring) - 1)
    assert sorted(m for rank in ranks for m in rank.losses) == list(range(schedule.microbatches))


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("ranks", EVEN)
@pytest.mark.parametrize("times", [2, 4])
def test_a_replay_finds_every_value(name, ranks, times):
    """No two live values share a row, each arrival is read exactly once, all rings are free at the end; even P ≤ 16.

    A row that is written while it holds something, or read while it holds something else, fails the replay. Steady
    ticks take their slots, ends and transfers from the pattern alone: with M = 4P three of the schedules have some.
    """
    assert_all_done(make_tables(make_schedule(name, ranks, times * ranks)), "FBW")


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("ranks", EVEN)
def test_a_forward_only_replay_finds_every_value(name, ranks):
    """Each F has its input, and the head reads each output in the tick after the last stage's F."""
    tables = make_tables(make_schedule(name, ranks, 2 * ranks), forward_only=True)
    assert_all_done(tables, "F")
    stages = tables.schedule.stages
    for direction in range(stages.directions):
        rank, slot = stages.home(direction, stages.stages - 1)
        made = np.where(tables.f_slot[:, rank] == slot, tables.f_microbatch[:, rank], -1)
        assert tables.head[1:, direction].tolist() == made[:-1].tolist()


SMALL_AND_ODD = pytest.mark.parametrize(
    "schedule",
    [
        one_rank(3),
        one_f_one_b(3, 7),
        make_schedule("dualpipe_v", 3, 7),
        make_schedule("dualpipe_v", 3, 14),
        make_schedule("dualpipe_v", 1, 2),
        make_schedule("dualpipe_v", 1, 5),
        make_schedule("eager_one_f_one_b", 1, 3),
        make_schedule("interleaved_one_f_one_b", 3, 6, chunks=4),
    ],
    ids=lambda s: f"{s.name}-{s.ranks}-{s.microbatches}",
)


@SMALL_AND_ODD
def test_odd_numbers_of_ranks_and_microbatches(schedule):
    assert_all_done(make_tables(schedule), "FBW")


@SMALL_AND_ODD
def test_odd_numbers_forward_only(schedule):
    assert_all_done(make_tables(schedule, forward_only=True), "F")


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


# --- forward only -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATORS)
def test_forward_only_tables_do_nothing_backward(name):
    """No B, no W, and no rows for what only they need."""
    tables = make_tables(make_schedule(name, 4, 8), forward_only=True)
    for column in ("b_slot", "b_microbatch", "w_slot", "w_microbatch", "embed_gradient"):
        assert (getattr(tables, column) == -1).all()
    assert not tables.w_own.any()
    rings = tables.rings
    assert (rings.residual, rings.stash, rings.gradient, rings.output) == (0, 0, 0, 1)
    for column in ("f_residual", "b_residual", "w_residual", "b_stash", "w_stash", "b_cotangent"):
        assert (getattr(tables, column) == 0).all()
    assert tables.directions_of_dx == (False, False, False)
    assert tables.steady is None


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("ranks", EVEN)
def test_forward_only_keeps_the_schedules_order(name, ranks):
    schedule = make_schedule(name, ranks, 2 * ranks)
    tables = make_tables(schedule, forward_only=True)
    for rank in range(ranks):
        ticks = np.flatnonzero(tables.f_slot[:, rank] >= 0)
        found = [Op("F", int(tables.f_slot[t, rank]), int(tables.f_microbatch[t, rank])) for t in ticks]
        assert found == [op for _, op in schedule.ops(rank) if op.kind == "F"]


@pytest.mark.parametrize("name", ["gpipe", "one_f_one_b", "eager_one_f_one_b", "zb_h1"])
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_forward_only_is_as_early_as_possible(name, ranks):
    """Straight stages: microbatch m on rank r in tick m + r, so M + P - 1 ticks, and one for the last head."""
    tables = make_tables(make_schedule(name, ranks, 2 * ranks), forward_only=True)
    assert tables.ticks == 2 * ranks + ranks
    for rank in range(ranks):
        assert tables.f_microbatch[rank : rank + 2 * ranks, rank].tolist() == list(range(2 * ranks))


@pytest.mark.parametrize("ranks", EVEN)
def test_dualpipe_forward_only_has_both_directions_at_once(ranks):
    """A middle rank waits P/2 - 1 ticks, has M forwards without a pause, and is P/2 - 1 from the end: M + P - 2."""
    microbatches = 4 * ranks
    assert make_tables(dualpipe(ranks, microbatches), forward_only=True).ticks == microbatches + ranks - 2 + 1


# --- the whole table --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "x", "dx"),
    [
        ("one_f_one_b", (True, False, False), (False, True, False)),
        ("interleaved_one_f_one_b", (True, False, False), (False, True, False)),
        ("dualpipe", (True, True, False), (True, True, False)),
        ("dualpipe_v", (True, True, True), (True, True, True)),
    ],
)
def test_directions_that_are_ever_used(name, x, dx):
    """(left, right, self): straight stages send forwards only, two-way ones both ways, and a vee turns at its end."""
    tables = make_tables(make_schedule(name, 4, 8))
    assert (tables.directions_of_x, tables.directions_of_dx) == (x, dx)


def test_one_rank_sends_nothing():
    tables = make_tables(one_rank(2))
    assert tables.directions_of_x == tables.directions_of_dx == (False, False, False)


def test_a_broken_schedule_has_no_tables():
    schedule = one_f_one_b(2, 2)
    broken = Schedule("broken", schedule.stages, 2, (schedule.cells[0][:-1], schedule.cells[1]))
    with pytest.raises(ValueError, match=r"rank 0: B0\.1"):
        make_tables(broken)
