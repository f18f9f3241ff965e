"""Named architectures. A zoo function returns a `ModelConfig`; change it with `dataclasses.replace`."""

from __future__ import annotations

import dataclasses
import math

from deepseek_jax.config import AttentionConfig, ModelConfig, MoEConfig, YarnConfig


def deepseek_v3(*, long_context: bool = False) -> ModelConfig:
    """DeepSeek-V3 671B (tech report, section 4.2). `long_context` adds YaRN, as after the context extension."""
    yarn = YarnConfig() if long_context else None
    return ModelConfig(attention=AttentionConfig(yarn=yarn))


def deepseek_v2_lite(*, long_context: bool = False) -> ModelConfig:
    """DeepSeek-V2-Lite 15.7B: no query compression, softmax router without bias (arXiv 2405.04434, appendix B).

    `long_context` adds YaRN, as after the context extension and in the released weights.
    """
    yarn = YarnConfig(mscale=0.707, mscale_all_dim=0.707) if long_context else None
    return ModelConfig(
        vocab_size=102_400,
        hidden_size=2048,
        num_layers=27,
        num_dense_layers=1,
        dense_ffn_size=10_944,
        attention=AttentionConfig(num_heads=16, q_lora_rank=None, yarn=yarn),
        moe=MoEConfig(
            num_experts=64,
            num_shared_experts=2,
            experts_per_token=6,
            expert_ffn_size=1408,
            num_groups=1,
            groups_per_token=1,
            score_function="softmax",
            group_score="max",
            normalize_weights=False,
            routed_scale=1.0,
            use_bias=False,
        ),
        mtp_depth=0,
    )


def tiny() -> ModelConfig:
    """A whole DeepSeek-V3 that trains in minutes on two CPU cores: every mechanism, small sizes."""
    return ModelConfig(
        vocab_size=4096,
        hidden_size=192,
        num_layers=4,
        num_dense_layers=1,
        dense_ffn_size=512,
        attention=AttentionConfig(
            num_heads=6, q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
        ),
        moe=MoEConfig(num_experts=16, experts_per_token=2, expert_ffn_size=128, num_groups=4, groups_per_token=2),
        mtp_depth=1,
        init_std=_scaled_init_std(192),
    )


def bench() -> ModelConfig:
    """The fixed architecture of `tools/bench/train_step.py`, small enough to compare with PyTorch on a laptop."""
    return ModelConfig(
        vocab_size=4096,
        hidden_size=256,
        num_layers=6,
        num_dense_layers=1,
        dense_ffn_size=768,
        attention=AttentionConfig(
            num_heads=8, q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
        ),
        moe=MoEConfig(num_experts=32, experts_per_token=4, expert_ffn_size=128, num_groups=4, groups_per_token=2),
        mtp_depth=0,
    )


def small() -> ModelConfig:
    """The model of `small.pretrain`: about an hour of training on two CPU cores."""
    base = tiny()
    return dataclasses.replace(
        base,
        num_layers=5,
        moe=dataclasses.replace(base.moe, num_experts=32, experts_per_token=3),
    )


def _scaled_init_std(hidden_size: int) -> float:
    """The paper's 0.006 carried over from its width of 7168: std · sqrt(width) stays; see docs/design.md."""
    return round(0.006 * math.sqrt(7168 / hidden_size), 4)
