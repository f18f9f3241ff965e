"""The backward pass of a stage in two parts: B gives the gradient of its input, W that of its weights, later.

Nothing is computed twice and the model knows nothing of it. `jax.vjp` of the stage is traced once, and its list of
equations is cut: those that the input's gradient needs are B; what the weights' gradients need besides is W; values
that cross the cut are the *stash*. Calls (jit, checkpoint, custom derivatives) are flattened first. A scan over layers
that both parts need is cut inside: B is the scan of the cut body, which gives its stash as further outputs, one for
each layer, and W a scan over these. A loop or a branch is not cut: it belongs to B if B needs any of it. So a custom
VJP must compute the gradients of inputs and of weights in calls of their own, as `ops.grouped_matmul` does.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend import core

from deepseek_jax.compat import scan_sizes

Value = int | core.Literal
"""A value of a program: its number, or a constant written in place."""

_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "checkpoint": "jaxpr", "remat": "jaxpr", "remat2": "jaxpr"}
_CALLS |= {"closed_call": "call_jaxpr", "core_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr"}
_CALLS |= {"custom_vjp_call": "call_jaxpr", "custom_vjp_call_jaxpr": "fun_jaxpr", "custom_lin": "call_jaxpr"}

_CHEAP = frozenset(
    (
        *("add", "sub", "mul", "div", "neg", "max", "min", "exp", "log", "tanh", "logistic", "rsqrt", "sqrt", "square"),
        *("integer_pow", "pow", "abs", "sign", "select_n", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not"),
        *("convert_element_type", "broadcast_in_dim", "reshape", "transpose", "squeeze", "iota", "copy", "name"),
    )
)
"""What W may compute again rather than have stashed: no equation that reads more than it writes, and no product."""


@dataclasses.dataclass(eq=False)
class _Op:
    """One equation: `run` gives its outputs from its inputs."""

    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[int, ...]
    run: Callable[[Sequence[Any]], Sequence[Any]]
    eqn: Any = None


class _Program(NamedTuple):
    """A flat list of equations in an order in which they can run."""

    ops: list[_Op]
    inputs: tuple[int, ...]
    outputs: tuple[Value, ...]
    constants: dict[int, Any]


_numbers = itertools.count()


def _flatten(closed: core.ClosedJaxpr) -> _Program:
    """The program of a jaxpr, with calls written out."""
    ops: list[_Op] = []
    constants: dict[int, Any] = {}

    def walk(jaxpr: core.Jaxpr, consts: Sequence[Any], arguments: Sequence[Value]) -> list[Value]:
        env: dict[Any, Value] = {}

        def read(atom: Any) -> Value:
            return atom if isinstance(atom, core.Literal) else env[atom]

        for var, value in zip(jaxpr.constvars, consts, strict=True):
            constants[number := next(_numbers)] = value
            env[var] = number
        env.update(zip(jaxpr.invars, arguments, strict=True))
        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            if (key := _CALLS.get(eqn.primitive.name)) is not None:
                inner = eqn.params[key]
                inner, inner_consts = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
                results = walk(inner, inner_consts, inputs)
                env.update(zip(eqn.outvars, results, strict=True))
                continue
            outputs = tuple(next(_numbers) for _ in eqn.outvars)
            env.update(zip(eqn.outvars, outputs, strict=True))
            ops.append(_Op(eqn.primitive.name, tuple(inputs), outputs, _bind(eqn), eqn))
        return [read(atom) for atom in jaxpr.outvars]

    inputs = tuple(next(_numbers) for _ in closed.jaxpr.invars)
    return _Program(ops, inputs, tuple(walk(closed.jaxpr, closed.consts, inputs)), constants)


def _bind(eqn: Any) -> Callable[[Sequence[Any]], Sequence[Any]]:
    def run(values: Sequence[Any]) -> Sequence[Any]:
        params = eqn.primitive.get_bind_params(eqn.params)
        with eqn.ctx.manager:
            results = eqn.primitive.bind(*values, **params)
        return results if eqn.primitive.multiple_results else [results]

    return run


def _evaluate(ops: Iterable[_Op], env: dict[int, Any], wanted: Sequence[Value]) -> list[Any]:
    """Runs equations on the values in `env` by number, and returns those wanted."""

    def read(value: Value) -> Any:
        return value.val if isinstance(value, core.Literal) else env[value]

    for op in ops:
        env.update(zip(op.outputs, op.run([read(value) for value in op.inputs]), strict=True))
    return [read(value) for value in wanted]


# --- the cut ----------------------------------------------------------------------------------------------------------


class _Cut(NamedTuple):
    first: list[_Op]
    """B: makes the outputs that are wanted first."""
    second: list[_Op]
    """W: makes the others, from inputs and the stash."""
    stash: tuple[int, ...]
    """What W needs of B, or of inputs that are gone by then."""


def _cut(program: _Program, first: Sequence[bool], kept: Sequence[bool]) -> _Cut:
    """Cuts a program in two.

    Args:
      program: the whole.
      first: for each output, whether it is wanted first.
      kept: for each input, whether it is still there for the second part.
    """
    early = _needs(program.ops, [v for v, f in zip(program.outputs, first, strict=True) if f])
    late = {v for v, f in zip(program.outputs, first, strict=True) if not f and isinstance(v, int)}
    available = {v for v, k in zip(program.inputs, kept, strict=True) if k} | set(program.constants)
    gone = {v for v, k in zip(program.inputs, kept, strict=True) if not k}
    part_one: list[_Op] = []
    part_two: list[_Op] = []
    crossing: set[int] = set()
    made: dict[int, _Op] = {}
    for op in reversed(program.ops):
        now = [output in early for output in op.outputs]
        then = [output in late and output not in early for output in op.outputs]
        if any(now) and any(then) and op.name == "scan":
            one, two = _cut_scan(op, now, then)
            part_one.append(one)
            part_two.append(two)
            late.update(value for value in two.inputs if isinstance(value, int))
            made.update(dict.fromkeys(one.outputs, one))
        elif any(now):
            part_one.append(op)
            made.update(dict.fromkeys(op.outputs, op))
        elif any(then):
            part_two.append(op)
            late.update(value for value in op.inputs if isinstance(value, int))
    crossing = {value for value in late if value in made or value in gone}
    again, crossing = _computed_again(made, crossing, available)
    order = {id(op): place for place, op in enumerate(program.ops)}
    again.sort(key=lambda op: order.get(id(op), 0))
    return _Cut(part_one[::-1], again + part_two[::-1], tuple(sorted(crossing)))


def _needs(ops: Sequence[_Op], wanted: Iterable[Value]) -> set[int]:
    """Every value that the wanted ones are made of; of a scan's inputs those that its wanted outputs need."""
    needed = {value for value in wanted if isinstance(value, int)}
    for op in reversed(ops):
        used = [output in needed for output in op.outputs]
        if any(used):
            inputs = _scan_needs(op, used)[0] if op.name == "scan" and op.eqn is not None else [True] * len(op.inputs)
            needed.update(v for v, n in zip(op.inputs, inputs, strict=True) if n and isinstance(v, int))
    return needed


