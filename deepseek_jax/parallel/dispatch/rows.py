"""Moving rows by tables of indices. An index past the end means nothing: a zero row, or no row at all."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from deepseek_jax import ops


def take_rows(x: jax.Array, index: jax.Array, fill=0) -> jax.Array:
    """Rows of x by index, `fill` where the index is past the end."""
    # Rows of a kernel are a line of 128 numbers at least; scales are narrower.
    if fill == 0 and x.ndim == 2 and x.shape[1] >= 128 and jnp.issubdtype(x.dtype, jnp.floating):
        return ops.gather_rows(x, index)
    return jnp.take(x, index, axis=0, mode="fill", fill_value=fill)


def sum_rows(rows: jax.Array, index: jax.Array) -> jax.Array:
    """`[M, ...]` -> `[T, ...]`: for each token the sum of the rows that index `[T, J]` names, nothing where it is past
    the end. Made in float32 or wider and rounded once.
    """
    matrix = rows.reshape(rows.shape[0], math.prod(rows.shape[1:]))
    return ops.combine_rows(matrix, index).reshape(index.shape[0], *rows.shape[1:])


def transposed_by(function: jax.custom_vjp, transpose: Callable) -> None:
    """Makes `transpose(gradient, table)` the backward pass of the linear map `function(x, table)`."""
    function.defvjp(lambda x, table: (function(x, table), table), lambda table, g: (transpose(g, table), None))
