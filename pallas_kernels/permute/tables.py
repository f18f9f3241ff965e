"""The two tables of a permutation of tokens to rows: which token a row holds, and which rows hold a token.

T tokens, K rows of each at most, R rows. `index` `[R]` has a token for each row, `slots` `[T, K]` has rows for each
token. Either may name what is not there, below zero or past the end: an empty row, or no row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike


def past_the_end(index: Array, length: int) -> Array:
    """The index as int32, `length` where it names nothing: a negative one would count from the end in jax."""
    return jnp.where((index < 0) | (index >= length), length, index).astype(jnp.int32)


def inverse_of_slots(slots: Array, num_rows: int) -> Array:
    """The token of each row, `[R]` int32, from the rows of each token `[T, K]`; T for an empty row.

    For slots that name no row twice, as those of experts do not: each pair of a token and an expert has its own.
    """
    tokens, choices = slots.shape
    token = jnp.repeat(jnp.arange(tokens, dtype=jnp.int32), choices)
    empty = jnp.full(num_rows, tokens, jnp.int32)
    return empty.at[past_the_end(slots, num_rows).reshape(-1)].set(token, mode="drop")


def weights_of_rows(weights: Array, slots: Array, num_rows: int) -> Array:
    """The weight of each row, `[R]`, from those of each token `[T, K]`; 0 for an empty row."""
    empty = jnp.zeros(num_rows, weights.dtype)
    return empty.at[past_the_end(slots, num_rows).reshape(-1)].set(weights.reshape(-1), mode="drop")


def check_inverse(index: ArrayLike, slots: ArrayLike) -> None:
    """Checks on the host, for tables that are known there, what `gather_rows` and `combine_rows` take on trust.

    Args:
      index: The token of each row, `[R]` integers.
      slots: The rows of each token, `[T, K]` integers.

    Raises:
      ValueError: if a slot names a row that another names too, or that holds another token, or a row's token has no
        slot for it.
    """
    index, slots = np.asarray(index), np.asarray(slots)
    if index.ndim != 1 or slots.ndim != 2:
        raise ValueError(f"check_inverse needs index [R] and slots [T, K], not {index.shape} and {slots.shape}")
    rows, tokens = index.shape[0], slots.shape[0]
    named = slots[(slots >= 0) & (slots < rows)]
    times = np.bincount(named, minlength=rows)
    if (times > 1).any():
        row = int(np.argmax(times > 1))
        raise ValueError(f"slots name row {row} {times[row]} times; each row belongs to one slot")
    want = np.asarray(jax.device_get(inverse_of_slots(jnp.asarray(slots), rows)))
    have = np.where((index < 0) | (index >= tokens), tokens, index)
    if (want != have).any():
        row = int(np.argmax(want != have))
        of_slots = f"token {want[row]}" if want[row] < tokens else "no token"
        raise ValueError(f"index has {index[row]} for row {row}, and slots have {of_slots} there")
