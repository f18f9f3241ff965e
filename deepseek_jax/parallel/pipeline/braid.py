"""Two programs as one whose exchanges run beside each other's compute: a stage's forward pass and another's backward.

DualPipe's overlap (section 3.2.1) needs the tokens of one microbatch to travel while another is computed. Two scans
over layers, one after the other, are two loops, which no compiler runs side by side. So scans of equal length become
one scan, whose turns hold layer i of the one and, where the other goes backwards, layer n - 1 - i of the other. In it,
and around it, the equations of both are laid out in turn, from exchange to exchange: one waits, the other computes.
Each keeps its own order and shares nothing with the other, so values are those of the two calls.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.compat import to_varying
from deepseek_jax.parallel.pipeline.evaluate import Row, as_array, evaluate
from deepseek_jax.parallel.pipeline.program import Op, Program, Scan, Variable, flatten


def braid(first: Callable, second: Callable) -> Callable[[Sequence[Any], Sequence[Any]], tuple[Any, Any]]:
    """`(arguments of first, arguments of second) -> (result of first, result of second)`, as one interleaved program.

    For example `braid(split.forward, split.gradients)`; arguments and results are pytrees of arrays, or arguments of
    rows in their place.
    """

    def run(first_arguments: Sequence[Any], second_arguments: Sequence[Any]) -> tuple[Any, Any]:
        traced = [_trace(first, first_arguments), _trace(second, second_arguments)]
        programs, structures = [one for one, _ in traced], [structure for _, structure in traced]
        env: dict[Variable, Any] = {}
        for program, arguments in zip(programs, (first_arguments, second_arguments), strict=True):
            env |= program.constants | dict(zip(program.inputs, jax.tree.leaves(arguments), strict=True))
        ops = weave(programs[0].ops, programs[1].ops)
        values = evaluate(ops, env, [value for program in programs for value in program.outputs])
        count = len(programs[0].outputs)
        return jax.tree.unflatten(structures[0], values[:count]), jax.tree.unflatten(structures[1], values[count:])

    return run


def _trace(function: Callable, arguments: Sequence[Any]) -> tuple[Program, Any]:
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*jax.tree.map(as_array, arguments))
    return flatten(closed), jax.tree.structure(shapes)


def weave(first: Sequence[Op], second: Sequence[Op], *, inside: bool = False) -> list[Op]:
    """The equations of two programs in one order, with pairs of their scans made one.

    Args:
      first: equations in an order in which they can run.
      second: those of the other program.
      inside: whether they are a loop's body, where only loops that communicate are worth making one.
    """
    woven: list[Op] = []
    begin_first = begin_second = 0
    for i, j in _pairs(first, second, inside):
        woven += interleave(first[begin_first:i], second[begin_second:j])
        woven.append(_one_scan(first[i], second[j]))
        begin_first, begin_second = i + 1, j + 1
    return woven + interleave(first[begin_first:], second[begin_second:])


def _pairs(first: Sequence[Op], second: Sequence[Op], inside: bool) -> list[tuple[int, int]]:
    """Places of scans of equal length, in the order of both programs, that have as much in them as can be had.

    Where scans communicate it is those that matter: others are compute, to be laid beside an exchange.
    """
    scans = [[(place, op.scan) for place, op in enumerate(ops) if op.scan is not None] for ops in (first, second)]
    if inside or any(op.scan is not None and op.exchanges for op in (*first, *second)):
        both = zip((first, second), scans, strict=True)
        scans = [[(place, scan) for place, scan in found if ops[place].exchanges] for ops, found in both]
    # The longest common subsequence, each pair counting as much as the smaller of the two.
    rows, columns = scans
    best: dict[tuple[int, int], tuple[int, list[tuple[int, int]]]] = {}
    for a, b in itertools.product(range(len(rows) + 1), range(len(columns) + 1)):
        found = [best[a - 1, b]] if a else [(0, [])]
        found += [best[a, b - 1]] if b else []
        if a and b:
            (i, one), (j, other) = rows[a - 1], columns[b - 1]
            if one.settings["length"] == other.settings["length"]:
                size, pairs = best[a - 1, b - 1]
                found.append((size + min(first[i].size, second[j].size), [*pairs, (i, j)]))
        best[a, b] = max(found, key=lambda one: one[0])
    return best[len(rows), len(columns)][1]


# --- in turn ----------------------------------------------------------------------------------------------------------


class _List:
    """What is left of one program's equations, and which of them can run."""

    def __init__(self, ops: Sequence[Op]):
        makes = {output: place for place, op in enumerate(ops) for output in op.outputs}
        before = [{makes[v] for v in op.inputs if isinstance(v, Variable) and v in makes} for op in ops]
        self.ops = ops
        self.after: list[list[int]] = [[] for _ in ops]
        self.awaited = [len(places) for places in before]
        self.ready_at = [0.0] * len(ops)
        for place, places in enumerate(before):
            for earlier in places:
                self.after[earlier].append(place)
        self.urgent = [op.exchanges > 0 for op in ops]  # or an exchange needs it
        for place in reversed(range(len(ops))):
            if self.urgent[place]:
                for earlier in before[place]:
                    self.urgent[earlier] = True
        self.left = sum(op.work for op in ops)
        self.exchanges = sum(op.exchanges > 0 for op in ops)
        self.coming: list[tuple[float, int]] = []
        """Those that wait for an exchange alone, by the time when it ends."""
        self.can_run: dict[bool, list[int]] = {True: [], False: []}
        """Those that can run now, by whether they are urgent."""
        for place, count in enumerate(self.awaited):
            if not count:
                heapq.heappush(self.coming, (0.0, place))

    def look(self, now: float) -> None:
        """Finds what can run by now."""
        while self.coming and self.coming[0][0] <= now:
            _, place = heapq.heappop(self.coming)
            heapq.heappush(self.can_run[self.urgent[place]], place)

    def take(self, urgent: bool, now: float, duration: float) -> tuple[Op, float]:
        """Runs the first that can: the equation, and the time after it. An exchange takes no time but ends later."""
        place = heapq.heappop(self.can_run[urgent])
        op = self.ops[place]
        work = 0 if op.exchanges else op.work
        now, ends = (now, now + duration) if op.exchanges else (now + work, now + work)
        self.left -= op.work
        self.exchanges -= op.exchanges > 0
        for later in self.after[place]:
            self.awaited[later] -= 1
            self.ready_at[later] = max(self.ready_at[later], ends)
            if not self.awaited[later]:
                heapq.heappush(self.coming, (self.ready_at[later], later))
        return op, now


