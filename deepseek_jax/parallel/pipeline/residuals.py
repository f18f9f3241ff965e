"""What the forward pass leaves for the backward pass: nothing twice, and nothing that is cheap to make again.

What depends on weights and fixed inputs alone (casts, scaled or transposed weights, rotary tables, masks) would be kept
once for every microbatch in flight. It is made again of them, unless that takes a product, a loop or an exchange.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from deepseek_jax.parallel.pipeline.evaluate import evaluate
from deepseek_jax.parallel.pipeline.parts import needs, part_of_scan, pruned
from deepseek_jax.parallel.pipeline.program import Op, Program, Value, Variable, is_nothing


def divide(
    program: Program, residuals: Sequence[Value], lasting: Sequence[Variable]
) -> tuple[list[Variable], list[Op]]:
    """Those residuals that must be kept, each once, and the equations that make the others of inputs that last."""
    cheap, reached = _cheaply_made(program.ops, {*lasting, *program.constants})
    variables = dict.fromkeys(value for value in residuals if isinstance(value, Variable))
    kept = [value for value in variables if value not in reached]
    return kept, pruned(cheap, [value for value in variables if value in reached])


def _cheaply_made(ops: Sequence[Op], begin: Iterable[Variable]) -> tuple[list[Op], set[Variable]]:
    """What is made of these values alone without a product, a loop or an exchange: the equations, and their outputs."""
    reached = set(begin)
    cheap: list[Op] = []
    for op in ops:
        if op.scan is not None:
            found = _of_all_turns(op, reached)
        elif op.branches is not None:
            found = _without_branching(op, reached)
        else:
            found = [] if op.heavy or not all(_is_there(value, reached) for value in op.inputs) else [op]
        cheap += found
        reached.update(output for one in found for output in one.outputs)
    return cheap, reached


def _is_there(value: Value, reached: set[Variable]) -> bool:
    return not isinstance(value, Variable) or value in reached


def _of_all_turns(op: Op, reached: set[Variable]) -> list[Op]:
    """The stacks that a scan makes cheaply of what is not carried, for all its turns at once."""
    assert op.scan is not None
    body, consts, carries = op.scan.body, op.scan.consts, op.scan.carries
    there = [_is_there(value, reached) for value in op.inputs]
    there[consts : consts + carries] = [False] * carries
    begin = {*body.constants, *(v for v, t in zip(body.inputs, there, strict=True) if t)}
    cheap, inside = _cheaply_made(body.ops, begin)
    wanted = [place >= carries and _is_there(value, inside) for place, value in enumerate(body.outputs)]
    return [part_of_scan(op, cheap, [False] * carries, wanted, at_once=True)] if any(wanted) else []


def _without_branching(op: Op, reached: set[Variable]) -> list[Op]:
    """Outputs that mean something in one branch alone, where that makes them cheaply: they are made whichever runs."""
    branches = op.branches or ()
    meant = [
        [which for which, branch in enumerate(branches) if not is_nothing(branch, branch.outputs[place])]
        for place in range(len(op.outputs))
    ]
    found = []
    for which, branch in enumerate(branches):
        begin = {v for v, value in zip(branch.inputs, op.inputs[1:], strict=True) if _is_there(value, reached)}
        cheap, inside = _cheaply_made(branch.ops, {*begin, *branch.constants})
        outputs = zip(branch.outputs, meant, strict=True)
        places = [i for i, (v, m) in enumerate(outputs) if m == [which] and _is_there(v, inside)]
        if places:
            found.append(_part_of_branch(op, branch, cheap, places))
    return found


def _part_of_branch(op: Op, branch: Program, ops: Sequence[Op], places: Sequence[int]) -> Op:
    wanted = [branch.outputs[place] for place in places]
    needed = needs(ops, wanted)
    used = [i for i, variable in enumerate(branch.inputs) if variable in needed]
    ops = pruned(ops, wanted)

    def run(values: Sequence[Any]) -> Sequence[Any]:
        env = dict(branch.constants) | dict(zip((branch.inputs[i] for i in used), values, strict=True))
        return evaluate(ops, env, wanted)

    return Op(
        "branch", tuple(op.inputs[1 + i] for i in used), tuple(op.outputs[i] for i in places), run, scope=op.scope
    )