def _computed_again(made: dict[int, _Op], crossing: set[int], available: set[int]) -> tuple[list[_Op], set[int]]:
    """Takes values out of the stash that W makes cheaply of what it has anyway."""
    again: list[_Op] = []
    for value in sorted(crossing, reverse=True):
        op = made.get(value)
        if op is None or op.name not in _CHEAP:
            continue
        rest = (crossing - {value}) | available
        if all(not isinstance(v, int) or v in rest for v in op.inputs):
            again.append(op)
            crossing = crossing - set(op.outputs)
    return again, crossing


# --- a scan -----------------------------------------------------------------------------------------------------------


class _Scan(NamedTuple):
    """A scan's body, flat, and how its inputs and outputs divide."""

    body: _Program
    consts: int
    carries: int
    settings: dict[str, Any]


def _scan_of(op: _Op) -> _Scan:
    params = op.eqn.params
    settings = {name: params[name] for name in ("length", "reverse", "unroll")}
    return _Scan(_flatten(params["jaxpr"]), *scan_sizes(params), settings)


def _scan_needs(op: _Op, used: Sequence[bool]) -> tuple[list[bool], list[bool]]:
    """Which inputs, and which carries, a scan needs for the outputs that are used: a carry feeds the next turn."""
    scan = _scan_of(op)
    carried = list(used[: scan.carries])
    while True:
        wanted = [v for v, u in zip(scan.body.outputs, [*carried, *used[scan.carries :]], strict=True) if u]
        needed = _needs(scan.body.ops, wanted)
        needed |= {value for value in wanted if isinstance(value, int)}
        inputs = [value in needed for value in scan.body.inputs]
        more = [c or n for c, n in zip(carried, inputs[scan.consts :][: scan.carries], strict=True)]
        if more == carried:
            return inputs, carried
        carried = more


