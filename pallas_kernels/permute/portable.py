"""Gathering and combining rows on any device: a gather at a time, so that nothing `[T, K, D]` is written out."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from pallas_kernels.implementation import accumulator
from pallas_kernels.permute.tables import past_the_end


def gather_rows(x: Array, index: Array) -> Array:
    """Rows of x `[T, D]` by index `[R]`, zeros where it names none: `[R, D]` of x's dtype."""
    if x.shape[0] == 0:
        return jnp.zeros((*index.shape, x.shape[1]), x.dtype)
    return jnp.take(x, past_the_end(index, x.shape[0]), axis=0, mode="fill", fill_value=0)


def combine_rows(rows: Array, slots: Array, weights: Array | None) -> Array:
    """The sum over k of rows `[R, D]` that slots `[T, K]` name, each times its weight: `[T, D]` of the rows' dtype."""
    total = jnp.zeros((slots.shape[0], rows.shape[1]), accumulator(rows))
    for k in range(slots.shape[1]):
        chosen = gather_rows(rows, slots[:, k]).astype(total.dtype)
        if weights is not None:
            there = (slots[:, k] >= 0) & (slots[:, k] < rows.shape[0])
            chosen = chosen * jnp.where(there, weights[:, k], 0)[:, None]
        total = total + chosen
    return total.astype(rows.dtype)


def gather_rows_and_dots(dy: Array, index: Array, weights: Array, rows: Array) -> tuple[Array, Array]:
    """The backward pass of a weighted sum, for each of the R rows.

    Args:
      dy: The sum's gradient, `[T, D]`.
      index: The token of each row, `[R]`.
      weights: The weight of each row, `[R]`.
      rows: `[R, D]`.

    Returns:
      The rows' gradient `weights[r] · dy[index[r]]`, `[R, D]` of dy's dtype, and the weights',
      `Σ_d dy[index[r], d] · rows[r, d]`, `[R]`, float32 or wider. Both are zero for an empty row.
    """
    gathered = gather_rows(dy, index).astype(accumulator(dy))
    there = (index >= 0) & (index < dy.shape[0])
    dots = (gathered * rows.astype(gathered.dtype)).sum(1)
    return (gathered * jnp.where(there, weights, 0)[:, None]).astype(dy.dtype), jnp.where(there, dots, 0)
