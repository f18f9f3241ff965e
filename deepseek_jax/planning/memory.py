"""Bytes that a training step holds on one device with all experts, from the architecture alone."""

from __future__ import annotations

import dataclasses
from typing import Literal

from deepseek_jax.config import ModelConfig
from deepseek_jax.planning.parameters import total_parameters


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes of each part of a step."""

    parameters: int
    """The float32 masters, and their copy in a narrower compute dtype."""
    gradients: int
    """The float32 sum, and apart from it the gradient of one microbatch, unless that is the sum."""
    moments: int
    head_gradients: int
    """Of the output head, one for each loss, kept from the forward pass to the backward pass."""
    activations: int
    """What the forward pass saves for the backward pass besides."""

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(dataclasses.astuple(self))


def step_memory(
    config: ModelConfig,
    tokens: int,
    *,
    microbatches: int = 1,
    moment_bytes: int = 4,
    compute_bytes: int = 4,
    recompute: Literal["none", "selective", "full"] = "selective",
) -> StepMemory:
    """Bytes of a step that takes a batch in `microbatches` of `tokens`.

    Args:
      config: the model.
      tokens: tokens of one microbatch.
      microbatches: how many follow each other and add up their gradients.
      moment_bytes: of each of the two moments, per parameter.
      compute_bytes: per activation, 4 or 2; with 2, weights and a microbatch's gradients have 2 too (that the few kept
        in full precision have 4 is left out).
      recompute: what the backward pass computes again instead of keeping it; see `ParallelConfig.recompute`.
    """
    parameters = total_parameters(config)
    selective = recompute == "selective"
    dense, moe = (layer_activations(config, dense=kind, selective=selective) for kind in (True, False))
    layers = config.num_dense_layers * dense + config.num_moe_layers * moe
    # An MTP module saves its two inputs, their norms joined, its last norm's input and the gradient of that's output.
    mtp = config.mtp_depth * (moe + 6 * config.hidden_size)
    if recompute == "full":
        # Each layer's input is kept, and one layer at a time computes the rest again.
        kept = config.num_layers * config.hidden_size
        layers, mtp = kept + max(dense if config.num_dense_layers else 0, moe if config.num_moe_layers else 0, mtp), 0
    # The last layer's output, and the gradient of its norm that the loss makes in the forward pass.
    ends = 2 * config.hidden_size
    copied = compute_bytes != 4
    return StepMemory(
        parameters=(4 + compute_bytes * copied) * parameters,
        gradients=(4 + compute_bytes * (copied or microbatches > 1)) * parameters,
        moments=2 * moment_bytes * parameters,
        head_gradients=(1 + config.mtp_depth) * config.hidden_size * config.vocab_size * compute_bytes,
        activations=tokens * (layers + mtp + ends) * compute_bytes,
    )


def layer_activations(config: ModelConfig, *, dense: bool, selective: bool = False) -> int:
    """Numbers per token that one layer saves: the inputs of its matrices, norms, attention and activation functions.

    With `selective` recomputation, what `model.block.SAVED_ACTIVATIONS` names: latents, attention's output and
    log-sums, the residual stream, router logits, and the gate and up projections.
    """
    attention, moe, width = config.attention, config.moe, config.hidden_size
    heads = attention.num_heads
    if selective:
        query = attention.q_lora_rank or heads * attention.qk_head_dim
        kept = 2 * width + query + attention.kv_lora_rank + attention.qk_rope_head_dim
        kept += heads * (attention.v_head_dim + 1)
        if dense:
            return kept + 2 * config.dense_ffn_size
        experts = moe.num_shared_experts + moe.experts_per_token
        return kept + moe.num_experts + 2 * experts * moe.expert_ffn_size
    latents = 2 * attention.kv_lora_rank + 2 * (attention.q_lora_rank or 0)
    queries_and_keys = 2 * heads * attention.qk_head_dim
    values_and_outputs = 2 * heads * attention.v_head_dim
    log_sums = heads
    attended = 2 * width + latents + queries_and_keys + values_and_outputs + log_sums
    if dense:
        return attended + 2 * width + 3 * config.dense_ffn_size
    shared = 3 * moe.num_shared_experts * moe.expert_ffn_size
    # Each visit keeps its row before and after its expert, and the expert's gate, up and product.
    routed = moe.experts_per_token * (2 * width + 3 * moe.expert_ffn_size)
    return attended + 2 * width + moe.num_experts + shared + routed
