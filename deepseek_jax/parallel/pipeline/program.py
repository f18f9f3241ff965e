"""A jaxpr as a flat list of equations, to be cut, pruned and interleaved: what `split_vjp` and `braid` work on.

Calls (jit, checkpoint, custom derivatives) are written out. Loops and branches stay one equation each, with the
programs that a scan repeats or that a conditional chooses from (`parts.py` takes parts of them).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend import core

from deepseek_jax.compat import scan_sizes

_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "checkpoint": "jaxpr", "remat": "jaxpr", "remat2": "jaxpr"}
_CALLS |= {"closed_call": "call_jaxpr", "core_call": "call_jaxpr", "eval_jaxpr": "call_jaxpr"}
_CALLS |= {"custom_jvp_call": "call_jaxpr"}
_CALLS |= {"custom_vjp_call": "call_jaxpr", "custom_vjp_call_jaxpr": "fun_jaxpr", "custom_lin": "call_jaxpr"}

EXCHANGES = frozenset(
    (
        *("all_to_all", "ragged_all_to_all", "ppermute", "psum", "psum_invariant", "psum2", "pmax", "pmin"),
        *("all_gather", "all_gather_invariant", "all_gather_reduced", "reduce_scatter", "psum_scatter", "pbroadcast"),
        *("unreduced_psum", "unreduced_reduce_scatter", "pgather", "psend", "precv"),
    )
)
"""Equations that communicate between devices. What only says where a value varies (`pvary`, `axis_index`) does not."""

_PRODUCTS = frozenset(
    (
        *("dot_general", "ragged_dot", "ragged_dot_general", "scaled_dot", "conv_general_dilated"),
        *("sort", "top_k", "approx_top_k", "ffi_call", "random_bits", "fft", "cholesky", "triangular_solve"),
    )
)


@dataclasses.dataclass(frozen=True, eq=False)
class Variable:
    """A value of a program; numbers grow in the order in which equations were read."""

    number: int
    shape: tuple[int, ...]
    dtype: Any
    axes: frozenset[str]
    """The mesh axes along which it varies from device to device, inside `shard_map`."""


Value = Variable | core.Literal
"""A value, or a constant written in place."""

_numbers = itertools.count()


def new_variable(like: Any, *, lead: tuple[int, ...] = ()) -> Variable:
    """A value that no equation makes yet, of the type of another or of a jaxpr's; `lead` are dimensions before it."""
    axes = like.axes if isinstance(like, Variable) else like.manual_axis_type.varying
    return Variable(next(_numbers), (*lead, *like.shape), like.dtype, frozenset(axes))


@dataclasses.dataclass(eq=False)
class Op:
    """One equation: `run` gives its outputs from its inputs. Part of a loop or a branch has no `eqn`."""

    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Variable, ...]
    run: Callable[[Sequence[Any]], Sequence[Any]]
    eqn: Any = None
    scope: str = ""
    """The named scopes that it was written in, for whoever reads the compiled program."""
    turns: Any = None
    """Of a part of a scan, what it repeats: `evaluate.Turns`."""
    reads_rows: bool = False
    """Whether `run` takes an `evaluate.Row` in the place of any input."""

    @functools.cached_property
    def scan(self) -> Scan | None:
        """What a scan repeats."""
        if self.name != "scan" or self.eqn is None:
            return None
        params = self.eqn.params
        settings = {name: params[name] for name in ("length", "reverse", "unroll")}
        return Scan(flatten(params["jaxpr"]), *scan_sizes(params), settings)

    @functools.cached_property
    def branches(self) -> tuple[Program, ...] | None:
        """The branches of a conditional, whose first input says which of them runs."""
        if self.name != "cond" or self.eqn is None:
            return None
        return tuple(flatten(branch) for branch in self.eqn.params["branches"])

    @functools.cached_property
    def exchanges(self) -> int:
        """How many equations in it communicate between devices."""
        return (self.name in EXCHANGES) + (0 if self.eqn is None else _exchanges_in(self.eqn.params))

    @functools.cached_property
    def heavy(self) -> bool:
        """Whether it may cost as much as a product of matrices: a loop, a branch, a kernel and an exchange may."""
        if self.name in _PRODUCTS or self.exchanges or self.eqn is None:
            return True
        return not self.name.startswith("reduce") and any(True for _ in core.jaxprs_in_params(self.eqn.params))

    @functools.cached_property
    def size(self) -> int:
        """How many equations it is, those inside it included."""
        return 1 if self.eqn is None else 1 + _equations_in(self.eqn.params)

    @functools.cached_property
    def work(self) -> int:
        """Roughly what it costs: multiplications, and elements written elsewhere."""
        return 1 if self.eqn is None else _work(self.eqn)


