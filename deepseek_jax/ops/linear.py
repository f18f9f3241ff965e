"""Matrix product with a weight whose gradient is a plain product too.

Shape letters: T tokens, K and N the two widths of the weight.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax


def linear(x: Array, w: Array, *, precision: lax.Precision | None = None) -> Array:
    """`x @ w` for x `[..., K]` and w `[K, N]` of one dtype, which the result has.

    `precision` is jax's: HIGHEST keeps a GPU from rounding float32 operands to TF32, in the gradients as well.
    """
    return _linear(x.reshape(-1, x.shape[-1]), w, precision).reshape(*x.shape[:-1], w.shape[-1])


def transposed(x: Array) -> Array:
    """The transpose of a matrix, for the first operand of a product over tokens, as in `transposed(x) @ dy`.

    XLA's CPU backend has no fast kernel for a product over the first axis of its first operand, and folds a transpose
    into just that; the barrier makes it write the transpose out, which costs a tenth of what it saves.
    """
    return lax.optimization_barrier(x.T) if jax.default_backend() == "cpu" else x.T


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x, w, precision):
    return jnp.matmul(x, w, precision=precision)


def _forward(x, w, precision):
    return _linear(x, w, precision), (x, w)


def _backward(precision, residuals, dy):
    x, w = residuals
    return jnp.matmul(dy, w.T, precision=precision), jnp.matmul(transposed(x), dy, precision=precision)


_linear.defvjp(_forward, _backward)
