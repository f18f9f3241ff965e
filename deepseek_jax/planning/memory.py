"""Bytes that a training step holds on one device with all experts, from the architecture alone."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal, NamedTuple

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.parameters import abstract_values
from deepseek_jax.model.quantized import QuantizedWeight, quantized_names
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.planning.parameters import total_parameters
from deepseek_jax.precision.policy import Fp8Config
from deepseek_jax.tree import flatten


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes of each part of a step."""

    parameters: int
    """The float32 masters, and their copies for the matmuls, in a narrower compute dtype or in FP8."""
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


class Saved(NamedTuple):
    """Numbers per token that a layer saves, by what becomes of them in FP8."""

    plain: int
    """Inputs of norms, latents, the attention core's q, k, v and log-sums, router logits: as they are."""
    inputs: int = 0
    """Inputs of linear layers: codes and scales."""
    attention_output: int = 0
    """Input of the output projection: E5M6."""
    swiglu_inputs: int = 0
    """Codes and scales."""
    swiglu_outputs: int = 0
    """Made again in FP8."""
    outputs: int = 0
    """Of experts, for the gradients of their weights: in FP8 these are of what goes into the down projection."""
    again: int = 0
    """Inputs of linear layers that something else reads too, so that FP8 keeps them as they are besides."""


def step_memory(
    config: ModelConfig,
    tokens: int,
    *,
    microbatches: int = 1,
    moment_bytes: int = 4,
    compute_bytes: int = 4,
    recompute: Literal["none", "selective", "full"] = "selective",
    fp8: Fp8Config | None = None,
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
      fp8: how linear layers run in FP8. Activations are counted as if all of them did.
    """
    parameters = total_parameters(config)
    selective = recompute == "selective"
    dense, moe = (layer_bytes(config, kind, selective, compute_bytes, fp8 is not None) for kind in (True, False))
    layers = config.num_dense_layers * dense + config.num_moe_layers * moe
    # An MTP module saves its two inputs, their norms joined, its last norm's input and the gradient of that's output.
    mtp = config.mtp_depth * (moe + 6 * config.hidden_size * compute_bytes)
    if recompute == "full":
        # Each layer's input is kept, and one layer at a time computes the rest again.
        kept = config.num_layers * config.hidden_size * compute_bytes
        layers, mtp = kept + max(dense if config.num_dense_layers else 0, moe if config.num_moe_layers else 0, mtp), 0
    # The last layer's output, and the gradient of its norm that the loss makes in the forward pass.
    ends = 2 * config.hidden_size * compute_bytes
    copied = compute_bytes != 4
    quantised, copies = _quantised(config, fp8)
    others = parameters - quantised
    apart = 4 * quantised + compute_bytes * others if copied or microbatches > 1 else 0
    return StepMemory(
        parameters=4 * parameters + compute_bytes * copied * others + copies,
        gradients=4 * parameters + apart,
        moments=2 * moment_bytes * parameters,
        head_gradients=(1 + config.mtp_depth) * config.hidden_size * config.vocab_size * compute_bytes,
        activations=round(tokens * (layers + mtp + ends)),
    )


@functools.lru_cache(maxsize=32)
def _quantised(config: ModelConfig, fp8: Fp8Config | None) -> tuple[int, int]:
    """How many parameters have a copy in FP8, whose gradients are float32; and the bytes of those copies."""
    if fp8 is None:
        return 0, 0
    model = Transformer(config, fp8)
    weights = flatten(abstract_values(model))
    copies = flatten(abstract_values(model, QuantizedWeight)).values()
    numbers = sum(math.prod(weights[name].shape) for name in quantized_names(model))
    return numbers, sum(math.prod(copy.shape) * copy.dtype.itemsize for copy in copies)


def layer_activations(config: ModelConfig, *, dense: bool, selective: bool = False) -> int:
    """Numbers per token that one layer saves: the inputs of its matrices, norms, attention and activation functions.

    With `selective` recomputation, what `model.block.SAVED_ACTIVATIONS` names: latents, attention's output and
    log-sums, the residual stream, router logits, and the gate and up projections.
    """
    saved = (_selective if selective else _whole)(config, dense)
    return sum(saved._replace(again=0))


def layer_bytes(config: ModelConfig, dense: bool, selective: bool, compute_bytes: int, fp8: bool) -> float:
    """Bytes per token of the same, with linear layers in FP8 or not."""
    if not fp8:
        return compute_bytes * layer_activations(config, dense=dense, selective=selective)
    saved = (_selective if selective else _whole)(config, dense)
    tiles, packed = 1 + 4 / 128, 1.5 + 4 / 128
    return (
        compute_bytes * (saved.plain + saved.again)
        + tiles * (saved.inputs + saved.swiglu_inputs)
        + packed * saved.attention_output
    )


def _selective(config: ModelConfig, dense: bool) -> Saved:
    attention, moe, width = config.attention, config.moe, config.hidden_size
    heads = attention.num_heads
    query = attention.q_lora_rank or heads * attention.qk_head_dim
    plain = 2 * width + query + attention.kv_lora_rank + attention.qk_rope_head_dim + heads
    ffn = config.dense_ffn_size if dense else (moe.num_shared_experts + moe.experts_per_token) * moe.expert_ffn_size
    return Saved(
        plain=plain if dense else plain + moe.num_experts,
        attention_output=heads * attention.v_head_dim,
        swiglu_inputs=2 * ffn,
    )


def _whole(config: ModelConfig, dense: bool) -> Saved:
    attention, moe, width = config.attention, config.moe, config.hidden_size
    heads, latents = attention.num_heads, attention.kv_lora_rank + (attention.q_lora_rank or 0)
    core = heads * (2 * attention.qk_head_dim + attention.v_head_dim + 1)
    attended = Saved(
        plain=width + latents + core + width,  # and the input of the second norm
        inputs=width + latents + width,
        attention_output=heads * attention.v_head_dim,
    )
    if dense:
        return attended._replace(swiglu_inputs=2 * config.dense_ffn_size, swiglu_outputs=config.dense_ffn_size)
    visits = moe.experts_per_token
    ffn = (moe.num_shared_experts + visits) * moe.expert_ffn_size
    return attended._replace(
        plain=attended.plain + moe.num_experts,
        # Each visit keeps its row before and after its expert.
        inputs=attended.inputs + visits * width,
        outputs=visits * width,
        swiglu_inputs=2 * ffn,
        swiglu_outputs=ffn,
        again=width,  # the router reads it
    )
