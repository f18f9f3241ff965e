"""What grouped matmuls mean: every group's matrix on every row, masked. Dense in G: an oracle for small sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.block_scaled_matmul.reference import BLOCK, block_scaled_matmul
from pallas_kernels.grouped_matmul.groups import rows_of_groups
from pallas_kernels.implementation import accumulator
from pallas_kernels.quantize import Quantized


def rows_by_matrices(
    x: Array | Quantized,
    w: Array | Quantized,
    group_sizes: Array,
    alignment: int,
    out_dtype: jnp.dtype,
    contract: int = 1,
) -> Array:
    """Every row times its group's matrix, over axis `contract` of w `[G, K, N]`: `[M, N]` for 1, `[M, K]` for 2.

    Quantised, it is the float32 sum of products per 128 of that axis.
    """
    mine = rows_of_groups(group_sizes, x.shape[0], alignment)[:, :, None]
    if isinstance(x, Quantized):

        def product(matrix):
            return block_scaled_matmul(x, matrix if contract == 1 else matrix.T, jnp.dtype(jnp.float32))

        return jnp.where(mine, jax.vmap(product)(w), 0).sum(0).astype(out_dtype)
    assert not isinstance(w, Quantized)  # both or neither are
    acc = accumulator(x, w)
    inputs = jnp.where(mine, x.astype(acc), 0)
    return jnp.einsum("gmk,gkn->mn" if contract == 1 else "gmn,gkn->mk", inputs, w.astype(acc)).astype(out_dtype)


def rows_by_rows(x: Array | Quantized, dy: Array | Quantized, group_sizes: Array, alignment: int) -> Array:
    """x `[M, K]` and dy `[M, N]` to `[G, K, N]`; quantised, the sum of products per 128 of M."""
    mine = rows_of_groups(group_sizes, x.shape[0], alignment)
    if isinstance(x, Quantized):

        def product(rows):
            return block_scaled_matmul(_only(x, rows).T, _only(dy, rows), jnp.dtype(jnp.float32))

        return jax.vmap(product)(mine)
    assert not isinstance(dy, Quantized)
    acc = accumulator(x, dy)
    inputs = jnp.where(mine[:, :, None], x.astype(acc), 0)
    gradients = jnp.where(mine.any(0)[:, None], dy.astype(acc), 0)
    return jnp.einsum("gmk,mn->gkn", inputs, gradients)


def _only(q, rows):
    """q `[M, K]` with zeros outside `rows`, bool `[M]`, whatever the codes and scales there."""
    codes = jnp.where(rows[:, None], q.codes, jnp.zeros_like(q.codes))
    if q.tile is None:
        return Quantized(codes, q.scales, q.tile)
    tiles = jnp.pad(rows, (0, -rows.shape[0] % BLOCK)).reshape(-1, BLOCK).any(1)
    return Quantized(codes, jnp.where(tiles[:, None], q.scales, 0), q.tile)
