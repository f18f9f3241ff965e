"""DeepSeekMoE: shared experts that see every token and routed experts that see the tokens that chose them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax import ops
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.context import LayerContext
from deepseek_jax.model.layers import SwiGLU, at_least_float32
from deepseek_jax.model.parameters import RouterBias, parameter
from deepseek_jax.model.quantized import declare_quantized, quantized
from deepseek_jax.model.router import (
    Routing,
    balanced_experts,
    combine_weights,
    expert_load,
    router_scores,
    select_experts,
    sequence_balance_loss,
)
from deepseek_jax.parallel.dispatch import NO_EXPERT, Dispatched
from deepseek_jax.parallel.pipeline.protocol import LayerStats
from deepseek_jax.precision import fp8 as fp8_layers
from deepseek_jax.precision.policy import Fp8Config, only_for


class MoEOutput(NamedTuple):
    """What an MoE layer returns."""

    y: jax.Array
    """`[B, S, D]`."""
    balance_loss: jax.Array
    """Scalar: Σ over sequences of Σ_i f_i P_i, without alpha."""
    stats: LayerStats
    """Valid (token, choice) pairs per expert, and what their dispatch meant."""


class Router(nnx.Module):
    """Scores every expert for every token, in float32 or wider; `weight` is `[D, E]`, `bias` is `[E]`."""

    def __init__(self, config: ModelConfig):
        self.config = config.moe
        experts = config.moe.num_experts
        self.weight = parameter(
            (config.hidden_size, experts), ("embed", None), init_std=config.init_std, full_precision=True
        )
        bias = parameter((experts,), (None,), kind=RouterBias, initializer="zeros", full_precision=True)
        self.bias = bias if config.moe.use_bias else None

    def __call__(self, x: jax.Array, *, force_balance: bool = False) -> tuple[jax.Array, Routing]:
        """x `[T, D]` -> affinities `[T, E]` and the routing; `force_balance` takes experts in turn instead."""
        wide = at_least_float32(x.dtype)
        # Highest, or a GPU would round to TF32: a score off by that much changes which experts are chosen.
        logits = ops.linear(x.astype(wide), self.weight[...].astype(wide), precision=jax.lax.Precision.HIGHEST)
        logits = checkpoint_name(logits, "router_logits")
        scores = router_scores(logits, self.config)
        if force_balance:
            experts = balanced_experts(x.shape[0], self.config)
        else:
            experts = select_experts(scores, None if self.bias is None else self.bias[...], self.config)
        experts = checkpoint_name(experts, "routing")
        return scores, Routing(experts, combine_weights(scores, experts, self.config))


class RoutedExperts(nnx.Module):
    """E SwiGLU networks over rows grouped by expert; `gate_up` is `[E, D, 2F]`, `down` is `[E, F, D]`."""

    def __init__(self, config: ModelConfig, fp8: Fp8Config | None = None):
        moe = config.moe
        self.fp8 = fp8
        shape = (moe.num_experts, config.hidden_size, 2 * moe.expert_ffn_size)
        self.gate_up = parameter(shape, ("expert", "embed", "expert_ffn"), init_std=config.init_std)
        shape = (moe.num_experts, moe.expert_ffn_size, config.hidden_size)
        self.down = parameter(shape, ("expert", "expert_ffn", "embed"), init_std=config.init_std)
        if fp8 is not None:
            declare_quantized(self, "gate_up", fp8)
            declare_quantized(self, "down", fp8)

    def __call__(self, inputs: Dispatched, alignment: int) -> jax.Array:
        """Rows `[M, D]` in groups that start at multiples of `alignment` -> weighted outputs `[M, D]`."""
        rows, weights, group_sizes, _ = inputs
        if self.fp8 is not None:
            assert alignment == fp8_layers.ALIGNMENT, "tiles of 128×1 would have rows of two experts"
            copies = [quantized(self, name, self.fp8) for name in ("gate_up", "down")]
            gate_up = fp8_layers.routed_linear(rows, self.gate_up[...], copies[0], group_sizes, self.fp8)
            return fp8_layers.routed_swiglu_linear(gate_up, weights, self.down[...], copies[1], group_sizes, self.fp8)
        gate_up = ops.grouped_matmul(rows, self.gate_up[...].astype(rows.dtype), group_sizes, alignment=alignment)
        gate_up = checkpoint_name(gate_up, "gate_up")
        # The down projection is linear, so weighting its input weights its output. The product is made in the weights'
        # dtype, float32 or wider, because a weight's gradient is a sum over the row.
        hidden = (ops.swiglu(gate_up) * weights[:, None]).astype(rows.dtype)
        return ops.grouped_matmul(hidden, self.down[...].astype(rows.dtype), group_sizes, alignment=alignment)


class MoE(nnx.Module):
    """`shared(x) + Σ_k weight_k expert_k(x)`."""

    def __init__(self, config: ModelConfig, fp8: Fp8Config | None = None):
        moe = config.moe
        self.router = Router(config)
        self.experts = RoutedExperts(config, only_for("routed_experts", fp8))
        shared_size = moe.num_shared_experts * moe.expert_ffn_size
        shared = functools.partial(SwiGLU, init_std=config.init_std, fp8=only_for("shared_experts", fp8))
        self.shared = shared(config.hidden_size, shared_size) if shared_size else None

    def __call__(self, x: jax.Array, ctx: LayerContext) -> MoEOutput:
        """x `[B, S, D]`; every token is computed, none dropped; padding sees the shared experts only."""
        config = self.router.config
        batch, length, width = x.shape
        tokens = x.reshape(-1, width)
        with jax.named_scope("router"):
            scores, routing = self.router(tokens, force_balance=ctx.force_balance)
            balance_loss = sequence_balance_loss(
                scores.reshape(batch, length, -1),
                routing.experts.reshape(batch, length, -1) if ctx.balance_from_routed else None,
                config,
                ctx.valid,
            )
            load = expert_load(routing.experts, config.num_experts, None if ctx.valid is None else ctx.valid.ravel())
        dispatcher, experts = ctx.dispatcher, routing.experts
        if ctx.valid is not None:  # all padding is alike, and would crowd the same few experts
            experts = jnp.where(ctx.valid.reshape(-1, 1), experts, NO_EXPERT)
        with jax.named_scope("dispatch_plan"):
            plans, traffic = dispatcher.plan(experts)
        graphdef, mine = nnx.split(self.experts)

        def one_round(plan: Any) -> jax.Array:
            with jax.named_scope("dispatch"):
                inputs = dispatcher.dispatch(tokens, routing.weights, plan)
            with jax.named_scope("routed_experts"):
                outputs = nnx.merge(graphdef, mine)(inputs, dispatcher.alignment)
            with jax.named_scope("combine"):
                return dispatcher.combine(outputs, inputs.handle)

        with jax.named_scope("shared_experts"):  # needs no token to travel
            y = jnp.zeros_like(tokens) if self.shared is None else self.shared(tokens)
        y = add_rounds(y, one_round, plans)
        return MoEOutput(y.reshape(x.shape), balance_loss, LayerStats(load, traffic))


def add_rounds(y: jax.Array, one_round: Callable[[Any], jax.Array], plans: tuple) -> jax.Array:
    """`y` and what every round adds to it.

    Several rounds are for routing that is far from even, and must not need several times the memory: only one's buffers
    exist at a time, forward and backward, so the backward pass sends and computes each round again.
    """
    if len(plans) == 1:
        return y + one_round(plans[0])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *plans)
    nothing = jax.checkpoint_policies.nothing_saveable
    step = jax.checkpoint(lambda y, plan: y + one_round(plan), policy=nothing, prevent_cse=False)
    return lax.scan(lambda y, plan: (step(y, plan), None), y, stacked)[0]
