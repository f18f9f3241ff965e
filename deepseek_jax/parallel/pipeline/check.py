"""Whether a schedule can run: every op once, every dependency met, no deadlock, messages in order.

Errors are one line that names the rank, the cell (counted from 0) and the op.
"""

from __future__ import annotations

from collections.abc import Iterator

from deepseek_jax.config import ConfigError, require
from deepseek_jax.parallel.pipeline.schedule import OP_WORDS, Op, Schedule, cell_text

Channel = tuple[int, int, str, int]
"""(sending rank, receiving rank, kind, direction) of messages that must arrive in the order in which they are used."""


def check(schedule: Schedule) -> Schedule:
    """The schedule itself, if it can run.

    Looks for: cells with two ops of a kind or none at all; ops that do not exist, are missing or are there twice; ops
    that come before what they need; ranks that wait for each other; messages that overtake.

    Raises:
      ConfigError: it cannot; the message names the first rank, cell and op that is wrong.
    """
    for rank in range(schedule.ranks):
        _check_cells(schedule, rank)
        _check_own_order(schedule, rank)
    for _ in in_order(schedule):
        pass
    _check_channels(schedule)
    return schedule


def in_order(schedule: Schedule) -> Iterator[tuple[int, int]]:
    """(rank, cell index) of every cell, each after the cells that it needs: as ranks run that wait for their inputs.

    Raises:
      ConfigError: no rank can go on: they wait for each other, or for an op that no rank has.
    """
    done: set[tuple[int, Op]] = set()
    at = [0] * schedule.ranks
    moved = True
    while moved:
        moved = False
        for rank, cells in enumerate(schedule.cells):
            while at[rank] < len(cells) and missing(schedule, rank, at[rank], done) is None:
                done.update((rank, op) for op in cells[at[rank]])
                yield rank, at[rank]
                at[rank] += 1
                moved = True
    if any(index < len(cells) for index, cells in zip(at, schedule.cells, strict=True)):
        raise ConfigError(_deadlock(schedule, at, done))


def missing(schedule: Schedule, rank: int, index: int, done: set[tuple[int, Op]]) -> tuple[Op, int, Op] | None:
    """(op, rank, op that it needs there) where a cell cannot run after the ops of `done`, else None.

    In its own cell an op finds only what comes before it on the way of one microbatch: a W its B.
    """
    cell = schedule.cells[rank][index]
    for op in cell:
        for where, needed in schedule.needs(rank, op):
            if (where, needed) not in done and not (op.kind == "W" and needed in cell):
                return op, where, needed
    return None


def _at(schedule: Schedule, rank: int, index: int) -> str:
    return f"schedule {schedule.name!r}, rank {rank}, cell {index} ({cell_text(schedule.cells[rank][index])})"


def _check_cells(schedule: Schedule, rank: int) -> None:
    """Every op of the rank is there, once, and no other."""
    seen: dict[Op, int] = {}
    slots = schedule.stages.slots
    for index, cell in enumerate(schedule.cells[rank]):
        require(bool(cell), f"schedule {schedule.name!r}, rank {rank}, cell {index} is empty: leave it out")
        where = _at(schedule, rank, index)
        kinds = [op.kind for op in cell]
        for op in cell:
            require(kinds.count(op.kind) == 1, f"{where}: a cell has at most one {op.kind}, put {op} in another")
            require(0 <= op.slot < slots, f"{where}: {op} has slot {op.slot}, a rank has slots 0 to {slots - 1}")
            valid = schedule.microbatches_of(op.slot)
            require(
                op.microbatch in valid,
                f"{where}: {op} has microbatch {op.microbatch}, slot {op.slot} works on {valid[0]} to {valid[-1]}",
            )
            require(op not in seen, f"{where}: {op} is there twice, first in cell {seen.get(op)}")
            seen[op] = index
    for slot in range(slots):
        for microbatch in schedule.microbatches_of(slot):
            for kind in OP_WORDS:
                op = Op(kind, slot, microbatch)
                require(
                    op in seen,
                    f"schedule {schedule.name!r}, rank {rank}: {op} ({OP_WORDS[kind]} of microbatch {microbatch}) is "
                    f"in none of its {len(schedule.cells[rank])} cells",
                )


def _check_own_order(schedule: Schedule, rank: int) -> None:
    """F before B before W on the rank itself; W may share the cell of its B."""
    place = {op: index for index, op in schedule.ops(rank)}
    for index, op in schedule.ops(rank):
        for where, needed in schedule.needs(rank, op):
            if where != rank:
                continue
            before = place[needed] <= index if op.kind == "W" else place[needed] < index
            late = "in the same cell" if place[needed] == index else f"only in cell {place[needed]}"
            require(before, f"{_at(schedule, rank, index)}: {op} needs {needed} before it, which comes {late}")


def _deadlock(schedule: Schedule, at: list[int], done: set[tuple[int, Op]]) -> str:
    """Who waits for whom, followed from the first rank that is stuck until it comes round."""
    rank = next(r for r, index in enumerate(at) if index < len(schedule.cells[r]))
    waits, seen = [], []
    while rank not in seen and at[rank] < len(schedule.cells[rank]):
        seen.append(rank)
        stuck = missing(schedule, rank, at[rank], done)
        assert stuck is not None  # or the rank would have gone on
        op, where, needed = stuck
        waits.append(f"rank {rank}, cell {at[rank]}: {op} waits for {needed} of rank {where}")
        rank = where
    return f"schedule {schedule.name!r} deadlocks: {'; '.join(waits)}"


def _check_channels(schedule: Schedule) -> None:
    """What one rank sends another, of one kind and direction, is used in the order in which it was made."""
    sent: dict[Channel, list[int]] = {}
    for rank in range(schedule.ranks):
        for _, op in schedule.ops(rank):
            to = schedule.receiver(rank, op)
            if to is not None:
                sent.setdefault(_channel(schedule, rank, to[0], op), []).append(_message(schedule, rank, op))
    taken = dict.fromkeys(sent, 0)
    for rank in range(schedule.ranks):
        for index, op in schedule.ops(rank):
            source = schedule.sender(rank, op)
            if source is None:
                continue
            channel = _channel(schedule, source[0], rank, op)
            message = _message(schedule, source[0], Op(op.kind, source[1], op.microbatch))
            first = sent[channel][taken[channel]]
            taken[channel] += 1
            require(
                first == message,
                f"{_at(schedule, rank, index)}: {op} overtakes: rank {source[0]} made its input after that of "
                f"microbatch {first % schedule.microbatches}, which rank {rank} has not used yet",
            )


def _channel(schedule: Schedule, sender: int, receiver: int, op: Op) -> Channel:
    return sender, receiver, op.kind, schedule.stages.direction(op.slot)


def _message(schedule: Schedule, rank: int, op: Op) -> int:
    """One number for the stage and the microbatch whose result is sent."""
    return schedule.stages.stage(rank, op.slot) * schedule.microbatches + op.microbatch
