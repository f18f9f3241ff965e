"""Cutting a program in two: what some of its outputs need, and what the others need besides.

Few bytes are to cross the cut. Products, loops, kernels and exchanges are made once, on their side of it; what is cheap
may be made on either side, or on both: so a norm's weight gradient is summed over tokens before it crosses, and an
activation crosses as the product after it takes it, or is made again of what is kept anyway. What crosses is a cut of
least capacity through the values that the second part is made of, as in the partitioner of PyTorch's AOTAutograd.

A scan or a conditional that both parts need is cut inside. Of a scan the first part gives the values that cross the
cut as further outputs, a stack each, and the second scans over these. Of a conditional every branch is cut, and the
first part gives what any of its branches has to give.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from deepseek_jax.parallel.pipeline.min_cut import min_cut
from deepseek_jax.parallel.pipeline.parts import needs, part_of_cond, part_of_scan, pruned, restricted, scan_needs
from deepseek_jax.parallel.pipeline.program import Op, Program, Value, Variable, new_variable

_REDUCTIONS = ("reduce", "arg", "cum")
"""Beginnings of names of what reads more than it writes: made again it would cost more than it saves."""

_BYTE = 100
"""What a byte that crosses counts, where a byte written by cheap work on the other side or on both sides counts one."""


class Cut(NamedTuple):
    """A program in two parts."""

    first: list[Op]
    """Makes the outputs that are wanted first."""
    second: list[Op]
    """Makes the others, from inputs and the stash."""
    stash: tuple[Variable, ...]
    """What the second part needs of the first, or of inputs that are gone by then."""


def cut(program: Program, first: Sequence[bool], kept: Sequence[bool], absent: Iterable[Variable] = ()) -> Cut:
    """Cuts a program in two.

    An exchange that the second part alone needs belongs to the first, if what it sends can be had there without a
    product more: so that the second part can run anywhere between other work.

    Args:
      program: the whole.
      first: for each output, whether it is wanted first.
      kept: for each input, whether it is still there for the second part.
      absent: inputs that are not there yet for the first part.
    """
    wanted = {v for v, f in zip(program.outputs, first, strict=True) if f and isinstance(v, Variable)}
    late = {v for v, f in zip(program.outputs, first, strict=True) if not f and isinstance(v, Variable)}
    absent = set(absent)
    early = _with_exchanges(program.ops, wanted, late, absent)
    possible = _possible(program, early, absent)
    ops: list[Op] = []
    live = set(late)
    for op in reversed(program.ops):
        now = [output in early for output in op.outputs]
        then = [output in live and output not in early for output in op.outputs]
        if any(now) and any(then) and (op.scan is not None or op.branches is not None):
            cut_op = _cut_scan if op.scan is not None else _cut_cond
            one, two = cut_op(op, now, then, possible)
            ops += [two, one]
            possible.update(one.outputs)
            live.update(value for value in (*one.inputs, *two.inputs) if isinstance(value, Variable))
        elif any(now):
            ops.append(restricted(op, now))
        elif any(then):
            ops.append(restricted(op, then))
            live.update(value for value in ops[-1].inputs if isinstance(value, Variable))
    ops.reverse()
    available = {v for v, k in zip(program.inputs, kept, strict=True) if k} | set(program.constants)
    crossing = _crossing(ops, late, early, possible, available)
    stash = tuple(sorted(crossing, key=lambda value: value.number))
    can_be_first = [op for op in ops if possible.issuperset(op.outputs)]
    return Cut(pruned(can_be_first, wanted | crossing), pruned(ops, late, available | crossing), stash)


def _with_exchanges(
    ops: Sequence[Op], wanted: set[Variable], late: set[Variable], absent: set[Variable]
) -> set[Variable]:
    """What the first part makes: what its outputs need, and exchanges of the second that cost no product more."""
    early = needs(ops, wanted)
    if not any(op.exchanges for op in ops):
        return early
    live = needs(ops, late) | early
    made = {output: op for op in ops for output in op.outputs}
    for op in ops:
        if not op.exchanges or op.scan is not None or not any(v in live and v not in early for v in op.outputs):
            continue
        slice_ = needs(ops, op.inputs)  # everything before it, of which some is made already
        more = {id(made[v]): made[v] for v in slice_ if v in made and v not in early}.values()
        if not slice_ & absent and not any(one.heavy for one in more):
            early |= slice_ | set(op.outputs)
    return early


def _possible(program: Program, early: set[Variable], absent: set[Variable]) -> set[Variable]:
    """What the first part can make without more than cheap work besides its own."""
    possible = early | ({*program.inputs, *program.constants} - absent)
    for op in program.ops:
        if op.scan is not None or op.branches is not None:
            continue  # those of its outputs that the first part makes anyway
        has_inputs = all(value in possible for value in op.inputs if isinstance(value, Variable))
        if not early.isdisjoint(op.outputs) or (has_inputs and not op.heavy):
            possible.update(op.outputs)
    return possible


def _crossing(
    ops: Sequence[Op], late: set[Variable], early: set[Variable], possible: set[Variable], available: set[Variable]
) -> set[Variable]:
    """The values of fewest bytes of which the second part can make the rest.

    A value is two nodes, and the edge between them is cut if it crosses. Its first node is on the source's side if the
    first part makes it, its second if the second part lacks it: what makes it again has its inputs, hence edges of
    infinite capacity from theirs.
    """
    made = {output: op for op in ops for output in op.outputs}
    pinned = [op for op in ops if not possible.issuperset(op.outputs)]

    def crossable(values: Iterable[Value]) -> list[Variable]:
        return [v for v in values if isinstance(v, Variable) and v in possible and v not in available]

    needed = crossable([*late, *(value for op in pinned for value in op.inputs)])
    edges: list[tuple[Any, Any, float]] = [((value, "there"), "sink", math.inf) for value in needed]
    found = dict.fromkeys(needed)
    todo = list(found)
    while todo:
        value = todo.pop()
        size = math.prod(value.shape) * value.dtype.itemsize
        edges.append(((value, "made"), (value, "there"), _BYTE * size))
        op = made.get(value)
        if op is None or op.heavy or (value in early and op.name.startswith(_REDUCTIONS)):
            edges.append(("source", (value, "made"), math.inf))
            continue
        edges.append(("source", (value, "made"), size) if value in early else ((value, "made"), "sink", size))
        inputs = crossable(op.inputs)
        edges += [((before, "there"), (value, "made"), math.inf) for before in inputs]
        todo += [before for before in dict.fromkeys(inputs) if before not in found]
        found.update(dict.fromkeys(inputs))
    side = min_cut(edges, "source", "sink")
    return {value for value in found if (value, "made") in side and (value, "there") not in side}


def _cut_scan(op: Op, now: Sequence[bool], then: Sequence[bool], possible: set[Variable]) -> tuple[Op, Op]:
    """A scan as two: the first makes the outputs wanted now and the stash of every turn, the second the others."""
    assert op.scan is not None
    body, consts, carries = op.scan.body, op.scan.consts, op.scan.carries
    _, early = scan_needs(op.scan, now)
    first = [*early, *now[carries:]]
    _, late = scan_needs(op.scan, then)
    late = [wanted and not carried for wanted, carried in zip(late, early, strict=True)]
    second = [*late, *(t and not n for t, n in zip(then[carries:], now[carries:], strict=True))]
    # A carry of the first part is gone when the second runs; one of the second is its own.
    kept = [True] * consts + [not carried for carried in early] + [True] * (len(body.inputs) - consts - carries)
    absent = {v for v, carried in zip(body.inputs[consts:][:carries], early, strict=True) if not carried}
    absent |= _absent(body, op.inputs, possible)
    outputs, flags = _either(body.outputs, first, second)
    parts = cut(body._replace(outputs=outputs), flags, kept, absent)
    length = op.scan.settings["length"]
    stacked = {value: new_variable(value, lead=(length,)) for value in parts.stash}
    one = part_of_scan(op, parts.first, early, first, given=stacked)
    two = part_of_scan(op, parts.second, late, second, taken=stacked)
    return one, two


def _cut_cond(op: Op, now: Sequence[bool], then: Sequence[bool], possible: set[Variable]) -> tuple[Op, Op]:
    """A conditional as two: the first makes the outputs wanted now and the stash of the branch that runs."""
    assert op.branches is not None
    cuts: list[Cut] = []
    for branch in op.branches:
        outputs, flags = _either(branch.outputs, now, then)
        absent = _absent(branch, op.inputs[1:], possible)
        cuts.append(cut(branch._replace(outputs=outputs), flags, [True] * len(branch.inputs), absent))
    shared = _shared_places(op, cuts)
    one = part_of_cond(op, [parts.first for parts in cuts], now, given=shared)
    two = part_of_cond(op, [parts.second for parts in cuts], then, taken=shared)
    return one, two


def _absent(inside: Program, outside: Sequence[Value], possible: set[Variable]) -> set[Variable]:
    """The inputs of a body or a branch that the first part does not have."""
    pairs = zip(inside.inputs, outside, strict=True)
    return {v for v, value in pairs if isinstance(value, Variable) and value not in possible}


def _shared_places(op: Op, cuts: Sequence[Cut]) -> list[dict[Variable, Variable]]:
    """For each branch its stash -> further outputs of the first part: one branch runs, so they share those alike."""
    places: dict[Any, Variable] = {}
    shared: list[dict[Variable, Variable]] = []
    for parts in cuts:
        alike: collections.Counter = collections.Counter()
        shared.append({})
        for value in parts.stash:
            kind = (value.shape, value.dtype, value.axes)
            alike[kind] += 1
            shared[-1][value] = places.setdefault((kind, alike[kind]), new_variable(value))
    return shared


def _either(outputs: Sequence[Value], first: Sequence[bool], second: Sequence[bool]):
    """The outputs wanted by either part, and which of them by the first."""
    both = [(v, f) for v, f, s in zip(outputs, first, second, strict=True) if f or s]
    return tuple(v for v, _ in both), [f for _, f in both]
