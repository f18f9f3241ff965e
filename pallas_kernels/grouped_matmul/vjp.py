"""The derivative of a grouped matmul of arrays, in terms of the two products that it and its gradients are."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


@dataclasses.dataclass(frozen=True)
class Products:
    """An implementation's two products, as `blocked` documents them."""

    rows_by_matrices: Callable[..., Array]
    rows_by_rows: Callable[..., Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def grouped_matmul(
    x: Array, w: Array, group_sizes: Array, alignment: int, out_dtype: jnp.dtype, products: Products
) -> Array:
    """x `[M, K]` and w `[G, K, N]` to `[M, N]`; for the backward pass it keeps just these."""
    return products.rows_by_matrices(x, w, group_sizes, alignment, out_dtype)


def _forward(x, w, group_sizes, alignment, out_dtype, products):
    return grouped_matmul(x, w, group_sizes, alignment, out_dtype, products), (x, w, group_sizes)


def _backward(alignment, out_dtype, products, residuals, dy):
    x, w, group_sizes = residuals
    dx = products.rows_by_matrices(dy, w, group_sizes, alignment, x.dtype, contract=2)
    dw = products.rows_by_rows(x, dy, group_sizes, alignment, w.dtype)
    return dx, dw, None


grouped_matmul.defvjp(_forward, _backward)
