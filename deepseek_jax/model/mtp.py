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
from deepseek_jax.model.context import LayerContext
from deepseek_jax.model.layers import Linear, RMSNorm
from deepseek_jax.parallel.pipeline.protocol import LayerStats


class MTPModule(nnx.Module):
    """One depth. The released weights join the embedding first, then the hidden state; so does this."""

    def __init__(self, config: ModelConfig):
        size, eps = config.hidden_size, config.rms_norm_eps
        self.embedding_norm = RMSNorm(size, eps)
        self.hidden_norm = RMSNorm(size, eps)
        self.projection = Linear(2 * size, size, (None, "embed"), init_std=config.init_std)
        self.block = Block(config)
        self.final_norm = RMSNorm(size, eps)

    def __call__(
        self, hidden: jax.Array, embedding: jax.Array, ctx: LayerContext
    ) -> tuple[jax.Array, jax.Array, LayerStats]:
        """hidden `[B, S, D]` of the previous depth, after its final norm, and embedding `[B, S, D]` of token i + k.

        Returns the hidden state after this module's own final norm (for the head and for the next depth), the
        balance loss and the stats.
        """
        joined = jnp.concatenate([self.embedding_norm(embedding), self.hidden_norm(hidden)], axis=-1)
        x, balance_loss, stats = self.block(self.projection(joined), ctx)
        # Or the experts' outputs would travel again for the backward pass of the norm.
        x = checkpoint_name(x, "mtp_out")
        return self.final_norm(x), balance_loss, stats


def shift_left(x: jax.Array, steps: int, fill: int = 0) -> jax.Array:
    """x `[B, S]` moved `steps` positions towards the start; the freed end holds `fill`."""
    if steps == 0:
        return x
    padded = jnp.full((x.shape[0], min(steps, x.shape[1])), fill, x.dtype)
    return jnp.concatenate([x[:, steps:], padded], axis=1)