def interleave(first: Sequence[Op], second: Sequence[Op]) -> list[Op]:
    """The equations of two programs in the order in which one device would run them, exchanges going on beside.

    Each exchange is taken to last as long as its even share of all the work. What exchanges need goes first, and of the
    two programs the one with more left; what no exchange needs, such as weight gradients, fills the gaps.
    """
    lists = [_List(first), _List(second)]
    duration = sum(one.left for one in lists) / max(sum(one.exchanges for one in lists), 1)
    now = 0.0
    found: list[Op] = []
    while len(found) < len(first) + len(second):
        for one in lists:
            one.look(now)
        able = [(urgent, one) for urgent in (True, False) for one in lists if one.can_run[urgent]]
        if not able:
            now = min(one.coming[0][0] for one in lists if one.coming)
            continue
        urgent, one = max(able, key=lambda choice: (choice[0], choice[1].left + duration * choice[1].exchanges))
        op, now = one.take(urgent, now, duration)
        found.append(op)
    return found


# --- two scans as one -------------------------------------------------------------------------------------------------


def _one_scan(first: Op, second: Op) -> Op:
    """Two scans of equal length as one, in the direction of the first.

    If the second goes the other way, it reads and writes its stacks by number: turned round they would be copied. Rows
    of stacks are read so too.
    """
    one, other = first.scan, second.scan
    assert one is not None
    assert other is not None
    length, reverse, unroll = (one.settings[name] for name in ("length", "reverse", "unroll"))
    against = other.settings["reverse"] != reverse
    ops = weave(one.body.ops, other.body.ops, inside=True)
    constants = one.body.constants | other.body.constants

    def run(values: Sequence[Any]) -> Sequence[Any]:
        held, carry, one_xs = _divided(one, values[: len(first.inputs)])
        other_held, other_carry, other_xs = _divided(other, values[len(first.inputs) :])
        stacks = [_zeros(output) for output in second.outputs[other.carries :]] if against else []

        def turn(carried, inputs):
            number, xs, turned = inputs
            carry, other_carry, stacks = carried
            place = length - 1 - number
            xs = _parts(one_xs, iter(xs), number)
            if against:
                turned = [lax.dynamic_index_in_dim(x, place, keepdims=False) for x in _arrays(other_xs)]
            turned = _parts(other_xs, iter(turned), place if against else number)
            env = dict(constants)
            env.update(zip(one.body.inputs, (*held, *carry, *xs), strict=True))
            env.update(zip(other.body.inputs, (*other_held, *other_carry, *turned), strict=True))
            results = evaluate(ops, env, (*one.body.outputs, *other.body.outputs))
            carry, results = results[: one.carries], results[one.carries :]
            ys, results = results[: len(first.outputs) - one.carries], results[len(first.outputs) - one.carries :]
            other_carry, other_ys = results[: other.carries], results[other.carries :]
            if against:
                put = lax.dynamic_update_index_in_dim
                stacks = [put(stack, y, place, 0) for stack, y in zip(stacks, other_ys, strict=True)]
                other_ys = []
            return (carry, other_carry, stacks), (ys, other_ys)

        read = [] if against else _arrays(other_xs)
        begin, inputs = (carry, other_carry, stacks), (jnp.arange(length, dtype=jnp.int32), _arrays(one_xs), read)
        ends, (ys, other_ys) = lax.scan(turn, begin, inputs, length=length, reverse=reverse, unroll=unroll)
        carry, other_carry, stacks = ends
        return (*carry, *ys, *other_carry, *stacks, *other_ys)

    return Op("scan", (*first.inputs, *second.inputs), (*first.outputs, *second.outputs), run, reads_rows=True)


def _divided(scan: Scan, values: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """A scan's inputs as constants, carry, and what turns read, which may be rows."""
    begin = scan.consts + scan.carries
    whole = [as_array(value) for value in values[:begin]]
    return whole[: scan.consts], whole[scan.consts :], list(values[begin:])


def _arrays(xs: Sequence[Any]) -> list[Any]:
    return [x for x in xs if not isinstance(x, Row)]


def _parts(xs: Sequence[Any], parts: Iterator[Any], turn: jax.Array) -> list[Any]:
    """What a turn reads of stacks, whose parts are given, and of rows."""
    return [x.part(turn) if isinstance(x, Row) else next(parts) for x in xs]


def _zeros(like: Variable) -> jax.Array:
    return to_varying(jnp.zeros(like.shape, like.dtype), sorted(like.axes))
