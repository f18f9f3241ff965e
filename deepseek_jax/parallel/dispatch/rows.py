"""Moving rows by tables of indices. An index past the end means nothing: a zero row, or no row at all."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def take_rows(x: jax.Array, index: jax.Array, fill=0) -> jax.Array:
    """Rows of x by index, `fill` where the index is past the end."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=fill)


def sum_rows(rows: jax.Array, index: jax.Array) -> jax.Array:
    """`[M, ...]` -> `[T, ...]`: for each token the sum of the rows that index `[T, J]` names, nothing where it is past
    the end. Made in float32 or wider and rounded once.
    """
    # One gather per column and a running sum: a gather of [T, J, ...] would be written out and read again.
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    total = sum(take_rows(rows, index[:, column]).astype(wide) for column in range(index.shape[1]))
    return jnp.asarray(total, rows.dtype)


def transposed_by(function: jax.custom_vjp, transpose: Callable) -> None:
    """Makes `transpose(gradient, table)` the backward pass of the linear map `function(x, table)`."""
    function.defvjp(lambda x, table: (function(x, table), table), lambda table, g: (transpose(g, table), None))
