"""One decoder layer, and the layer protocol: `layer(params, x, ctx) -> (x, aux, stats)`.

`aux` is the layer's balance loss (its cotangent is a constant), `stats` what it counts (no gradient). A dense layer
returns zero and an empty load. The pipeline, rematerialisation, checkpoints and the planner all work on this unit.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.attention import LatentAttention
from deepseek_jax.model.context import LayerContext
from deepseek_jax.model.layers import RMSNorm, SwiGLU, at_least_float32
from deepseek_jax.model.moe import MoE, MoEOutput
from deepseek_jax.parallel.pipeline.protocol import LayerStats
from deepseek_jax.precision.policy import Fp8Config, only_for

SAVED_ACTIVATIONS = (
    "query",
    "q_latent",
    "kv_latent",
    "attention_out",
    "attention_lse",
    "attention_residual",
    "router_logits",
    "routing",
    "dispatch_plan",
    "dispatched_rows",
    "gate_up",
    "mtp_out",
    "cross_entropy_gradients",
)
"""What a layer keeps for its backward pass under selective recomputation: all but norms, MLA's up-projections, SwiGLU
(section 3.2.3) and the grouped rows, which are computed again; rows that came from other devices are kept. Names are
those given to `checkpoint_name`."""


class Block(nnx.Module):
    """Pre-norm attention, then a pre-norm feed-forward network: dense SwiGLU, or DeepSeekMoE."""

    def __init__(self, config: ModelConfig, *, dense: bool = False, fp8: Fp8Config | None = None):
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = LatentAttention(config, only_for("attention", fp8))
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if dense:
            ffn = functools.partial(SwiGLU, init_std=config.init_std, fp8=only_for("dense_ffn", fp8))
            self.ffn: SwiGLU | MoE = ffn(config.hidden_size, config.dense_ffn_size)
        else:
            self.ffn = MoE(config, fp8)

    def __call__(self, x: jax.Array, ctx: LayerContext) -> tuple[jax.Array, jax.Array, LayerStats]:
        """x `[B, S, D]` -> (x, balance loss scalar, stats)."""
        with jax.named_scope("attention"):
            x = checkpoint_name(x + self.attention(self.attention_norm(x), ctx), "attention_residual")
        with jax.named_scope("ffn"):
            return self.feed_forward(x, ctx)

    def feed_forward(self, x: jax.Array, ctx: LayerContext) -> tuple[jax.Array, jax.Array, LayerStats]:
        """The second half of the layer, shared by training and decoding."""
        y = self.ffn(self.ffn_norm(x), ctx) if isinstance(self.ffn, MoE) else self.ffn(self.ffn_norm(x))
        if isinstance(y, MoEOutput):
            return x + y.y, y.balance_loss, y.stats
        return x + y, jnp.zeros((), at_least_float32(x.dtype)), LayerStats.none()
