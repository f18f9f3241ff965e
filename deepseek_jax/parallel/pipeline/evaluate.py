"""Runs programs, with arrays read and written where they lie.

A stack of what waits, a ring of the pipeline, has a row per microbatch; a scan over layers reads the layers of a row
one by one, and gives such a row. Taken out of the stack before the scan, and put into it after, a row is copied twice.
So a `Row` may stand in the place of an array: a scan reads each turn's part from the stack, and writes it into it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from deepseek_jax.parallel.pipeline.program import Op, Value, Variable


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """A row of a stack `[rows, ...]`: in the place of an input read from it, in that of an output written into it."""

    stack: jax.Array
    number: jax.Array | int
    """int32 scalar."""
    adds: bool = False
    """What is written is added to what is there."""

    def read(self) -> jax.Array:
        """The row, as an array."""
        return lax.dynamic_index_in_dim(self.stack, self.number, keepdims=False)

    def part(self, turn: jax.Array) -> jax.Array:
        """One turn's part of the row, of the shape that is left of it."""
        shape = self.stack.shape[2:]
        return lax.dynamic_slice(self.stack, self._begin(turn), (1, 1, *shape)).reshape(shape)

    def written(self, value: jax.Array) -> jax.Array:
        """The stack with `value` in the row, or added to it."""
        if self.adds:
            return self.stack.at[self.number].add(value.astype(self.stack.dtype))
        return lax.dynamic_update_index_in_dim(self.stack, value, self.number, 0)

    def written_part(self, turn: jax.Array, value: jax.Array) -> jax.Array:
        """The stack with `value` as one turn's part of the row, or added to it."""
        if self.adds:
            return self.stack.at[self.number, turn].add(value.astype(self.stack.dtype))
        return lax.dynamic_update_slice(self.stack, value[None, None], self._begin(turn))

    def _begin(self, turn: jax.Array) -> tuple[jax.Array | int, ...]:
        return (jnp.asarray(self.number, jnp.int32), turn, *[jnp.int32(0)] * (self.stack.ndim - 2))


@dataclasses.dataclass(frozen=True, eq=False)
class Turns:
    """What a scan repeats, and how what it reads and gives divides."""

    constants: dict[Variable, Any]
    ops: Sequence[Op]
    held: Sequence[Variable]
    """The same in every turn."""
    carried: Sequence[Variable]
    mapped: Sequence[Variable]
    """Of stacks, a part in each turn."""
    ends: Sequence[Value]
    """What is carried on."""
    gives: Sequence[Value]
    """Parts of stacks."""
    settings: Mapping[str, Any]

    def run(self, values: Sequence[Any], into: Sequence[Row | None] = ()) -> Sequence[Any]:
        """The results of `lax.scan` on these inputs: ends, then stacks.

        Args:
          values: what is held, what is carried at first, and stacks, or rows in the place of any.
          into: for each stack that is given, the row that it is written into, part by part; the result in its place is
            the stack that has this row.
        """
        held, rest = [as_array(value) for value in values[: len(self.held)]], values[len(self.held) :]
        begin, xs = [as_array(value) for value in rest[: len(self.carried)]], rest[len(self.carried) :]
        targets = dict(enumerate(into or [None] * len(self.gives)))
        rows = {place: row for place, row in targets.items() if row is not None}
        in_place = any(isinstance(x, Row) for x in xs) or rows

        def turn(carry: Any, inputs: Any) -> Any:
            (carried, stacks), (number, parts) = carry, inputs
            parts = iter(parts)
            env = dict(self.constants)
            env.update(zip(self.held, held, strict=True))
            env.update(zip(self.carried, carried, strict=True))
            env.update(
                (v, x.part(number) if isinstance(x, Row) else next(parts)) for v, x in zip(self.mapped, xs, strict=True)
            )
            results = evaluate(self.ops, env, [*self.ends, *self.gives])
            ends, given = results[: len(self.ends)], results[len(self.ends) :]
            stacks = [
                dataclasses.replace(row, stack=stack).written_part(number, given[place])
                for (place, row), stack in zip(rows.items(), stacks, strict=True)
            ]
            return (ends, stacks), [y for place, y in enumerate(given) if place not in rows]

        numbers = jnp.arange(self.settings["length"], dtype=jnp.int32) if in_place else None
        inputs = (numbers, [x for x in xs if not isinstance(x, Row)])
        start = (begin, [row.stack for row in rows.values()])
        (ends, stacks), given = lax.scan(turn, start, inputs, **self.settings)
        whole, in_rows = iter(given), iter(stacks)
        return [*ends, *(next(in_rows) if place in rows else next(whole) for place in targets)]


def turns_of(op: Op) -> Turns | None:
    """What a scan, or a part of one, repeats; None for what is none."""
    if op.turns is not None or op.scan is None:
        return op.turns
    body, consts, carries, settings = op.scan
    held, carried, mapped = body.inputs[:consts], body.inputs[consts:][:carries], body.inputs[consts + carries :]
    return Turns(
        body.constants, body.ops, held, carried, mapped, body.outputs[:carries], body.outputs[carries:], settings
    )


def rows_of(tree: Any, number: jax.Array | int, *, adds: bool = False) -> Any:
    """The rows of that number of a tree of stacks."""
    return jax.tree.map(lambda stack: Row(stack, number, adds), tree)


def as_array(value: Any) -> Any:
    """A row as an array; anything else as it is."""
    return value.read() if isinstance(value, Row) else value


def evaluate(
    ops: Iterable[Op], env: dict[Variable, Any], wanted: Sequence[Value], into: Sequence[Row | None] | None = None
) -> list[Any]:
    """Runs equations on the values in `env`, and returns those wanted.

    Args:
      ops: equations, in an order in which they can run.
      env: values to begin with, arrays or rows; what is made is added.
      wanted: whose values are returned, as arrays.
      into: for each of these None, or the row that it is written into, whose stack is returned in its place.
    """
    ops = list(ops)
    rows = list(into or [None] * len(wanted))
    # What nothing else asks for goes into its row part by part.
    uses = collections.Counter(v for v in (*wanted, *(v for op in ops for v in op.inputs)) if isinstance(v, Variable))
    alone = [isinstance(v, Variable) and uses[v] == 1 and v not in env for v in wanted]
    straight = {v: row for v, row, one in zip(wanted, rows, alone, strict=True) if one and row is not None}
    written: set[Value] = set()

    def read(value: Value) -> Any:
        return value.val if isinstance(value, core.Literal) else env[value]

    for op in ops:
        values, turns = [read(value) for value in op.inputs], turns_of(op)
        stacks = op.outputs[len(turns.carried) :] if turns else ()
        targets = [straight.get(output) for output in stacks]
        with jax.named_scope(op.scope) if op.scope else contextlib.nullcontext():
            if turns and any(isinstance(one, Row) for one in (*values, *targets)):
                results = turns.run(values, targets)
                written.update(output for output, target in zip(stacks, targets, strict=True) if target is not None)
            else:
                results = op.run(values if op.reads_rows else [as_array(value) for value in values])
        env.update(zip(op.outputs, results, strict=True))

    def result(value: Value, row: Row | None) -> Any:
        if row is None or (isinstance(value, Variable) and value in written):
            return as_array(read(value))
        return row.written(as_array(read(value)))

    return [result(value, row) for value, row in zip(wanted, rows, strict=True)]
