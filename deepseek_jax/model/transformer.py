"""The whole model as one NNX module, made of the pieces that the training step and the pipeline use one by one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from deepseek_jax import ops
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.block import Block
from deepseek_jax.model.context import LayerContext
from deepseek_jax.model.layers import Embedding, Linear, RMSNorm
from deepseek_jax.model.mtp import MTPModule
from deepseek_jax.model.parameters import stack
from deepseek_jax.model.rope import rope_tables
from deepseek_jax.parallel.dispatch import Dispatcher, LocalDispatcher
from deepseek_jax.precision.fp8 import ALIGNMENT
from deepseek_jax.precision.policy import Fp8Config, only_for


class Transformer(nnx.Module):
    """DeepSeek-V3 of any size. Built abstract (see `parameters`); layers of one kind are stacked and scanned.

    `dense`, `moe` and `mtp` hold `[layers, ...]` parameters, so compile time does not grow with depth.
    """

    def __init__(self, config: ModelConfig, fp8: Fp8Config | None = None):
        """`fp8`: how linear layers run in FP8 while training; such a model needs quantised copies of its weights."""
        self.config, self.fp8 = config, fp8
        std = config.init_std
        self.embedding = Embedding(config.vocab_size, config.hidden_size, init_std=std)
        block = functools.partial(Block, config, fp8=fp8)
        self.dense = stack(block(dense=True), config.num_dense_layers) if config.num_dense_layers else None
        self.moe = stack(block(), config.num_moe_layers) if config.num_moe_layers else None
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mtp = stack(MTPModule(config, fp8), config.mtp_depth) if config.mtp_depth else None
        head = Linear(config.hidden_size, config.vocab_size, ("embed", "vocab"), init_std=std)
        self.head = None if config.tie_embeddings else head

    @property
    def alignment(self) -> int:
        """At whose multiples the groups of rows start that routed experts read."""
        return ALIGNMENT if only_for("routed_experts", self.fp8) else ops.preferred_alignment()

    def context(
        self,
        positions: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        valid: jax.Array | None = None,
        dispatcher: Dispatcher | None = None,
        balance_from_routed: bool = False,
        force_balance: bool = False,
        dtype=jnp.float32,
    ) -> LayerContext:
        """The context of a microbatch at `positions` int32 `[B, S]`; experts are all local unless told otherwise."""
        cos, sin = rope_tables(self.config.attention, positions, dtype)
        if dispatcher is None:
            dispatcher = LocalDispatcher(self.config.moe.num_experts, self.alignment)
        return LayerContext(cos, sin, dispatcher, segment_ids, valid, balance_from_routed, force_balance)

    def head_weight(self) -> jax.Array:
        """The output head `[D, V]`; the embedding's transpose where they are tied."""
        return self.embedding.weight[...].T if self.head is None else self.head.weight[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """`[..., D]` after a final norm -> logits `[..., V]` in float32 or wider."""
        weight = self.head_weight().astype(hidden.dtype)
        return jnp.matmul(hidden, weight, preferred_element_type=jnp.promote_types(hidden.dtype, jnp.float32))

    def __call__(
        self, tokens: jax.Array, *, positions: jax.Array | None = None, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """Logits `[B, S, V]` of tokens int32 `[B, S]`; the main model only."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self.embedding(tokens)
        ctx = self.context(positions, segment_ids=segment_ids, dtype=x.dtype)
        for layers in (self.dense, self.moe):
            if layers is not None:
                x = apply_layers(layers, x, ctx)
        return self.logits(self.final_norm(x))


def apply_layers(layers: nnx.Module, x: jax.Array, ctx: LayerContext) -> jax.Array:
    """Applies a stack of layers in turn, outputs only."""
    graphdef, state = nnx.split(layers)

    def step(x, params):
        return nnx.merge(graphdef, params)(x, ctx)[0], None

    return lax.scan(step, x, nnx.to_pure_dict(state))[0]
