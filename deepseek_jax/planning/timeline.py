"""A schedule whose stages cost differently, run on paper: how long a step takes and what ranks spend it on.

`parallel.pipeline.simulate` does the same for stages of one cost, and with equal stages both say the same.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Literal

from deepseek_jax.parallel.pipeline.check import in_order
from deepseek_jax.parallel.pipeline.choice import SUFFIX, ScheduleChoice
from deepseek_jax.parallel.pipeline.schedule import Cell, Schedule
from deepseek_jax.parallel.pipeline.simulate import assign_ticks
from deepseek_jax.parallel.pipeline.tables import TickTables, make_tables
from deepseek_jax.planning.job import Execution
from deepseek_jax.planning.stages import StageTime

Kind = Literal["F", "B", "W", "F&B"]
"""What a rank does together: a forward alone, a backward alone (full or of inputs), put-off weight gradients, or a
forward beside a backward."""

EXACT_UP_TO = 8
"""Microbatches per rank that are simulated one by one; beyond them each adds the same."""


@dataclasses.dataclass(frozen=True)
class Composition:
    """A step's time, in seconds, averaged over ranks."""

    makespan: float
    parts: Mapping[Kind, float]
    """What ranks spend on each kind of cell."""

    @property
    def bubble(self) -> float:
        """What they wait."""
        return self.makespan - sum(self.parts.values())

    def plus(self, other: Composition, times: float) -> Composition:
        """This one and `times` of another."""
        parts = {kind: value + times * other.parts[kind] for kind, value in self.parts.items()}
        return Composition(self.makespan + times * other.makespan, parts)


@dataclasses.dataclass(frozen=True)
class CellTimes:
    """How long a rank's cells take."""

    stages: tuple[StageTime, ...]
    transfer: float
    """Of one message from rank to rank."""
    overlap: bool
    """Whether the exchanges of a forward and a backward hide under the other's compute."""
    exchange_units: float
    """The share of a device's units that exchanges take meanwhile."""

    def seconds(self, schedule: Schedule, rank: int, cell: Cell, *, overlap: bool = True) -> float:
        """Of a cell. Alone, a pass waits for its exchanges."""
        compute = exchange = 0.0
        for op in cell:
            stage = self.stages[schedule.stages.stage(rank, op.slot)]
            if op.kind == "F":
                compute, exchange = compute + stage.forward, exchange + stage.forward_exchange
            elif op.kind == "B":
                compute, exchange = compute + stage.input_gradient, exchange + stage.backward_exchange
            else:
                compute += stage.weight_gradient
        if kind_of(cell) == "F&B" and overlap and self.overlap:
            return min(max(compute / (1 - self.exchange_units), exchange), compute + exchange)
        return compute + exchange


def kind_of(cell: Cell) -> Kind:
    """Which of the four a cell is."""
    kinds = {op.kind for op in cell}
    if "F" in kinds:
        return "F&B" if "B" in kinds else "F"
    return "B" if "B" in kinds else "W"


@functools.lru_cache(maxsize=1024)
def compose(choice: ScheduleChoice, microbatches: int, times: CellTimes, execution: Execution) -> Composition:
    """A step of a schedule.

    Args:
      choice: the schedule.
      microbatches: of a step; a number that the schedule can have.
      times: of its cells.
      execution: see `job.Execution`.

    Raises:
      ConfigError: the schedule cannot have so many microbatches.
    """
    period = 2 * choice.ranks
    if choice.ranks == 1 or microbatches <= EXACT_UP_TO * choice.ranks or choice.name.endswith(SUFFIX):
        if choice.ranks > 1:
            return _compose(choice, microbatches, times, execution)
        # One rank does the same over and over.
        two, one = (_compose(choice, count, times, execution) for count in (2, 1))
        return one.plus(two.plus(one, -1), microbatches - 1)
    base = microbatches - (microbatches - (EXACT_UP_TO - 2) * choice.ranks) // period * period
    first, second = (_compose(choice, count, times, execution) for count in (base, base + period))
    return first.plus(second.plus(first, -1), (microbatches - base) / period)


