"""Multi-token prediction (section 2.2, equations 21-25): modules that each predict one token further.

At position i, module k (from 1) joins the previous depth's hidden state of position i with the embedding of token
i + k, runs one MoE layer, and predicts token i + k + 1 with the shared output head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.block import Block
from deepseek_jax.model.layers import Linear, RMSNorm
from deepseek_jax.precision.policy import Fp8Config


class MTPModule(nnx.Module):
    """One depth. The released weights join the embedding first, then the hidden state; so does this."""

    def __init__(self, config: ModelConfig, fp8: Fp8Config | None = None):
        size, eps = config.hidden_size, config.rms_norm_eps
        self.embedding_norm = RMSNorm(size, eps)
        self.hidden_norm = RMSNorm(size, eps)
        self.projection = Linear(2 * size, size, (None, "embed"), init_std=config.init_std)
        self.block = Block(config, fp8=fp8)
        self.final_norm = RMSNorm(size, eps)

    def join(self, hidden: jax.Array, embedding: jax.Array) -> jax.Array:
        """What the layer reads `[B, S, D]`: hidden `[B, S, D]` of the previous depth, after its final norm, and the
        embedding `[B, S, D]` of token i + k."""
        return self.projection(jnp.concatenate([self.embedding_norm(embedding), self.hidden_norm(hidden)], axis=-1))

    def leave(self, x: jax.Array) -> jax.Array:
        """The hidden state for the head and for the next depth: this module's own final norm of its layer's output."""
        # Or the experts' outputs would travel again for the backward pass of the norm.
        return self.final_norm(checkpoint_name(x, "mtp_out"))


def shift_left(x: jax.Array, steps: int, fill: int = 0) -> jax.Array:
    """x `[B, S, ...]` moved `steps` positions towards the start; the freed end holds `fill`."""
    if steps == 0:
        return x
    padded = jnp.full((x.shape[0], min(steps, x.shape[1]), *x.shape[2:]), fill, x.dtype)
    return jnp.concatenate([x[:, steps:], padded], axis=1)
