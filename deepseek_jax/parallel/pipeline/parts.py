"""Parts of programs: what some outputs need, and scans and conditionals restricted to some of their equations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.compat import to_varying
from deepseek_jax.parallel.pipeline.evaluate import Turns, evaluate
from deepseek_jax.parallel.pipeline.program import Op, Program, Scan, Value, Variable


def needs(ops: Sequence[Op], wanted: Iterable[Value]) -> set[Variable]:
    """Every value that the wanted ones are made of; of a loop's or a branch's inputs those that its outputs need."""
    needed = {value for value in wanted if isinstance(value, Variable)}
    for op in reversed(ops):
        used = [output in needed for output in op.outputs]
        if any(used):
            inputs = zip(op.inputs, _inputs_needed(op, used), strict=True)
            needed.update(v for v, n in inputs if n and isinstance(v, Variable))
    return needed


def wanted_of(program: Program, wanted: Sequence[bool]) -> list[Value]:
    """The outputs that are wanted."""
    return [value for value, w in zip(program.outputs, wanted, strict=True) if w]


def _inputs_needed(op: Op, used: Sequence[bool]) -> Sequence[bool]:
    if op.scan is not None:
        return scan_needs(op.scan, used)[0]
    if op.branches is not None:
        needed = [needs(branch.ops, wanted_of(branch, used)) for branch in op.branches]
        places = range(len(op.inputs) - 1)
        return [True, *(any(b.inputs[i] in n for b, n in zip(op.branches, needed, strict=True)) for i in places)]
    return [True] * len(op.inputs)


def scan_needs(scan: Scan, used: Sequence[bool]) -> tuple[list[bool], list[bool]]:
    """Which inputs, and which carries, a scan needs for the outputs that are used: a carry feeds the next turn."""
    carried = list(used[: scan.carries])
    while True:
        needed = needs(scan.body.ops, wanted_of(scan.body, [*carried, *used[scan.carries :]]))
        inputs = [value in needed for value in scan.body.inputs]
        more = [c or n for c, n in zip(carried, inputs[scan.consts :][: scan.carries], strict=True)]
        if more == carried:
            return inputs, carried
        carried = more


def pruned(ops: Sequence[Op], wanted: Iterable[Value], given: Collection[Variable] = ()) -> list[Op]:
    """The equations that the wanted values need besides those given, and of loops and branches no more than that."""
    kept: list[Op] = []
    needed = {value for value in wanted if isinstance(value, Variable)}
    for op in reversed(ops):
        used = [output in needed and output not in given for output in op.outputs]
        if any(used):
            kept.append(restricted(op, used))
            needed.update(value for value in kept[-1].inputs if isinstance(value, Variable))
    return kept[::-1]


def restricted(op: Op, used: Sequence[bool]) -> Op:
    """An equation without those of its outputs that are not used, and without the inputs that only they need."""
    if (op.scan is None and op.branches is None) or (all(used) and all(_inputs_needed(op, used))):
        return op
    if op.scan is not None:
        _, carried = scan_needs(op.scan, used)
        return part_of_scan(op, op.scan.body.ops, carried, [*carried, *used[op.scan.carries :]])
    return part_of_cond(op, [branch.ops for branch in op.branches or ()], used)


# --- parts of loops and branches --------------------------------------------------------------------------------------


def part_of_scan(
    op: Op,
    ops: Sequence[Op],
    carried: Sequence[bool],
    wanted: Sequence[bool],
    taken: Mapping[Variable, Variable] | None = None,
    given: Mapping[Variable, Variable] | None = None,
    at_once: bool = False,
) -> Op:
    """A scan of some of a body's equations.

    Args:
      op: the whole scan.
      ops: equations of its body, or parts of them.
      carried: which of its carries this part has.
      wanted: which of the body's outputs it makes, carries included.
      taken: values of the body -> the stacks of them that the part takes besides.
      given: values of the body -> the stacks of them that it gives besides.
      at_once: do all turns at once, not one after the other; for equations that use no carry.
    """
    assert op.scan is not None
    taken, given = taken or {}, given or {}
    body, consts, carries = op.scan.body, op.scan.consts, op.scan.carries
    settings = op.scan.settings
    results = [*wanted_of(body, wanted), *given]
    ops, needed = pruned(ops, results), needs(ops, results)
    places = range(consts + carries, len(body.inputs))
    fixed = [i for i in range(consts) if body.inputs[i] in needed]
    looped = [consts + i for i in range(carries) if carried[i]]
    mapped = [i for i in places if body.inputs[i] in needed]
    ys = [i for i in range(carries, len(body.outputs)) if wanted[i]]
    outs = [i for i in range(carries) if carried[i]]

    of = body.inputs
    held, carried_on, parts = [of[i] for i in fixed], [of[i] for i in looped], [*(of[i] for i in mapped), *taken]
    ends, gives = [body.outputs[i] for i in outs], [*(body.outputs[i] for i in ys), *given]
    turns = Turns(body.constants, ops, held, carried_on, parts, ends, gives, settings)

    def run_at_once(values: Sequence[Any]) -> Sequence[Any]:
        held, stacks = values[: len(fixed)], values[len(fixed) :]

        def turn(xs):
            env = dict(body.constants) | dict(zip(turns.held, held, strict=True))
            return evaluate(ops, env | dict(zip(turns.mapped, xs, strict=True)), turns.gives)

        return jax.vmap(turn, axis_size=settings["length"])(tuple(stacks))

    inputs = (*(op.inputs[i] for i in (*fixed, *looped, *mapped)), *taken.values())
    outputs = (*(op.outputs[i] for i in (*outs, *ys)), *given.values())
    if at_once:
        return Op("scan", inputs, outputs, run_at_once, scope=op.scope)
    return Op("scan", inputs, outputs, turns.run, scope=op.scope, turns=turns)


def part_of_cond(
    op: Op,
    ops: Sequence[Sequence[Op]],
    wanted: Sequence[bool],
    taken: Sequence[Mapping[Variable, Variable]] | None = None,
    given: Sequence[Mapping[Variable, Variable]] | None = None,
) -> Op:
    """A conditional of some of its branches' equations.

    Args:
      op: the whole conditional.
      ops: for each branch equations of it, or parts of them.
      wanted: which of its outputs this part makes.
      taken: for each branch its values -> further inputs of the part, which branches may share.
      given: for each branch its values -> further outputs of the part; where a branch gives none, they are zero.
    """
    assert op.branches is not None
    branches = op.branches
    taken = taken or [{}] * len(branches)
    given = given or [{}] * len(branches)
    results = [[*wanted_of(branch, wanted), *gives] for branch, gives in zip(branches, given, strict=True)]
    needed = [needs(ones, values) for ones, values in zip(ops, results, strict=True)]
    ops = [pruned(ones, values) for ones, values in zip(ops, results, strict=True)]
    places = range(len(op.inputs) - 1)
    used = [i for i in places if any(b.inputs[i] in n for b, n in zip(branches, needed, strict=True))]
    outputs = [output for output, w in zip(op.outputs, wanted, strict=True) if w]
    more_inputs = list(dict.fromkeys(variable for takes in taken for variable in takes.values()))
    more_outputs = list(dict.fromkeys(variable for gives in given for variable in gives.values()))

    def branch_of(which: int) -> Callable:
        branch, takes = branches[which], taken[which]
        gives = {variable: value for value, variable in given[which].items()}

        def run_branch(*values):
            env = dict(branch.constants)
            env.update(zip((branch.inputs[i] for i in used), values, strict=False))
            stash = dict(zip(more_inputs, values[len(used) :], strict=True))
            env.update((value, stash[variable]) for value, variable in takes.items())
            results = evaluate(ops[which], env, wanted_of(branch, wanted))
            results += [env[gives[v]] if v in gives else jnp.zeros(v.shape, v.dtype) for v in more_outputs]
            # The branches must agree on where their outputs vary.
            return [to_varying(r, sorted(v.axes)) for r, v in zip(results, [*outputs, *more_outputs], strict=True)]

        return run_branch

    def run(values: Sequence[Any]) -> Sequence[Any]:
        return lax.switch(values[0], [branch_of(which) for which in range(len(branches))], *values[1:])

    inputs = (op.inputs[0], *(op.inputs[1 + i] for i in used), *more_inputs)
    return Op("cond", inputs, (*outputs, *more_outputs), run, scope=op.scope)
