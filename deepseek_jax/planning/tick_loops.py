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
class LayerLoop:
    """A loop over layers inside a tick."""

    turns: int | None
    chains: tuple[int, ...]
    """Exchanges of a turn, as groups of which no one needs a result of another, in any number of turns: in one group
    those of a forward pass or of a backward pass, in two those of both, laid beside each other."""
    span: Span
    """Of all turns, replayed."""


@dataclasses.dataclass(frozen=True)
class TickLoop:
    """One loop over ticks."""

    name: str
    turns: int | None
    exchanges: int
    """Of MoE layers, as they stand in the program: a loop over layers counts once."""
    layer_loops: tuple[LayerLoop, ...]
    """Those with exchanges."""
    conditionals: dict[str, int]
    """By what they are for (the last words of jax's stack of names)."""
    around_exchanges: int
    """Conditionals, and loops of one turn or none, that hold an exchange."""
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
    conditionals = [one for one in inside if one.opcode == "conditional"]
    optional = [one for one in inside if one.opcode == "while" and one.trips is None]
    rings = {array for array in loop.arrays if array.dims and array.dims[0] in ring_rows and array.bytes >= _LARGE}
    layers = [one for one in inside if one.opcode == "while" and one.trips and program.holds(one, EXCHANGES)]
    return TickLoop(
        name=loop.name,
        turns=loop.trips,
        exchanges=sum(map(_begins, inside)),
        layer_loops=tuple(
            LayerLoop(one.trips, chains(program, one), replay.span(program.body(one)).times(one.trips or 1))
            for one in layers
        ),
        conditionals=dict(collections.Counter(map(_purpose, conditionals)).most_common()),
        around_exchanges=sum(program.holds(one, EXCHANGES) for one in (*conditionals, *optional)),
        sums=sum(one.kind == "all-reduce" and not one.opcode.endswith("-done") for one in inside),
        ring_copies=tuple(one.name for one in copies_of(program, body, rings)),
        span=replay.span(body),
    )


def _begins(one: Instruction) -> bool:
    return one.kind in EXCHANGES and not one.opcode.endswith("-done")


def _purpose(conditional: Instruction) -> str:
    words = re.sub(r"[()]|jvp|transpose|branch_\d+_fun", "", conditional.op_name).split("/")
    words = [word for word in words if word not in ("", "cond", "while", "body", "closed_call", "shard_map")]
    return " ".join(words[1:][-2:]) or "tick"


# --- what needs what --------------------------------------------------------------------------------------------------


def chains(program: CompiledProgram, loop: Instruction) -> tuple[int, ...]:
    """The exchanges in a loop's body as groups that need nothing of each other: their sizes, the largest first."""
    body = program.body(loop)
    groups = [{one.name} for _, one in program.inside(body) if _begins(one)]
    for group in list(groups):
        needing = exchanges_that_need(program, body, group, again=True) | group
        joined = [other for other in groups if other & needing]
        groups = [other for other in groups if not other & needing]
        groups.append(set().union(*joined))
    return tuple(sorted(map(len, groups), reverse=True))


Taint = frozenset[int] | bool
"""Of a result: whether it needs a source, of a tuple which of its elements do."""


def exchanges_that_need(
    program: CompiledProgram, computation: str, sources: Collection[str], *, again: bool = False
) -> set[str]:
    """Exchanges in one run of a computation that need the result of any of the `sources`, by their names.

    With `again` the computation is a loop's body, and its later turns count too. Loops and conditionals are followed
    element by element: what passes through a loop beside a source is not of it.
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
            if _begins(one) and any(map(bool, operands)):
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
            of_branches: Taint = frozenset()
            for branch, argument in zip(one.called, operands[1:], strict=True):
                of_branches = _either(of_branches, run(branch, (argument,)))
            return True if operands[0] else of_branches
        if one.opcode == "call":
            return run(one.called[0], tuple(operands))
        return any(map(bool, operands))

    state: Taint = frozenset()
    while (after := _either(state, run(computation, (state,)))) != state and again:
        state = after
    return found


def _either(a: Taint, b: Taint) -> Taint:
    if isinstance(a, bool) or isinstance(b, bool):
        return True if a is True or b is True else a or b
    return a | b
