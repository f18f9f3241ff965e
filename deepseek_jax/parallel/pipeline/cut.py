"""Cutting a program in two: what some of its outputs need, and what the others need besides.

A scan or a conditional that both parts need is cut inside. Of a scan the first part gives the values that cross the
cut as further outputs, a stack each, and the second scans over these. Of a conditional every branch is cut, and the
first part gives what any of its branches has to give.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from deepseek_jax.parallel.pipeline.parts import needs, part_of_cond, part_of_scan, restricted, scan_needs
from deepseek_jax.parallel.pipeline.program import Op, Program, Value, Variable, new_variable

_CHEAP = frozenset(
    (
        *("add", "sub", "mul", "div", "neg", "max", "min", "exp", "log", "tanh", "logistic", "rsqrt", "sqrt", "square"),
        *("integer_pow", "pow", "abs", "sign", "select_n", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not"),
        *("convert_element_type", "broadcast_in_dim", "reshape", "transpose", "squeeze", "iota", "copy", "name"),
        *("pvary", "pcast"),
    )
)
"""What the second part may compute again rather than be given: no equation that reads more than it writes, and no
product."""


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
    early = _with_exchanges(program.ops, wanted, late, set(absent))
    available = {v for v, k in zip(program.inputs, kept, strict=True) if k} | set(program.constants)
    gone = {v for v, k in zip(program.inputs, kept, strict=True) if not k}
    part_one: list[Op] = []
    part_two: list[Op] = []
    made: dict[Variable, Op] = {}
    for op in reversed(program.ops):
        now = [output in early for output in op.outputs]
        then = [output in late and output not in early for output in op.outputs]
        if any(now) and any(then) and (op.scan is not None or op.branches is not None):
            one, two = _cut_scan(op, now, then) if op.scan is not None else _cut_cond(op, now, then)
            part_one.append(one)
            part_two.append(two)
            late.update(value for value in two.inputs if isinstance(value, Variable))
            made.update(dict.fromkeys(one.outputs, one))
        elif any(now):
            part_one.append(one := restricted(op, now))
            made.update(dict.fromkeys(one.outputs, one))
        elif any(then):
            part_two.append(two := restricted(op, then))
            late.update(value for value in two.inputs if isinstance(value, Variable))
    crossing = {value for value in late if value in made or value in gone}
    again, crossing = _computed_again(made, crossing, available)
    order = {id(op): place for place, op in enumerate(program.ops)}
    again.sort(key=lambda op: order[id(op)])
    stash = tuple(sorted(crossing, key=lambda value: value.number))
    return Cut(part_one[::-1], again + part_two[::-1], stash)


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


def _computed_again(
    made: Mapping[Variable, Op], crossing: set[Variable], available: set[Variable]
) -> tuple[list[Op], set[Variable]]:
    """Takes values out of the stash that the second part makes cheaply of what it has anyway."""
    again: list[Op] = []
    for value in sorted(crossing, key=lambda value: value.number, reverse=True):
        op = made.get(value)
        if op is None or op.name not in _CHEAP:
            continue
        rest = (crossing - {value}) | available
        if all(not isinstance(v, Variable) or v in rest for v in op.inputs):
            again.append(op)
            crossing = crossing - set(op.outputs)
    return again, crossing


def _cut_scan(op: Op, now: Sequence[bool], then: Sequence[bool]) -> tuple[Op, Op]:
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
    absent = [v for v, carried in zip(body.inputs[consts:][:carries], early, strict=True) if not carried]
    outputs, flags = _either(body.outputs, first, second)
    parts = cut(body._replace(outputs=outputs), flags, kept, absent)
    length = op.scan.settings["length"]
    stacked = {value: new_variable(value, lead=(length,)) for value in parts.stash}
    one = part_of_scan(op, parts.first, early, first, given=stacked)
    two = part_of_scan(op, parts.second, late, second, taken=stacked)
    return one, two


def _cut_cond(op: Op, now: Sequence[bool], then: Sequence[bool]) -> tuple[Op, Op]:
    """A conditional as two: the first makes the outputs wanted now and the stash of the branch that runs."""
    assert op.branches is not None
    cuts: list[Cut] = []
    for branch in op.branches:
        outputs, flags = _either(branch.outputs, now, then)
        cuts.append(cut(branch._replace(outputs=outputs), flags, [True] * len(branch.inputs)))
    shared = _shared_places(op, cuts)
    one = part_of_cond(op, [parts.first for parts in cuts], now, given=shared)
    two = part_of_cond(op, [parts.second for parts in cuts], then, taken=shared)
    return one, two


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