def _compose(choice: ScheduleChoice, microbatches: int, times: CellTimes, execution: Execution) -> Composition:
    run = _in_ticks if execution == "lock_step" else _freely
    return run(choice, microbatches, times)


@functools.lru_cache(maxsize=256)
def _order(choice: ScheduleChoice, microbatches: int) -> tuple[Schedule, list[tuple[int, int, list[tuple[int, int]]]]]:
    """A schedule, and each of its cells as (rank, index, cells (rank, index) whose results it reads), in order."""
    schedule = choice.make(microbatches)
    where = {(rank, op): (rank, index) for rank in range(schedule.ranks) for index, op in schedule.ops(rank)}
    found = []
    for rank, index in in_order(schedule):
        cell = schedule.cells[rank][index]
        needs = {where[needed] for op in cell for needed in schedule.needs(rank, op)} - {(rank, index)}
        found.append((rank, index, sorted(needs)))
    return schedule, found


@functools.lru_cache(maxsize=256)
def _ticks(choice: ScheduleChoice, microbatches: int) -> tuple[tuple[int, ...], ...]:
    return assign_ticks(choice.make(microbatches))


@functools.lru_cache(maxsize=256)
def tick_tables(choice: ScheduleChoice, microbatches: int) -> TickTables:
    """The tables that this library runs a schedule by."""
    return make_tables(choice.make(microbatches))


def _freely(choice: ScheduleChoice, microbatches: int, times: CellTimes) -> Composition:
    schedule, order = _order(choice, microbatches)
    seconds = _cell_seconds(schedule, times)
    free = [0.0] * schedule.ranks
    ends = [[0.0] * len(cells) for cells in schedule.cells]
    parts = _no_parts()
    for rank, index, needs in order:
        cell = schedule.cells[rank][index]
        start = free[rank]
        for other, at in needs:
            start = max(start, ends[other][at] + (times.transfer if other != rank else 0.0))
        length = seconds(rank, cell, True)
        ends[rank][index] = free[rank] = start + length
        parts[kind_of(cell)] += length / schedule.ranks
    return Composition(max(free), parts)


def _in_ticks(choice: ScheduleChoice, microbatches: int, times: CellTimes) -> Composition:
    schedule, ticks = choice.make(microbatches), _ticks(choice, microbatches)
    steady = tick_tables(choice, microbatches).steady if schedule.ranks > 1 and times.overlap else None
    seconds = _cell_seconds(schedule, times)
    lengths = [0.0] * (1 + max(of_rank[-1] for of_rank in ticks))
    parts = _no_parts()
    for rank, of_rank in enumerate(ticks):
        for tick, cell in zip(of_rank, schedule.cells[rank], strict=True):
            length = seconds(rank, cell, steady is not None and steady.start <= tick < steady.end)
            lengths[tick] = max(lengths[tick], length)
            parts[kind_of(cell)] += length / schedule.ranks
    # Messages are sent in every tick, since who has none cannot know it.
    sent = times.transfer * len(lengths) if schedule.ranks > 1 else 0.0
    return Composition(sum(lengths) + sent, parts)


def _cell_seconds(schedule: Schedule, times: CellTimes) -> Callable[[int, Cell, bool], float]:
    known: dict[tuple, float] = {}

    def seconds(rank: int, cell: Cell, overlap: bool) -> float:
        key = (rank, overlap, *((op.kind, op.slot) for op in cell))
        if key not in known:
            known[key] = times.seconds(schedule, rank, cell, overlap=overlap)
        return known[key]

    return seconds


def _no_parts() -> dict[Kind, float]:
    return {"F": 0.0, "B": 0.0, "W": 0.0, "F&B": 0.0}
