"""Auxiliary-loss-free load balancing: the router bias and the measures of balance (section 2.1.2; arXiv 2408.15664)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def bias_step(load: jax.Array) -> jax.Array:
    """The direction of each expert's bias for loads int32 `[..., E]`: +1 below the mean, 0 at it, -1 above it.

    Compares integers: with q, r = divmod(total, E), an expert is below the mean when c < q, or c = q and r > 0.
    float32 counts would be inexact above 2^24 and E * c would overflow int32 at full batch.
    """
    experts = load.shape[-1]
    total = load.sum(axis=-1, keepdims=True, dtype=load.dtype)
    quotient, remainder = total // experts, total % experts
    below = (load < quotient) | ((load == quotient) & (remainder > 0))
    at_mean = (load == quotient) & (remainder == 0)
    return jnp.where(below, 1, jnp.where(at_mean, 0, -1)).astype(jnp.int32)


def update_bias(bias: jax.Array, load: jax.Array, rate: jax.Array | np.float32) -> jax.Array:
    """The bias `[..., E]` after one optimizer step that saw `load` over the whole global batch; `rate` is γ."""
    return bias + rate.astype(bias.dtype) * bias_step(load).astype(bias.dtype)


def max_violation(load: jax.Array) -> jax.Array:
    """MaxVio of loads `[..., E]`: (largest load - mean) / mean, 0 where nothing was routed."""
    mean = load.mean(axis=-1, dtype=jnp.float32)
    return jnp.where(mean > 0, load.max(axis=-1).astype(jnp.float32) / jnp.maximum(mean, 1e-9) - 1, 0)
