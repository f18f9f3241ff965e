"""Floating-point operations per token, from the architecture alone.

A multiply-add counts as two, causal attention as half of the full square, and the backward pass as twice the forward;
recomputation, norms and other elementwise work count nothing. So counted, DeepSeek-V3 at 4096 tokens takes 250 GFLOP
per token to train, 260 with its MTP module. Routed experts count as often as a token visits them.
"""

from __future__ import annotations

from deepseek_jax.config import ModelConfig


def forward_flops(config: ModelConfig, length: int, *, mtp: bool = True) -> dict[str, float]:
    """FLOPs per token of a forward pass over sequences of `length` tokens, by module.

    Args:
      config: the model.
      length: tokens of a sequence; attention reads half of them on average.
      mtp: count the MTP modules and their use of the output head, as in training.
    """
    attention, moe, width = config.attention, config.moe, config.hidden_size
    heads, layers = attention.num_heads, config.num_layers
    query_size = heads * attention.qk_head_dim
    rank = attention.q_lora_rank
    queries = width * query_size if rank is None else (width + query_size) * rank
    latents = width * (attention.kv_lora_rank + attention.qk_rope_head_dim)
    keys_values = attention.kv_lora_rank * heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    projections = queries + latents + keys_values + heads * attention.v_head_dim * width
    scores_and_sums = heads * (attention.qk_head_dim + attention.v_head_dim) * length / 2
    expert = 3 * width * moe.expert_ffn_size
    moe_layers = config.num_moe_layers
    depth = config.mtp_depth if mtp else 0
    # An MTP module is an MoE layer behind its projection, and one more use of the output head.
    multiply_adds = {
        "mla projections": (layers + depth) * projections,
        "attention": (layers + depth) * scores_and_sums,
        "dense ffn": config.num_dense_layers * 3 * width * config.dense_ffn_size,
        "router": (moe_layers + depth) * width * moe.num_experts,
        "shared experts": (moe_layers + depth) * moe.num_shared_experts * expert,
        "routed experts": (moe_layers + depth) * moe.experts_per_token * expert,
        "mtp projection": depth * 2 * width * width,
        "output head": (1 + depth) * width * config.vocab_size,
    }
    return {name: 2.0 * count for name, count in multiply_adds.items()}


def training_flops(config: ModelConfig, length: int, *, mtp: bool = True) -> dict[str, float]:
    """FLOPs per token of a forward and a backward pass, by module."""
    return {name: 3 * flops for name, flops in forward_flops(config, length, mtp=mtp).items()}


def training_flops_per_token(config: ModelConfig, length: int, *, mtp: bool = True) -> float:
    """FLOPs per token of a forward and a backward pass: what MFU divides by."""
    return sum(training_flops(config, length, mtp=mtp).values())
