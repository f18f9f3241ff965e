"""The derivative of the blocked grouped matmul of arrays, in terms of itself."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.grouped_matmul import blocked


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_matmul(x: Array, w: Array, group_sizes: Array, alignment: int, out_dtype: jnp.dtype) -> Array:
    """x `[M, K]` and w `[G, K, N]` to `[M, N]`; for the backward pass it keeps just these."""
    return blocked.rows_by_matrices(x, w, group_sizes, alignment, out_dtype)


def _forward(x, w, group_sizes, alignment, out_dtype):
    return grouped_matmul(x, w, group_sizes, alignment, out_dtype), (x, w, group_sizes)


def _backward(alignment, out_dtype, residuals, dy):
    x, w, group_sizes = residuals
    dx = blocked.rows_by_matrices(dy, w, group_sizes, alignment, dy.dtype, contract=2)
    dw = blocked.rows_by_rows(x, dy, group_sizes, alignment)
    return dx.astype(x.dtype), dw.astype(w.dtype), None


grouped_matmul.defvjp(_forward, _backward)