def _cut_scan(op: _Op, now: Sequence[bool], then: Sequence[bool]) -> tuple[_Op, _Op]:
    """A scan as two: the first makes the outputs wanted now and the stash of every turn, the second the others."""
    scan = _scan_of(op)
    body, consts, carries = scan.body, scan.consts, scan.carries
    _, early = _scan_needs(op, now)
    first = [*early, *now[carries:]]
    _, late = _scan_needs(op, then)
    late = [wanted and not carried for wanted, carried in zip(late, early, strict=True)]
    second = [*late, *(t and not n for t, n in zip(then[carries:], now[carries:], strict=True))]
    # A carry of the first part is gone when the second runs; one of the second is its own.
    kept = [True] * consts + [not carried for carried in early] + [True] * (len(body.inputs) - consts - carries)
    outputs = tuple(v for v, f, s in zip(body.outputs, first, second, strict=True) if f or s)
    flags = [f for f, s in zip(first, second, strict=True) if f or s]
    cut = _cut(body._replace(outputs=outputs), flags, kept)
    stacked = {value: next(_numbers) for value in cut.stash}
    one = _part_of_scan(op, scan, cut.first, early, first, {}, stacked)
    two = _part_of_scan(op, scan, cut.second, late, second, stacked, {})
    return one, two


def _part_of_scan(
    op: _Op,
    scan: _Scan,
    ops: list[_Op],
    carried: Sequence[bool],
    wanted: Sequence[bool],
    taken: dict[int, int],
    given: dict[int, int],
) -> _Op:
    """A scan of some of a body's equations, that takes and gives stacks of values by their numbers in the body."""
    body, consts, carries = scan.body, scan.consts, scan.carries
    needed = _needs(ops, [v for v, w in zip(body.outputs, wanted, strict=True) if w])
    needed |= {v for v, w in zip(body.outputs, wanted, strict=True) if w and isinstance(v, int)} | set(given)
    produced = {output for one in ops for output in one.outputs}
    needed |= {v for one in ops for v in one.inputs if isinstance(v, int)} - produced
    turns = range(consts + carries, len(body.inputs))
    fixed = [i for i in range(consts) if body.inputs[i] in needed]
    looped = [consts + i for i in range(carries) if carried[i]]
    mapped = [i for i in turns if body.inputs[i] in needed]
    ys = [i for i in range(carries, len(body.outputs)) if wanted[i]]
    outs = [i for i in range(carries) if carried[i]]

    def run(values: Sequence[Any]) -> Sequence[Any]:
        held, rest = values[: len(fixed)], values[len(fixed) :]
        begin, rest = rest[: len(looped)], rest[len(looped) :]

        def turn(carry, xs):
            env = dict(body.constants)
            env.update(zip((body.inputs[i] for i in fixed), held, strict=True))
            env.update(zip((body.inputs[i] for i in looped), carry, strict=True))
            env.update(zip([*(body.inputs[i] for i in mapped), *taken], xs, strict=True))
            results = _evaluate(ops, env, [body.outputs[i] for i in (*outs, *ys)])
            return tuple(results[: len(outs)]), (*results[len(outs) :], *(env[value] for value in given))

        ends, stacks = lax.scan(turn, tuple(begin), tuple(rest), **scan.settings)
        return (*ends, *stacks)

    inputs = (*(op.inputs[i] for i in (*fixed, *looped, *mapped)), *taken.values())
    outputs = (*(op.outputs[i] for i in (*outs, *ys)), *given.values())
    return _Op("scan", inputs, outputs, run)


# --- the stage --------------------------------------------------------------------------------------------------------


