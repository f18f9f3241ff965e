"""Matrix product with a weight whose gradient is a plain product too.

Shape letters: T tokens, K and N the two widths of the weight.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax


def linear(x: Array, w: Array) -> Array:
    """`x @ w` for x `[..., K]` and w `[K, N]` of one dtype, which the result has."""
    return _linear(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], w.shape[-1])


def transposed(x: Array) -> Array:
    """The transpose of a matrix, for the first operand of a product over tokens, as in `transposed(x) @ dy`.

    XLA's CPU backend has no fast kernel for a product over the first axis of its first operand, and folds a transpose
    into just that; the barrier makes it write the transpose out, which costs a tenth of what it saves.
    """
    return lax.optimization_barrier(x.T) if jax.default_backend() == "cpu" else x.T


@jax.custom_vjp
def _linear(x, w):
    return x @ w


def _backward(residuals, dy):
    x, w = residuals
    return jnp.matmul(dy, w.T), jnp.matmul(transposed(x), dy)


_linear.defvjp(lambda x, w: (_linear(x, w), (x, w)), _backward)
