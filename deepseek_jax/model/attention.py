"""Multi-head Latent Attention (section 2.1.1, equations 1-11).

Keys and values are made from one small latent per token, so a cache holds `kv_lora_rank + qk_rope_head_dim` numbers
per token and layer. Two forms of the same function: expanded, for training and prefill, makes every head's keys and
values; absorbed, for decoding, folds the up-projections into the query and the output and attends over latents.

B batch, S query tokens, T cached tokens, H heads, C latent rank, R rotary dimensions.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax import ops
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.context import LayerContext
from deepseek_jax.model.layers import Linear, RMSNorm, at_least_float32
from deepseek_jax.model.quantized import quantized
from deepseek_jax.model.rope import apply_rope, softmax_scale
from deepseek_jax.precision.fp8 import attention_output
from deepseek_jax.precision.policy import Fp8Config

LATENT_NORM_EPS = 1e-6
"""The norms after the compressed latents keep this epsilon whatever the model's own is."""


class LatentAttention(nnx.Module):
    """MLA with or without query compression; maps `[B, S, D]` to `[B, S, D]`."""

    def __init__(self, config: ModelConfig, fp8: Fp8Config | None = None):
        attention = config.attention
        self.config = attention
        linear = functools.partial(Linear, init_std=config.init_std, fp8=fp8)
        heads = attention.num_heads
        query_size = heads * attention.qk_head_dim
        if attention.q_lora_rank is None:
            self.q = linear(config.hidden_size, query_size, ("embed", "heads"))
        else:
            self.q_a = linear(config.hidden_size, attention.q_lora_rank, ("embed", None))
            self.q_a_norm = RMSNorm(attention.q_lora_rank, LATENT_NORM_EPS)
            self.q_b = linear(attention.q_lora_rank, query_size, (None, "heads"))
        cache_size = attention.kv_lora_rank + attention.qk_rope_head_dim
        key_value_size = heads * (attention.qk_nope_head_dim + attention.v_head_dim)
        self.kv_a = linear(config.hidden_size, cache_size, ("embed", None))
        self.kv_a_norm = RMSNorm(attention.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b = linear(attention.kv_lora_rank, key_value_size, (None, "heads"))
        self.o = linear(heads * attention.v_head_dim, config.hidden_size, ("heads", "embed"))

    def __call__(self, x: jax.Array, ctx: LayerContext) -> jax.Array:
        """Causal self-attention over `[B, S, D]`, expanded form."""
        return self.expanded(x, ctx)[0]

    def expanded(self, x: jax.Array, ctx: LayerContext) -> tuple[jax.Array, jax.Array]:
        """The expanded form; also returns the cache entries `[B, S, C + R]` of these tokens."""
        cfg = self.config
        q_nope, q_rope = self._queries(x, ctx)
        latent, k_rope = self._latents(x, ctx)
        key_values = self.kv_b(latent).reshape(*x.shape[:2], cfg.num_heads, -1)
        k_nope, v = jnp.split(key_values, [cfg.qk_nope_head_dim], axis=-1)
        # Copied in float32 or wider, because the gradient of that is a sum over the heads.
        shared = k_rope[:, :, None].astype(at_least_float32(x.dtype))
        k_rope_per_head = jnp.broadcast_to(shared, (*k_nope.shape[:3], cfg.qk_rope_head_dim)).astype(x.dtype)
        q = jnp.concatenate([q_nope, q_rope], axis=-1)
        k = jnp.concatenate([k_nope, k_rope_per_head], axis=-1)
        options: Any = {"scale": softmax_scale(cfg), "segment_ids": ctx.segment_ids}
        if self.o.fp8 is not None:
            weight, copy = self.o.weight[...], quantized(self.o, "weight", self.o.fp8)
            y = attention_output(q, k, v, weight, copy, self.o.fp8, **options)
        else:
            y = self.o(ops.attention(q, k, v, **options).reshape(*x.shape[:2], -1))
        return y, jnp.concatenate([latent, k_rope], axis=-1)

    def absorbed(self, x: jax.Array, cache: jax.Array, visible: jax.Array, ctx: LayerContext) -> jax.Array:
        """Attends from x `[B, S, D]` over cache entries `[B, T, C + R]`; equal to the expanded form.

        The cache already holds the entries of x's own tokens (see `cache_entries`); `visible` is bool `[B, S, T]`.
        Weights: `W_UK` is folded into the query, `W_UV` applied to the attended latent.
        """
        cfg = self.config
        wide = at_least_float32(x.dtype)
        up = self.kv_b.weight[...].astype(x.dtype).reshape(cfg.kv_lora_rank, cfg.num_heads, -1)
        w_uk, w_uv = jnp.split(up, [cfg.qk_nope_head_dim], axis=-1)
        q_nope, q_rope = self._queries(x, ctx)
        q_latent = jnp.einsum("bshn,chn->bshc", q_nope, w_uk)
        latent, k_rope = jnp.split(cache.astype(x.dtype), [cfg.kv_lora_rank], axis=-1)
        scores = jnp.einsum("bshc,btc->bhst", q_latent, latent, preferred_element_type=wide)
        scores += jnp.einsum("bshr,btr->bhst", q_rope, k_rope, preferred_element_type=wide)
        scores = jnp.where(visible[:, None], scores * softmax_scale(cfg), -jnp.inf)
        probabilities = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        attended = jnp.einsum("bhst,btc->bshc", probabilities, latent)
        out = jnp.einsum("bshc,chv->bshv", attended, w_uv)
        return self.o(out.reshape(*x.shape[:2], -1))

    def cache_entries(self, x: jax.Array, ctx: LayerContext) -> jax.Array:
        """What the cache keeps of tokens x `[B, S, D]`: normed latent and rotated key, `[B, S, C + R]`."""
        return jnp.concatenate(self._latents(x, ctx), axis=-1)

    def _queries(self, x: jax.Array, ctx: LayerContext) -> tuple[jax.Array, jax.Array]:
        """The part without positions `[B, S, H, nope]` and the rotated part `[B, S, H, R]`."""
        cfg = self.config
        if cfg.q_lora_rank is None:
            q = checkpoint_name(self.q(x), "query")
        else:
            q = self.q_b(self.q_a_norm(checkpoint_name(self.q_a(x), "q_latent")))
        q_nope, q_rope = jnp.split(
            q.reshape(*x.shape[:2], cfg.num_heads, cfg.qk_head_dim), [cfg.qk_nope_head_dim], axis=-1
        )
        return q_nope, apply_rope(q_rope, ctx.cos[:, :, None], ctx.sin[:, :, None])

    def _latents(self, x: jax.Array, ctx: LayerContext) -> tuple[jax.Array, jax.Array]:
        """The normed latent `[B, S, C]` and the rotated key `[B, S, R]` that all heads share (not normed)."""
        latent, k_rope = jnp.split(checkpoint_name(self.kv_a(x), "kv_latent"), [self.config.kv_lora_rank], axis=-1)
        return self.kv_a_norm(latent), apply_rope(k_rope, ctx.cos, ctx.sin)
