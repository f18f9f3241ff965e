"""What the compiler made of a pipeline: its loops over ticks, and what each turn of them holds.

A turn should copy no ring, hold no exchange in a conditional, and leave the exchanges of forward and backward passes
independent of each other. Here that is counted in the compiled program.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Collection, Iterator

from deepseek_jax.planning.compiled import CompiledProgram, Instruction, copies_of
from deepseek_jax.planning.overlap import EXCHANGES, Replay, Span

_LARGE = 1 << 20
"""Bytes of an array whose copy would matter."""


@dataclasses.dataclass(frozen=True)
class TickLoop:
    """One loop over ticks."""

    name: str
    turns: int | None
    forward: int
    """Exchanges of forward passes in a turn, as they stand in the program; a loop over layers counts once."""
    backward: int
    """The same of backward passes, those that are computed again included."""
    dependent: int
    """Pairs of one of each of which one needs the other's result in the same turn."""
    conditionals: dict[str, int]
    """By what they are for (the last words of jax's stack of names)."""
    around_exchanges: int
    """Conditionals that hold an exchange."""
    sums: int
    """All-reduces."""
    ring_copies: tuple[str, ...]
    """Copies of arrays shaped like what the loop carries by rows."""
    span: Span
    """Of a turn, replayed."""


def tick_loops(program: CompiledProgram, ring_rows: Collection[int], replay: Replay) -> list[TickLoop]:
    """The outermost loops of a step that hold exchanges, or send from stage to stage.

    Args:
      program: a compiled train step.
      ring_rows: numbers of rows of the schedule's rings, scratch rows included.
      replay: of the same program.
    """
    outer = [one for one in _top(program, program.entry) if program.holds(one, (*EXCHANGES, "collective-permute"))]
    return [_tick_loop(program, loop, ring_rows, replay) for loop in outer]


def _top(program: CompiledProgram, name: str) -> Iterator[Instruction]:
    """Loops that are in no other."""
    for one in program.computations[name].instructions:
        if one.opcode == "while":
            yield one
        elif one.opcode in ("call", "conditional"):
            for inner in one.called:
                yield from _top(program, inner)


def _tick_loop(program: CompiledProgram, loop: Instruction, ring_rows: Collection[int], replay: Replay) -> TickLoop:
    body = program.body(loop)
    inside = [one for _, one in program.inside(body)]
    exchanges = [one for one in inside if one.kind in EXCHANGES and not one.opcode.endswith("-done")]
    backward = {one.name for one in exchanges if is_backward(one)}
    forward = {one.name for one in exchanges} - backward
    needing = (
        exchanges_that_need(program, body, forward) & backward,
        exchanges_that_need(program, body, backward) & forward,
    )
    conditionals = [one for one in inside if one.opcode == "conditional"]
    rings = {array for array in loop.arrays if array.dims and array.dims[0] in ring_rows and array.bytes >= _LARGE}
    return TickLoop(
        name=loop.name,
        turns=loop.trips,
        forward=len(forward),
        backward=len(backward),
        dependent=sum(map(len, needing)),
        conditionals=dict(collections.Counter(map(_purpose, conditionals)).most_common()),
        around_exchanges=sum(program.holds(one, EXCHANGES) for one in conditionals),
        sums=sum(one.kind == "all-reduce" and not one.opcode.endswith("-done") for one in inside),
        ring_copies=tuple(one.name for one in copies_of(program, body, rings)),
        span=replay.span(body),
    )


def is_backward(one: Instruction) -> bool:
    """Whether jax's stack of names says that an instruction is of a backward pass."""
    return "transpose(" in one.op_name or "rematted_computation" in one.op_name


def _purpose(conditional: Instruction) -> str:
    words = re.sub(r"[()]|jvp|transpose|branch_\d+_fun", "", conditional.op_name).split("/")
    words = [word for word in words if word not in ("", "cond", "while", "body", "closed_call", "shard_map")]
    return " ".join(words[1:][-2:]) or "tick"


# --- what needs what --------------------------------------------------------------------------------------------------

Taint = frozenset[int] | bool
"""Of a result: whether it needs a source, of a tuple which of its elements do."""


def exchanges_that_need(program: CompiledProgram, computation: str, sources: Collection[str]) -> set[str]:
    """Exchanges in one run of a computation that need the result of any of the `sources`, by their names.

    Loops and conditionals are followed element by element: what passes through a loop beside a source is not of it.
    """
    found: set[str] = set()
    known: dict[tuple[str, tuple[Taint, ...]], Taint] = {}

    def run(name: str, arguments: tuple[Taint, ...]) -> Taint:
        if (name, arguments) in known:
            return known[name, arguments]
        here = program.computations[name]
        taints: dict[str, Taint] = {}
        root: Taint = False
        for one in here.instructions:
            operands = [taints[operand] for operand in one.operands if operand in taints]
            if one.opcode == "parameter":
                taint: Taint = arguments[one.number]
            else:
                taint = result(one, operands)
            if one.kind in EXCHANGES and any(map(bool, operands)):
                found.add(one.name)
            if one.name in sources:
                taint = True
            taints[one.name] = taint
            if one.is_root:
                root = taint
        known[name, arguments] = root
        return root

    def result(one: Instruction, operands: list[Taint]) -> Taint:
        if one.opcode == "tuple":
            return frozenset(place for place, taint in enumerate(operands) if taint)
        if one.opcode == "get-tuple-element":
            (taint,) = operands
            place = int(re.search(r"index=(\d+)", one.attributes)[1])  # type: ignore[index]
            return taint if isinstance(taint, bool) else place in taint
        if one.opcode == "while":
            state = operands[0]
            while True:
                after = _either(state, run(program.body(one), (state,)))
                if after == state:
                    return state
                state = after
        if one.opcode == "conditional":
            taint: Taint = frozenset()
            for branch, argument in zip(one.called, operands[1:], strict=True):
                taint = _either(taint, run(branch, (argument,)))
            return True if operands[0] else taint
        if one.opcode == "call":
            return run(one.called[0], tuple(operands))
        return any(map(bool, operands))

    run(computation, (frozenset(),))
    return found


def _either(a: Taint, b: Taint) -> Taint:
    if isinstance(a, bool) or isinstance(b, bool):
        return True if a is True or b is True else a or b
    return a | b
