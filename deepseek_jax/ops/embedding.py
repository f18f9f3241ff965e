"""Lookup of token embeddings, whose gradient is summed in float32. V vocabulary (of this shard), D model width."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.implementation import accumulator


def lookup(weight: Array, tokens: Array, vocab_offset: int | Array | None = None) -> Array:
    """Rows of `weight` `[V, D]` for tokens int32 `[...]`: `[..., D]`, in the weight's dtype.

    With `vocab_offset` (a scalar, may be traced) the weight is rows `[vocab_offset, vocab_offset + V)` of a larger one.
    A token outside gives zeros and gets no gradient, so that the results of all shards add up to the whole. Without it
    a token beyond the vocabulary is its last one.
    """
    if vocab_offset is None:
        return _lookup(weight, tokens, "clip")
    rows = weight.shape[0]
    local = tokens - vocab_offset
    inside = (local >= 0) & (local < rows)
    # Tokens outside are one row past the end: the last one where they are read, dropped where gradients are added.
    return jnp.where(inside[..., None], _lookup(weight, jnp.where(inside, local, rows), "drop"), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lookup(weight, tokens, beyond):
    """`beyond`: what becomes of the gradient of a token past the last row, "clip" or "drop"."""
    return jnp.take(weight, tokens, axis=0, mode="clip")


def _forward(weight, tokens, beyond):
    return _lookup(weight, tokens, beyond), (weight, tokens)


def _backward(beyond, residuals, gradient):
    """Sums over the occurrences of a token in float32: in bfloat16 the sum of a frequent one stops growing at 256."""
    weight, tokens = residuals
    total = jnp.zeros_like(weight, dtype=accumulator(weight))
    return total.at[tokens].add(gradient.astype(total.dtype), mode=beyond).astype(weight.dtype), None


_lookup.defvjp(_forward, _backward)
