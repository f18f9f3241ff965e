"""How long a schedule takes, what waits, and what each rank must hold, for given costs of its ops. Nothing is run.

Two ways of running:

- `ideal`: each rank runs its cells in order, each as soon as its inputs are there. Many programs, or one per rank.
- `lock_step`: one program runs all ranks, which start each tick together. A tick lasts as long as its most expensive
  cell, and one transfer if anything is sent; a rank whose next cell has not got its inputs by then idles for the tick.

A cell's results leave when the whole cell is done, so a full backward sends its input gradient after its weight
gradient, as the published bubbles have it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Literal

from deepseek_jax.config import ConfigError, require
from deepseek_jax.parallel.pipeline.check import check, in_order, missing
from deepseek_jax.parallel.pipeline.generators import GENERATORS
from deepseek_jax.parallel.pipeline.schedule import Cell, Op, Schedule, StageMap

Mode = Literal["ideal", "lock_step"]


@dataclasses.dataclass(frozen=True)
class Costs:
    """Time of each op of one stage and one microbatch, in any one unit."""

    forward: float = 1.0
    """F."""
    input_gradient: float = 1.0
    """B, the input gradient alone: about F."""
    weight_gradient: float = 1.0
    """W: about F."""
    overlapped: float | None = None
    """F beside a full backward, F&B; default: nothing is saved, F + B + W."""
    transfer: float = 0.0
    """One activation, or one of its gradients, from rank to rank."""

    def __post_init__(self):
        parts = {"F": self.forward, "B": self.input_gradient, "W": self.weight_gradient, "send": self.transfer}
        for name, value in parts.items():
            require(0 <= value < math.inf, f"the cost of {name} is {value:g}, a time: use 0 or more")
        most, least = sum(self._ops), max(self.forward, self.input_gradient + self.weight_gradient)
        require(
            self.overlapped is None or least <= self.overlapped <= most,
            f"the cost of FB is {self.overlapped}: a forward beside a full backward takes at least the longer of them, "
            f"{least:g}, and at most both, {most:g}",
        )

    @property
    def _ops(self) -> tuple[float, float, float]:
        return self.forward, self.input_gradient, self.weight_gradient

    @property
    def pair(self) -> float:
        """F&B."""
        return sum(self._ops) if self.overlapped is None else self.overlapped

    def of(self, cell: Cell) -> float:
        """The time of a cell; where a forward and an input gradient are together, less what their overlap saves."""
        each = dict(zip("FBW", self._ops, strict=True))
        kinds = {op.kind for op in cell}
        together = sum(each[kind] for kind in kinds)
        if not {"F", "B"} <= kinds:
            return together
        longest = max(each["F"], together - each["F"])
        return max(longest, together - (sum(self._ops) - self.pair))

    def scaled(self, factor: float) -> Costs:
        """Of a stage of another size: all but the transfer times `factor`."""
        values = {field: getattr(self, field) * factor for field in ("forward", "input_gradient", "weight_gradient")}
        overlapped = None if self.overlapped is None else self.overlapped * factor
        return dataclasses.replace(self, overlapped=overlapped, **values)


@dataclasses.dataclass(frozen=True)
class Timeline:
    """A schedule with the time at which each cell runs, and what follows from it."""

    schedule: Schedule
    costs: Costs
    mode: Mode
    starts: tuple[tuple[float, ...], ...]
    """Per rank, when each of its cells starts; it ends after `costs.of(cell)`."""
    makespan: float
    """Time from the start of the first cell to the end of the last."""
    ticks: tuple[tuple[int, ...], ...] | None
    """In lock step: per rank, the tick of each of its cells."""

    def spans(self, rank: int) -> Iterable[tuple[Cell, float, float]]:
        """(cell, start, end) of each cell of a rank."""
        for cell, start in zip(self.schedule.cells[rank], self.starts[rank], strict=True):
            yield cell, start, start + self.costs.of(cell)

    @functools.cached_property
    def work(self) -> tuple[float, ...]:
        """Per rank, the time of all its cells."""
        return tuple(sum(self.costs.of(cell) for cell in cells) for cells in self.schedule.cells)

    @property
    def idle(self) -> tuple[float, ...]:
        """Per rank, the time in which it does nothing."""
        return tuple(self.makespan - work for work in self.work)

    @property
    def bubble(self) -> float:
        """The idle time of the busiest rank."""
        return self.makespan - max(self.work)

    @property
    def efficiency(self) -> float:
        """The share of all ranks' time that is work."""
        return sum(self.work) / (self.makespan * self.schedule.ranks)

    @functools.cached_property
    def peak_activations(self) -> tuple[int, ...]:
        """Per rank, the most (stage, microbatch) pairs whose activations it stores, from F to W.

        What a cell's F makes counts from the next cell on: it takes the room of what the cell's W lets go.
        """
        return tuple(_peak(self.schedule, rank, "F") for rank in range(self.schedule.ranks))

    @functools.cached_property
    def peak_stash(self) -> tuple[int, ...]:
        """Per rank, the most input gradients whose W is put off to a later cell."""
        return tuple(_peak(self.schedule, rank, "B") for rank in range(self.schedule.ranks))

    @functools.cached_property
    def sends(self) -> tuple[int, ...]:
        """Per rank, the activations and their gradients that it sends to other ranks in a step."""
        schedule = self.schedule

        def leaves(rank: int, op: Op) -> bool:
            to = schedule.receiver(rank, op)
            return to is not None and to[0] != rank

        return tuple(sum(leaves(rank, op) for _, op in schedule.ops(rank)) for rank in range(schedule.ranks))

    @property
    def number_of_ticks(self) -> int:
        """Ticks of a step in lock step."""
        assert self.ticks is not None, "only a lock-step timeline has ticks"
        return 1 + max(ticks[-1] for ticks in self.ticks)


