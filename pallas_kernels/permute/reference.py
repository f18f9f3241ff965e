"""What gathering and combining rows mean, in a line each. Writes `[T, K, D]` out: an oracle for small sizes."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from pallas_kernels.implementation import accumulator


def gather_rows(x: Array, index: Array) -> Array:
    """`rows[..., :] = x[index[...]]`, zeros where the index names no row of x: x `[T, D]`, index `[...]`."""
    there = (index >= 0) & (index < x.shape[0])
    if x.shape[0] == 0:
        return jnp.zeros((*index.shape, x.shape[1]), x.dtype)
    return jnp.where(there[..., None], x[jnp.where(there, index, 0)], jnp.zeros((), x.dtype))


def combine_rows(rows: Array, slots: Array, weights: Array | None) -> Array:
    """`y[t] = Σ_k weights[t, k] · rows[slots[t, k]]` in float32 or wider, rounded once to the rows' dtype."""
    chosen = gather_rows(rows, slots).astype(accumulator(rows))
    if weights is not None:
        there = (slots >= 0) & (slots < rows.shape[0])
        chosen = chosen * jnp.where(there, weights, 0)[..., None]
    return chosen.sum(1).astype(rows.dtype)
