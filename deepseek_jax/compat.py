"""What jax renames now and then, in one place: varying mesh axes inside `shard_map`, and the parts of a scan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The mesh axes along which x differs from device to device, inside `shard_map`."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def to_varying(x: Any, axes: str | Sequence[str]) -> Any:
    """The pytree `x` with every leaf marked as varying over `axes`, inside `shard_map`.

    A leaf that varies over some of them already is cast over the others only: a second cast is an error in jax.
    """
    names = (axes,) if isinstance(axes, str) else tuple(axes)

    def cast(leaf: jax.Array) -> jax.Array:
        missing = tuple(name for name in names if name not in varying_axes(leaf))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, x)


def scan_sizes(params: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan's inputs are constants, and how many carries, from its equation's parameters."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carries, _ = params["ft_in"].unpack()  # since jax 0.11
    return len(list(constants)), len(list(carries))