def _work(eqn: Any) -> int:
    if eqn.primitive.name == "dot_general":
        (contract, _), _ = eqn.params["dimension_numbers"]
        return eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[axis] for axis in contract)
    inner = sum(_work(one) for jaxpr in core.jaxprs_in_params(eqn.params) for one in jaxpr.eqns)
    return eqn.params.get("length", 1) * inner if inner else sum(math.prod(var.aval.shape) for var in eqn.outvars)


def _exchanges_in(params: Mapping[str, Any]) -> int:
    jaxprs = core.jaxprs_in_params(params)
    return sum((eqn.primitive.name in EXCHANGES) + _exchanges_in(eqn.params) for one in jaxprs for eqn in one.eqns)


def _equations_in(params: Mapping[str, Any]) -> int:
    return sum(1 + _equations_in(eqn.params) for one in core.jaxprs_in_params(params) for eqn in one.eqns)


class Program(NamedTuple):
    """A flat list of equations in an order in which they can run."""

    ops: list[Op]
    inputs: tuple[Variable, ...]
    outputs: tuple[Value, ...]
    constants: dict[Variable, Any]


class Scan(NamedTuple):
    """A scan's body, flat, and how its inputs and outputs divide."""

    body: Program
    consts: int
    carries: int
    settings: dict[str, Any]


def flatten(closed: core.ClosedJaxpr) -> Program:
    """The program of a jaxpr, with calls written out."""
    ops: list[Op] = []
    constants: dict[Variable, Any] = {}

    def walk(jaxpr: core.Jaxpr, consts: Sequence[Any], arguments: Sequence[Value], outer: str = "") -> list[Value]:
        env: dict[Any, Value] = {}

        def read(atom: Any) -> Value:
            return atom if isinstance(atom, core.Literal) else env[atom]

        for var, value in zip(jaxpr.constvars, consts, strict=True):
            constants[variable := new_variable(var.aval)] = value
            env[var] = variable
        env.update(zip(jaxpr.invars, arguments, strict=True))
        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            scope = "/".join(filter(None, (outer, str(eqn.source_info.name_stack))))
            if (key := _CALLS.get(eqn.primitive.name)) is not None:
                inner = eqn.params[key]
                inner, inner_consts = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
                env.update(zip(eqn.outvars, walk(inner, inner_consts, inputs, scope), strict=True))
                continue
            outputs = tuple(new_variable(var.aval) for var in eqn.outvars)
            op = Op(eqn.primitive.name, tuple(inputs), outputs, _bind(eqn), eqn, scope)
            ops.append(op)
            env.update((var, _given_by_branches(op, place) or outputs[place]) for place, var in enumerate(eqn.outvars))
        return [read(atom) for atom in jaxpr.outvars]

    inputs = tuple(new_variable(var.aval) for var in closed.jaxpr.invars)
    return Program(ops, inputs, tuple(walk(closed.jaxpr, closed.consts, inputs)), constants)


def _bind(eqn: Any) -> Callable[[Sequence[Any]], Sequence[Any]]:
    def run(values: Sequence[Any]) -> Sequence[Any]:
        params = eqn.primitive.get_bind_params(eqn.params)
        with eqn.ctx.manager:
            results = eqn.primitive.bind(*values, **params)
        return results if eqn.primitive.multiple_results else [results]

    return run


def _given_by_branches(op: Op, place: int) -> Value | None:
    """The input that an output of a conditional equals: nothing is to be kept twice.

    A branch may hand on what it was given, while the others give nothing of meaning: jax has them fill the places of
    each other's residuals with uninitialised arrays.
    """
    found: set[int] = set()
    for branch in op.branches or ():
        value = branch.outputs[place]
        if isinstance(value, Variable) and value in branch.inputs:
            found.add(branch.inputs.index(value))
        elif not is_nothing(branch, value):
            return None
    return op.inputs[1 + found.pop()] if len(found) == 1 else None


def is_nothing(program: Program, value: Value) -> bool:
    """Whether a value is an uninitialised array."""
    made = {output: op for op in program.ops for output in op.outputs}
    while isinstance(value, Variable) and value in made:
        op = made[value]
        if op.name not in ("broadcast_in_dim", "pvary", "pcast"):
            return op.name in ("empty", "empty2")
        value = op.inputs[0]
    return False
