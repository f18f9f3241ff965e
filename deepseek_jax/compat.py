"""What differs between jax 0.10 and 0.11, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, Mesh


def make_mesh(shape: Sequence[int], names: Sequence[str], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh whose axes are all Auto, which is not the default; after 0.11.0 the first argument has another name."""
    return jax.make_mesh(tuple(shape), tuple(names), axis_types=(AxisType.Auto,) * len(names), devices=devices)


def to_varying(x: Any, axes: str | Sequence[str]) -> Any:
    """The pytree `x` with every leaf marked as varying over `axes`, inside `shard_map`.

    A leaf that varies over some of them already is cast over the others only: a second cast is an error in jax.
    """
    names = (axes,) if isinstance(axes, str) else tuple(axes)

    def cast(leaf: jax.Array) -> jax.Array:
        varying = jax.typeof(leaf).manual_axis_type.varying
        missing = tuple(name for name in names if name not in varying)
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, x)
