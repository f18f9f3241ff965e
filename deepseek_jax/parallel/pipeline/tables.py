"""A schedule as dense tables: what every rank does in every tick, and in which rows of its buffers. NumPy only.

One program runs all ranks in lock step. It scans over ticks, and each rank reads its own entry of each column. In a
tick a rank does at most one F, one B and one W, then sends its F's output and its B's gradient to both neighbours; the
table of whoever receives says what becomes of them.

What waits lies in five *rings*, buffers with a fixed number of rows. Writing trails reading: what tick t receives, and
what its last stage makes, is carried and written before tick t + 1 reads ("write-behind"), and an F writes what it
leaves for its B after the tick's B and W have read. So a row belongs to a value from the tick after it was made until
the tick that reads it last, and with rows given out by interval colouring a ring has as many of them as are ever taken
at once. A B writes its stash before the tick's W reads one, so there a row is free a tick later. One more row, the
*scratch* row (its index is the ring's number of rows), takes what nobody reads, and the stash of a B whose W is in the
same tick: no write is ever masked.

Forward-only tables, for evaluation, run the same forwards in the same order, each in the first tick in which its input
is there. The head reads what the last stage made in the tick after that, through `output` as ever.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from deepseek_jax.parallel.pipeline.check import check, in_order
from deepseek_jax.parallel.pipeline.schedule import Op, Schedule
from deepseek_jax.parallel.pipeline.simulate import assign_ticks
from deepseek_jax.parallel.pipeline.steady import Steady, find_steady


class Rings(NamedTuple):
    """The rows that each ring needs on the rank that needs most, without the scratch row."""

    residual: int
    """What an F leaves for its B and W, from F to W."""
    stash: int
    """What a B leaves for a W in a later tick, from B to W."""
    activation: int
    """Inputs of stages, from arrival to F."""
    gradient: int
    """Cotangents, from arrival to B."""
    output: int
    """What the last stage made, from F to the head, which makes the loss and its cotangent."""


@dataclasses.dataclass(frozen=True)
class TickTables:
    """Columns are int32 `[T, P]`: ticks, ranks. -1 stands for "nothing"; rows are never -1 but the scratch row."""

    schedule: Schedule
    rings: Rings

    f_slot: np.ndarray
    """F: the slot, or -1 in a tick without an F."""
    f_microbatch: np.ndarray
    """F: the microbatch, or -1."""
    f_input: np.ndarray
    """F: the row of `activation` with its input; scratch in the first stage, whose input is the embedding."""
    f_residual: np.ndarray
    """F: the row of `residual` that it leaves."""
    f_output: np.ndarray
    """F: the row of `output` for what the last stage made; scratch in any other."""

    b_slot: np.ndarray
    """B: the slot, or -1."""
    b_microbatch: np.ndarray
    """B: the microbatch, or -1."""
    b_cotangent: np.ndarray
    """B: the row of `gradient` with its cotangent; scratch in the last stage, whose cotangent the loss makes."""
    b_output: np.ndarray
    """The row of `output` from which the head makes the loss of the last stage's B; scratch in any other stage, and
    forward-only the row that the head reads, although no rank does a B."""
    b_residual: np.ndarray
    """B: the row of `residual` that it reads."""
    b_stash: np.ndarray
    """B: the row of `stash` for its W; scratch where the W is in the same tick."""

    w_slot: np.ndarray
    """W: the slot, or -1."""
    w_microbatch: np.ndarray
    """W: the microbatch, or -1."""
    w_residual: np.ndarray
    """W: the row of `residual` that it reads."""
    w_stash: np.ndarray
    """W: the row of `stash` that it reads; scratch where its B is in the same tick."""
    w_own: np.ndarray
    """W: 1 where it is of the B of the same tick, and has its stash from there, else 0."""

    x_from_left: np.ndarray
    """The row of `activation` for what arrives at the end of the tick from rank - 1 (cyclic)."""
    x_from_right: np.ndarray
    """The same from rank + 1."""
    x_from_self: np.ndarray
    """The same for the rank's own F, whose output its next slot works on: where a vee turns."""
    dx_from_left: np.ndarray
    """The row of `gradient` for what arrives at the end of the tick from rank - 1 (cyclic)."""
    dx_from_right: np.ndarray
    """The same from rank + 1."""
    dx_from_self: np.ndarray
    """The same for the rank's own B."""

    embed: np.ndarray
    """`[T, directions]`: the microbatch whose first-stage F is in this tick, or -1. Like the next two the same on all
    ranks: it calls all of them to work on an end whose vocabulary is split over them."""
    head: np.ndarray
    """`[T, directions]`: the microbatch whose last-stage B is in this tick and needs the loss's cotangent, or -1.
    Forward-only the microbatch whose last-stage F was in the tick before."""
    embed_gradient: np.ndarray
    """`[T, directions]`: the microbatch whose first-stage B in this tick yields the embedding's gradient, or -1."""

    @property
    def ticks(self) -> int:
        """T."""
        return len(self.f_slot)

    @functools.cached_property
    def columns(self) -> Mapping[str, np.ndarray]:
        """Every column by its name: what a program scans over."""
        return {name: getattr(self, name) for name in (*RANK_COLUMNS, *END_COLUMNS)}

    @functools.cached_property
    def steady(self) -> Steady | None:
        """The run of ticks that a program can do without a branch, if there is one: never forward-only."""
        activation, gradient = self.rings.activation, self.rings.gradient
        return find_steady(self.columns, slots=self.schedule.stages.slots, activation=activation, gradient=gradient)

    @property
    def directions_of_x(self) -> tuple[bool, bool, bool]:
        """Whether any rank ever stores an activation from its left, from its right, and from itself."""
        return self._directions("x", self.rings.activation)

    @property
    def directions_of_dx(self) -> tuple[bool, bool, bool]:
        """The same of gradients."""
        return self._directions("dx", self.rings.gradient)

    def _directions(self, what: str, scratch: int) -> tuple[bool, bool, bool]:
        left, right, own = (
            bool((self.columns[f"{what}_from_{side}"] != scratch).any()) for side in ("left", "right", "self")
        )
        return left, right, own


