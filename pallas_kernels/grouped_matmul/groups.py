"""Which rows belong to which group. G groups over M rows; each starts where its predecessor, rounded up, ends."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from pallas_kernels import device_tables
from pallas_kernels.implementation import not_hopper


def preferred_alignment() -> int:
    """Rows at whose multiples a dispatcher should start groups, for `grouped_matmul` to be fastest here.

    The blocked implementation gains nothing from padding, and every gather and activation around it would pay for it. A
    kernel computes a tile of rows once for each group in it.
    """
    kernel = not_hopper() is None and device_tables.unproven("grouped_matmul") is None
    return 128 if kernel else 1


def group_starts(group_sizes: Array, alignment: int = 1) -> Array:
    """First row of each group, `[G]` int32: sizes rounded up to `alignment`, then an exclusive sum."""
    rounded = (group_sizes + alignment - 1) // alignment * alignment
    return jnp.cumsum(rounded) - rounded


def rows_of_groups(group_sizes: Array, rows: int, alignment: int) -> Array:
    """Whether a row is in a group, `[G, M]` bool."""
    row = jnp.arange(rows)
    start = group_starts(group_sizes, alignment)[:, None]
    return (row >= start) & (row < start + group_sizes[:, None])


def tile_visits(group_sizes: Array, alignment: int, rows: int, tile: int) -> tuple[Array, Array]:
    """Which groups have rows in which tile of `tile` rows, as kernels read it.

    Returns:
      `[⌈M / tile⌉, 2]` int32: from and up to which of the groups that have rows, counted without the empty ones; and
      `[G, 3]` int32: of each of these its index, its first row and its end. After the last of them come groups that
      no tile has.
    """
    starts = group_starts(group_sizes, alignment)
    filled = group_sizes > 0
    # The i-th group that has rows is the one before which, itself included, i + 1 have; without a sort, in one pass.
    upto, index = jnp.cumsum(filled), jnp.arange(group_sizes.shape[0])
    order = jnp.minimum((upto[None, :] <= index[:, None]).sum(1), group_sizes.shape[0] - 1)
    first_row = (jnp.arange(-(-rows // tile)) * tile)[:, None]
    before = (filled & (starts + group_sizes <= first_row)).sum(1)
    begun = (filled & (starts < first_row + tile)).sum(1)
    groups = jnp.stack([order, starts[order], (starts + group_sizes)[order]], 1)
    return jnp.stack([before, begun], 1).astype(jnp.int32), groups.astype(jnp.int32)


def check_group_sizes(group_sizes: ArrayLike, rows: int, alignment: int = 1) -> None:
    """Checks on the host, for values that are known there, what the matmuls take on trust.

    Args:
      group_sizes: Rows of each group, `[G]` integers.
      rows: M, the rows there are.
      alignment: Groups start at multiples of this many rows.

    Raises:
      ValueError: if sizes are no vector of integers, one is negative, or the groups do not fit in the rows.
    """
    sizes = np.asarray(group_sizes)
    if sizes.ndim != 1 or not np.issubdtype(sizes.dtype, np.integer):
        raise ValueError(f"group_sizes must be [G] integers, not {sizes.shape} of {sizes.dtype}")
    if (sizes < 0).any():
        first = int(np.argmax(sizes < 0))
        raise ValueError(f"group_sizes must not be negative, but group {first} has {sizes[first]} rows")
    needed = int((-(-sizes.astype(np.int64) // alignment) * alignment).sum())
    if needed > rows:
        raise ValueError(
            f"group_sizes need {needed} rows with every group rounded up to {alignment}, but there are {rows}"
        )