def simulate(schedule: Schedule, costs: Costs | None = None, mode: Mode = "ideal") -> Timeline:
    """Runs a schedule on paper.

    Args:
      schedule: what to run; checked first.
      costs: of one of its stages; default: F, B and W take 1 each, transfers nothing.
      mode: see the module.

    Raises:
      ConfigError: the schedule cannot run (`check`).
    """
    check(schedule)
    costs = costs or Costs()
    return _lock_step(schedule, costs) if mode == "lock_step" else _ideal(schedule, costs)


def assign_ticks(schedule: Schedule) -> tuple[tuple[int, ...], ...]:
    """Per rank, the tick in which each of its cells runs in lock step: the first in which its inputs are there.

    Raises:
      ConfigError: the schedule deadlocks.
    """
    for _ in in_order(schedule):
        pass  # raises, or every tick below moves a rank on
    ticks: list[list[int]] = [[] for _ in range(schedule.ranks)]
    done: set[tuple[int, Op]] = set()
    tick = 0
    while any(len(t) < len(cells) for t, cells in zip(ticks, schedule.cells, strict=True)):
        running = [
            rank
            for rank, cells in enumerate(schedule.cells)
            if len(ticks[rank]) < len(cells) and missing(schedule, rank, len(ticks[rank]), done) is None
        ]
        for rank in running:
            done.update((rank, op) for op in schedule.cells[rank][len(ticks[rank])])
            ticks[rank].append(tick)
        tick += 1
    return tuple(map(tuple, ticks))


def _ideal(schedule: Schedule, costs: Costs) -> Timeline:
    starts: list[list[float]] = [[] for _ in range(schedule.ranks)]
    free = [0.0] * schedule.ranks
    ends: dict[tuple[int, Op], float] = {}
    for rank, index in in_order(schedule):
        cell = schedule.cells[rank][index]
        start = free[rank]
        for op in cell:
            for where, needed in schedule.needs(rank, op):
                if needed not in cell or where != rank:
                    start = max(start, ends[where, needed] + (costs.transfer if where != rank else 0.0))
        free[rank] = start + costs.of(cell)
        starts[rank].append(start)
        ends.update(((rank, op), free[rank]) for op in cell)
    return Timeline(schedule, costs, "ideal", tuple(map(tuple, starts)), max(free), None)