END_COLUMNS = ("embed", "head", "embed_gradient")
"""Columns of the model's ends, the same for all ranks."""
RANK_COLUMNS = tuple(
    field.name for field in dataclasses.fields(TickTables) if field.name not in ("schedule", "rings", *END_COLUMNS)
)
"""Columns with an entry per rank."""
_RING_OF = {
    "f_input": "activation",
    "f_residual": "residual",
    "f_output": "output",
    "b_cotangent": "gradient",
    "b_output": "output",
    "b_residual": "residual",
    "b_stash": "stash",
    "w_residual": "residual",
    "w_stash": "stash",
    "x_from_left": "activation",
    "x_from_right": "activation",
    "x_from_self": "activation",
    "dx_from_left": "gradient",
    "dx_from_right": "gradient",
    "dx_from_self": "gradient",
}
"""The ring whose rows a column names."""


def work_shares(tables: TickTables, *, steady: bool) -> dict[str, Fraction]:
    """Of the ticks whose work a program may leave out, the share in which it does not, on the first rank.

    Args:
      tables: of the schedule.
      steady: whether the steady ticks have a body of their own.

    Returns shares for `F`, `BW` (a full backward), `B` and `W` apart, and the ends.
    """
    known = tables.steady if steady else None
    span = slice(known.start, known.end) if known else slice(0)
    generic = {name: np.delete(column, np.r_[span], axis=0) for name, column in tables.columns.items()}
    count = max(len(generic["f_slot"]), 1)
    own = generic["w_own"] > 0
    taken = {kind: generic[f"{kind.lower()}_slot"] >= 0 for kind in "FBW"}
    taken = {"F": taken["F"], "BW": own, "B": taken["B"] & ~own, "W": taken["W"] & ~own}
    shares = {name: int(of[:, 0].sum()) for name, of in taken.items()}
    shares |= {name: int((generic[name] >= 0).any(axis=1).sum()) for name in END_COLUMNS}
    return {name: Fraction(times, count) for name, times in shares.items()}


class _Interval(NamedTuple):
    """A value that waits in a ring: made in one tick, read last in another, with the entries that name its row."""

    made: int
    read: int
    entries: tuple[tuple[int, str], ...]
    """(tick, column)."""


def make_tables(schedule: Schedule, *, forward_only: bool = False) -> TickTables:
    """The tables of a schedule.

    Args:
      schedule: what to run; checked first.
      forward_only: its forwards alone, for evaluation. Columns of B and W say "nothing", but for `b_output`; the rings
        `residual`, `stash` and `gradient` have no rows.

    Raises:
      ConfigError: the schedule cannot run (`check`).
    """
    check(schedule)
    at = _forward_ticks(schedule) if forward_only else _ticks(schedule)
    # Forward-only the head follows the last stage by a tick.
    count = 1 + max(max(here.values()) for here in at) + forward_only
    columns = {name: np.full((count, schedule.ranks), -1, np.int32) for name in RANK_COLUMNS}
    columns["w_own"][:] = 0
    sizes = dict.fromkeys(Rings._fields, 0)
    for rank in range(schedule.ranks):
        for op, tick in at[rank].items():
            columns[f"{op.kind.lower()}_slot"][tick, rank] = op.slot
            columns[f"{op.kind.lower()}_microbatch"][tick, rank] = op.microbatch
            if op.kind == "W":
                columns["w_own"][tick, rank] = at[rank][op._replace(kind="B")] == tick
        for ring, intervals in _intervals(schedule, rank, at).items():
            rows, used = _colour(intervals, again=ring != "stash")
            sizes[ring] = max(sizes[ring], used)
            for interval, row in zip(intervals, rows, strict=True):
                for tick, column in interval.entries:
                    columns[column][tick, rank] = row
    for column, ring in _RING_OF.items():
        entries = columns[column]
        entries[entries < 0] = sizes[ring]
    return TickTables(schedule, Rings(**sizes), **columns, **_ends(schedule, at, count, forward_only))


