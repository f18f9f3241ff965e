"""The collectives of a program, read off its jaxpr: how often each runs, over which axes, and what a device sends.

A jaxpr is traced from shapes alone, so this counts a step on thousands of devices without one of them:

    collectives(jax.make_jaxpr(step)(*abstract_arguments))

Bytes are those of the usual algorithms, which no other sends less than: of S bytes that each of n ranks puts in, a
device sends (n - 1) S for an all-gather, (n - 1)/n S for a reduce-scatter or an all-to-all, 2 (n - 1)/n S for an
all-reduce, and S for a permutation. A ragged all-to-all is counted as if its buffer were full, which is the most.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from typing import Any, Literal

Phase = Literal["", "forward", "recomputed", "backward"]
"""Of a differentiated function: its forward pass, what its backward pass computes again, and the rest of that pass.
Empty for what is not differentiated."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a program. Several in different places that agree in all of this but `calls` are one."""

    kind: str
    """all_reduce (sums and extremes), all_gather, reduce_scatter, all_to_all, ragged_all_to_all or permute."""
    axes: tuple[str, ...]
    """Mesh axes of more than one rank, in the mesh's order of the program."""
    ranks: int
    purpose: str
    """The innermost `jax.named_scope`; empty where there is none."""
    phase: Phase
    shape: tuple[int, ...]
    """Of what one device puts in; of several arrays at once, the first one's."""
    dtype: str
    input_bytes: int
    """What one device puts into one call."""
    calls: int = 1
    """On every device, in one run of the program."""

    @property
    def bytes_sent(self) -> int:
        """What one device sends in all calls; see the module for the formulas."""
        n = self.ranks
        times, parts = {
            "all_reduce": (2 * (n - 1), n),
            "all_gather": (n - 1, 1),
            "permute": (1, 1),
        }.get(self.kind, (n - 1, n))
        return self.calls * self.input_bytes * times // parts


_KINDS = {
    "psum_scatter": "reduce_scatter",
    "reduce_scatter": "reduce_scatter",
    "ragged_all_to_all": "ragged_all_to_all",
    "all_to_all": "all_to_all",
    "all_gather": "all_gather",
    "ppermute": "permute",
    "psum": "all_reduce",
    "pmax": "all_reduce",
    "pmin": "all_reduce",
}
"""By how the name of a primitive begins, longer beginnings first: versions of jax append to them (`psum_invariant`)."""

_TRANSFORMS = frozenset({"jvp", "transpose", "vmap", "checkpoint", "rematted_computation"})
"""What jax itself writes into the stack of names."""


def collectives(program: Any, shares: Mapping[str, Fraction] | None = None) -> tuple[Collective, ...]:
    """The collectives of a jaxpr, closed or not, in the order of the program; those among one rank are none.

    A scan's count as often as it repeats. Of the branches of a `cond`, the one that sends most counts.

    Args:
      program: the jaxpr.
      shares: by the name of the innermost scope of a `cond` or a while loop, how often it is taken; default: always.

    Raises:
      ValueError: a collective in another while loop, which says nowhere how often it runs.
    """
    counts: dict[Collective, Fraction] = {}
    for one, calls in _walk(program, {}, "", shares or {}):
        counts[one] = counts.get(one, Fraction(0)) + calls
    return tuple(dataclasses.replace(one, calls=round(calls)) for one, calls in counts.items())


def total_sent(found: Iterable[Collective]) -> int:
    """Bytes that one device sends in all of them."""
    return sum(one.bytes_sent for one in found)


def _walk(
    program: Any, sizes: Mapping[str, int], names: str, shares: Mapping[str, Fraction]
) -> Iterator[tuple[Collective, Fraction]]:
    """Those of a jaxpr in a mesh whose axes have `sizes`, under the stack of names `names`, and how often each is."""
    for equation in program.eqns:
        primitive, params = equation.primitive.name, equation.params
        stack = f"{names}/{equation.source_info.name_stack}"
        kind = next((kind for start, kind in _KINDS.items() if primitive.startswith(start)), None)
        if kind is not None:
            yield from ((one, Fraction(1)) for one in _collective(kind, equation, sizes, stack))
        elif primitive == "cond":
            branches = [list(_walk(branch, sizes, stack, shares)) for branch in params["branches"]]
            share = shares.get(_purpose(stack), Fraction(1))
            most = max(branches, key=lambda found: sum(one.bytes_sent * calls for one, calls in found))
            yield from ((one, calls * share) for one, calls in most)
        else:
            inner = params["mesh"].shape if primitive == "shard_map" else sizes
            parts = [part for value in params.values() for part in _jaxprs(value)]
            found = [pair for part in parts for pair in _walk(part, inner, stack, shares)]
            times: Fraction | int = params["length"] if primitive == "scan" else 1
            if found and primitive == "while":
                first = found[0][0]
                if (scope := _purpose(stack)) not in shares:
                    raise ValueError(f"{first.kind} over {first.axes} in a while loop: how often it runs is not known")
                times = shares[scope]
            yield from ((one, calls * times) for one, calls in found)


def _jaxprs(value: Any) -> Iterator[Any]:
    if hasattr(value, "eqns"):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _jaxprs(part)


def _collective(kind: str, equation: Any, sizes: Mapping[str, int], stack: str) -> Iterator[Collective]:
    params = equation.params
    named = params["axes"] if "axes" in params else params["axis_name"]
    axes = tuple(axis for axis in ((named,) if isinstance(named, str) else named) if sizes[axis] > 1)
    if not axes:
        return
    arrays = [variable.aval for variable in equation.invars]
    if kind == "ragged_all_to_all":  # the others are where rows go, and where they come to
        arrays = arrays[:1]
    yield Collective(
        kind=kind,
        axes=axes,
        ranks=math.prod(sizes[axis] for axis in axes),
        purpose=_purpose(stack),
        phase=_phase(stack),
        shape=tuple(arrays[0].shape),
        dtype=str(arrays[0].dtype),
        input_bytes=sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays),
    )


def _purpose(stack: str) -> str:
    """The innermost scope: "combine" of "transpose(jvp())/rematted_computation/ffn/combine"."""
    scopes = [word for word in re.findall(r"\w+", stack) if word not in _TRANSFORMS]
    return scopes[-1] if scopes else ""


def _phase(stack: str) -> Phase:
    if "rematted_computation" in stack:
        return "recomputed"
    if "transpose(" in stack:
        return "backward"
    return "forward" if "jvp(" in stack else ""
