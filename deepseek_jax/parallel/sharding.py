"""Logical axes to mesh axes, in one table, and the shardings that follow from it."""

from __future__ import annotations

import jax
from jax import lax
from jax.sharding import PartitionSpec as P

from deepseek_jax.compat import varying_axes
from deepseek_jax.parallel.mesh import AXES, BATCH_AXES

RULES: dict[str, str | tuple[str, ...] | None] = {
    "stage": "pipe",  # the leading dimension of stacked layers
    "slot": None,  # layers of one stage
    "batch": BATCH_AXES,  # rows of a batch
    "expert": ("node", "expert"),  # routed experts
    "embed": None,  # no tensor parallelism: dense weights are whole within a stage
    "heads": None,
    "ffn": None,
    "expert_ffn": None,
    "vocab": "pipe",  # embedding and head, whatever the schedule; whole at pipe = 1
}
"""Where each logical axis of a parameter or a batch lives."""

BATCH_SPEC = P(BATCH_AXES)
"""Rows of a batch, first dimension."""


def partition_spec(axes: tuple[str | None, ...]) -> P:
    """The partition of an array with these logical axes.

    Raises:
      ValueError: an axis is unknown, or two axes of the array map to one mesh axis.
    """
    entries, used = [], set[str]()
    for axis in axes:
        if axis is not None and axis not in RULES:
            raise ValueError(f"unknown logical axis {axis!r}; known: {', '.join(RULES)}")
        mesh_axes = None if axis is None else RULES[axis]
        names = () if mesh_axes is None else (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes
        if used & set(names):
            raise ValueError(f"logical axes {axes} put two dimensions on mesh axis {sorted(used & set(names))[0]!r}")
        used |= set(names)
        entries.append(mesh_axes)
    return P(*entries)


def mesh_axes_of(spec: P) -> set[str]:
    """The mesh axes that an array with this partition is split over."""
    return {name for entry in spec if entry is not None for name in ((entry,) if isinstance(entry, str) else entry)}


def sum_over(x: jax.Array, axes: tuple[str, ...] = AXES) -> jax.Array:
    """Sum over mesh axes, inside `shard_map`; an axis along which x does not vary holds one copy and adds nothing."""
    varying = tuple(axis for axis in axes if axis in varying_axes(x))
    return lax.psum(x, varying) if varying else x


def largest_over(x: jax.Array, axes: tuple[str, ...] = AXES) -> jax.Array:
    """The largest over mesh axes, inside `shard_map`."""
    varying = tuple(axis for axis in axes if axis in varying_axes(x))
    return lax.pmax(x, varying) if varying else x
