"""The activation of every feed-forward network here."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def swiglu(gate_up: jax.Array) -> jax.Array:
    """`silu(gate) * up` of `[..., 2F]`, whose first half is the gate: `[..., F]`."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up