class SplitVjp(NamedTuple):
    """A function's forward pass and the two parts of its backward pass, to call in this order with the same weights."""

    forward: Callable[[Any, Any], tuple[Any, list[jax.Array]]]
    """`(params, x) -> (outputs, residuals)`."""
    input_gradient: Callable[[Any, list[jax.Array], Any], tuple[Any, list[jax.Array]]]
    """`(params, residuals, cotangents) -> (gradient of x, stash)`."""
    weight_gradient: Callable[[Any, list[jax.Array], list[jax.Array]], Any]
    """`(params, residuals, stash) -> gradient of params`."""


def split_vjp(function: Callable[[Any, Any], Any], params: Any, x: Any) -> SplitVjp:
    """Traces `function(params, x)` and cuts its backward pass.

    Residuals that depend on `params` alone, such as casts, are not kept: they are made again from `params`.

    Args:
      function: what a stage computes; its outputs may be any pytree.
      params: an example of its weights, or their shapes: what is to have weight gradients.
      x: an example of its input: what is to have an input gradient.
    """
    trees: dict[str, Any] = {}

    def traced(params, x):
        outputs, pullback = jax.vjp(function, params, x)
        residuals, trees["pullback"] = jax.tree.flatten(pullback)
        flat, trees["outputs"] = jax.tree.flatten(outputs)
        return flat, residuals

    closed, (shapes, residual_shapes) = jax.make_jaxpr(traced, return_shape=True)(params, x)
    forward = _flatten(closed)
    count = len(jax.tree.leaves(params))
    weights, made = forward.inputs[:count], forward.outputs[len(shapes) :]
    of_weights = _reached(forward, weights)
    again = [v for v in made if not isinstance(v, int) or v in of_weights]
    again_ops = _slice(forward.ops, again)
    kept = [place for place, v in enumerate(made) if isinstance(v, int) and v not in of_weights]

    def pull(residuals, cotangents):
        return jax.tree.leaves(jax.tree.unflatten(trees["pullback"], residuals)(cotangents))

    cotangents = jax.tree.unflatten(trees["outputs"], shapes)
    backward = _flatten(jax.make_jaxpr(pull)(residual_shapes, cotangents))
    cut = _cut(
        backward,
        [place >= count for place in range(len(backward.outputs))],
        [place < len(made) for place in range(len(backward.inputs))],
    )

    def run_forward(params, x):
        env = dict(forward.constants) | dict(zip(forward.inputs, jax.tree.leaves((params, x)), strict=True))
        results = _evaluate(forward.ops, env, forward.outputs)
        outputs, residuals = results[: len(shapes)], results[len(shapes) :]
        return jax.tree.unflatten(trees["outputs"], outputs), [residuals[place] for place in kept]

    def start(params, residuals) -> dict[int, Any]:
        """The values that both parts of the backward pass begin with."""
        env = dict(forward.constants) | dict(zip(weights, jax.tree.leaves(params), strict=True))
        values = iter(_evaluate(again_ops, env, again))
        held = iter(residuals)
        whole = [next(held) if place in kept else next(values) for place in range(len(made))]
        return dict(backward.constants) | dict(zip(backward.inputs, whole, strict=False))

    def run_input(params, residuals, cotangents):
        env = start(params, residuals)
        env.update(zip(backward.inputs[len(made) :], jax.tree.leaves(cotangents), strict=True))
        gradient = _evaluate(cut.first, env, backward.outputs[count:])
        return jax.tree.unflatten(jax.tree.structure(x), gradient), [env[value] for value in cut.stash]

    def run_weights(params, residuals, stash):
        env = start(params, residuals)
        env.update(zip(cut.stash, stash, strict=True))
        gradient = _evaluate(cut.second, env, backward.outputs[:count])
        return jax.tree.unflatten(jax.tree.structure(params), gradient)

    return SplitVjp(run_forward, run_input, run_weights)


def _reached(program: _Program, begin: Sequence[int]) -> set[int]:
    """Values that depend on nothing but these inputs and constants."""
    reached = set(begin) | set(program.constants)
    for op in program.ops:
        if all(not isinstance(value, int) or value in reached for value in op.inputs):
            reached.update(op.outputs)
    return reached


def _slice(ops: Sequence[_Op], wanted: Sequence[Value]) -> list[_Op]:
    """The equations that the wanted values are made by."""
    needed = _needs(ops, wanted)
    return [op for op in ops if any(output in needed for output in op.outputs)]
