"""The loss for a user's own training loop: next-token prediction, and nothing else."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deepseek_jax import ops
from deepseek_jax.model.transformer import Transformer, apply_layers


def loss(model: Transformer, tokens: jax.Array) -> jax.Array:
    """Mean cross entropy, in nats, of predicting each token of `[B, S + 1]` int32 but the first from those before it.

    The main model's only: no MTP, no balance loss; both are the train step's. Logits never exist whole.
    """
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    x = model.embedding(inputs)
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
    ctx = model.context(positions, dtype=x.dtype)
    for layers in (model.dense, model.moe):
        if layers is not None:
            x = apply_layers(layers, x, ctx)
    hidden = model.final_norm(x).reshape(-1, x.shape[-1])
    return ops.cross_entropy(hidden, model.head_weight().astype(x.dtype), labels.reshape(-1)).mean()