def _lock_step(schedule: Schedule, costs: Costs) -> Timeline:
    ticks = assign_ticks(schedule)
    lengths = [0.0] * (1 + max(of_rank[-1] for of_rank in ticks))
    sends = [False] * len(lengths)
    for rank, of_rank in enumerate(ticks):
        for tick, cell in zip(of_rank, schedule.cells[rank], strict=True):
            lengths[tick] = max(lengths[tick], costs.of(cell))
            sends[tick] |= any((schedule.receiver(rank, op) or (rank,))[0] != rank for op in cell)
    begin, now = [], 0.0
    for length, sending in zip(lengths, sends, strict=True):
        begin.append(now)
        now += length + (costs.transfer if sending else 0.0)
    starts = tuple(tuple(begin[tick] for tick in of_rank) for of_rank in ticks)
    return Timeline(schedule, costs, "lock_step", starts, now, ticks)


def _peak(schedule: Schedule, rank: int, since: str) -> int:
    """The most pairs of slot and microbatch that a cell finds between op `since`, in one before it, and W."""
    born = {op[1:]: index for index, op in schedule.ops(rank) if op.kind == since}
    changes = [0] * (len(schedule.cells[rank]) + 1)
    for index, op in schedule.ops(rank):
        if op.kind == "W":  # a W in the cell of its B ends nothing that waited: its +1 and -1 fall together
            changes[born[op[1:]] + 1] += 1
            changes[index + 1] -= 1
    most = held = 0
    for change in changes:
        held += change
        most = max(most, held)
    return most


# --- which schedule ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a rank holds, in any one unit, where each rank has 1/P of the model."""

    activation: float = 1.0
    """Activations of one microbatch, kept from F to W."""
    stash: float = 0.0
    """What B leaves of one microbatch for a W that is put off."""
    weights: float = 0.0
    """1/P of the parameters, in the form of a working copy; a bidirectional schedule holds two such parts."""

    def most(self, timeline: Timeline) -> float:
        """The most that any rank holds; buffers are apart, so that their peaks add up."""
        share = _share(timeline.schedule.stages)
        buffers = zip(timeline.peak_activations, timeline.peak_stash, strict=True)
        most = max(activations * self.activation + stash * self.stash for activations, stash in buffers)
        return share * most + timeline.schedule.stages.copies * self.weights


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One schedule among those that `best` compares."""

    name: str
    timeline: Timeline | None
    """None where it cannot have so many ranks or microbatches."""
    memory: float
    """`Sizes.most`."""
    refusal: str | None
    """Why it cannot be used: one line."""


def stage_costs(costs: Costs, stages: StageMap) -> Costs:
    """Costs of 1/P of the model as those of one stage of a map, which may cut it finer."""
    return costs.scaled(_share(stages))


def best(
    ranks: int,
    microbatches: int,
    costs: Costs | None = None,
    memory_limit: float | None = None,
    *,
    sizes: Sizes | None = None,
    mode: Mode = "ideal",
    names: Sequence[str] = tuple(GENERATORS),
) -> list[Candidate]:
    """Schedules for one model on so many ranks, the fastest first; last those that cannot be used, with the reason.

    Args:
      ranks: pipeline ranks.
      microbatches: of a step, both directions together.
      costs: of 1/P of the model; a schedule with V stages per rank is charged 1/V of them for each.
      memory_limit: what a rank may hold, in the unit of `sizes`; default: anything.
      sizes: default: activations of one microbatch in 1/P of the model count 1, all else nothing.
      mode: how it will run.
      names: the schedules to compare.
    """
    costs, sizes = costs or Costs(), sizes or Sizes()
    found = []
    for name in names:
        try:
            schedule = GENERATORS[name](ranks, microbatches)
        except ConfigError as error:
            found.append(Candidate(name, None, float("inf"), str(error)))
            continue
        timeline = simulate(schedule, stage_costs(costs, schedule.stages), mode)
        memory = sizes.most(timeline)
        over = memory_limit is not None and memory > memory_limit
        refusal = f"a rank holds {memory:g}, more than the limit of {memory_limit:g}" if over else None
        found.append(Candidate(name, timeline, memory, refusal))

    def order(one: Candidate) -> tuple:
        makespan = float("inf") if one.timeline is None else one.timeline.makespan
        return one.refusal is not None, makespan, one.memory

    return sorted(found, key=order)


def _share(stages: StageMap) -> float:
    """What part of 1/P of the model one stage is."""
    return stages.ranks / stages.stages