def _ticks(schedule: Schedule) -> list[dict[Op, int]]:
    """Per rank, the tick of each op."""
    ticks = assign_ticks(schedule)
    return [{op: ticks[rank][index] for index, op in schedule.ops(rank)} for rank in range(schedule.ranks)]


def _forward_ticks(schedule: Schedule) -> list[dict[Op, int]]:
    """Per rank, the tick of each F if nothing else is done: the first after the one before it and that of its input."""
    at: list[dict[Op, int]] = [{} for _ in range(schedule.ranks)]
    for rank, index in in_order(schedule):
        for op in schedule.cells[rank][index]:
            if op.kind != "F":
                continue
            source = schedule.sender(rank, op)
            made = -1 if source is None else at[source[0]][Op("F", source[1], op.microbatch)]
            at[rank][op] = 1 + max(made, max(at[rank].values(), default=-1))
    return at


def _intervals(schedule: Schedule, rank: int, at: list[dict[Op, int]]) -> dict[str, list[_Interval]]:
    """What waits in each ring of one rank."""
    found: dict[str, list[_Interval]] = {ring: [] for ring in Rings._fields}
    here = at[rank]
    for op, tick in here.items():
        if op.kind == "W":
            continue
        b, w = (here.get(Op(kind, op.slot, op.microbatch)) for kind in ("B", "W"))
        source = schedule.sender(rank, op)
        if op.kind == "F" and schedule.receiver(rank, op) is None:
            head = tick + 1 if b is None else b
            found["output"].append(_Interval(tick, head, ((tick, "f_output"), (head, "b_output"))))
        if b is not None and w is not None:  # not forward-only
            if op.kind == "F":
                rows = ((tick, "f_residual"), (b, "b_residual"), (w, "w_residual"))
                found["residual"].append(_Interval(tick, w, rows))
            elif w > tick:
                found["stash"].append(_Interval(tick, w, ((tick, "b_stash"), (w, "w_stash"))))
        if source is not None:
            sent = at[source[0]][Op(op.kind, source[1], op.microbatch)]
            ring, reader, arrival = (
                ("activation", "f_input", "x") if op.kind == "F" else ("gradient", "b_cotangent", "dx")
            )
            entries = ((sent, f"{arrival}_from_{_side(schedule, rank, source, op)}"), (tick, reader))
            found[ring].append(_Interval(sent, tick, entries))
    return found


def _side(schedule: Schedule, rank: int, source: tuple[int, int], op: Op) -> str:
    """Where what `op` reads comes from. On two ranks both neighbours are one: only the way round tells them apart."""
    if source[0] == rank:
        return "self"
    back = op.slot == 1 and schedule.stages.kind in ("bidirectional", "vee")
    return "left" if (op.kind == "F") != back else "right"


def _colour(intervals: list[_Interval], *, again: bool) -> tuple[list[int], int]:
    """A row for each interval so that no two that share one overlap, and the number of rows: as few as can be.

    `again`: a row that is read for the last time in the tick that makes a value may take that value.
    """
    rows = [0] * len(intervals)
    last_read: list[int] = []
    for index in sorted(range(len(intervals)), key=lambda i: intervals[i].made):
        made, read, _ = intervals[index]
        free = next((row for row, until in enumerate(last_read) if until < made + again), None)
        if free is None:
            free = len(last_read)
            last_read.append(read)
        rows[index], last_read[free] = free, read
    return rows, len(last_read)


def _ends(schedule: Schedule, at: list[dict[Op, int]], count: int, forward_only: bool) -> dict[str, np.ndarray]:
    stages = schedule.stages
    columns = {name: np.full((count, stages.directions), -1, np.int32) for name in END_COLUMNS}
    head = ("F", 1) if forward_only else ("B", 0)
    works = {"embed": (0, "F", 0), "head": (stages.stages - 1, *head), "embed_gradient": (0, "B", 0)}
    for direction in range(stages.directions):
        for name, (stage, kind, later) in works.items():
            rank, slot = stages.home(direction, stage)
            for op, tick in at[rank].items():
                if op.kind == kind and op.slot == slot:
                    columns[name][tick + later, direction] = op.microbatch
    return columns
