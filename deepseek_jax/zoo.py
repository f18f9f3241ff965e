"""Named architectures. A zoo function returns a `ModelConfig`; change it with `dataclasses.replace`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from deepseek_jax.config import AttentionConfig, ModelConfig, MoEConfig, YarnConfig


def deepseek_v3(*, long_context: bool = False) -> ModelConfig:
    """DeepSeek-V3 671B (tech report, section 4.2). `long_context` adds YaRN, as after the context extension."""
    yarn = YarnConfig() if long_context else None
    return ModelConfig(attention=AttentionConfig(yarn=yarn))


def deepseek_v3_base(*, long_context: bool = False) -> ModelConfig:
    """DeepSeek-V3-Base: `deepseek_v3` before post-training, which changes weights only."""
    return deepseek_v3(long_context=long_context)


def deepseek_r1(*, long_context: bool = False) -> ModelConfig:
    """DeepSeek-R1 and R1-Zero: `deepseek_v3` in every constant, trained on from V3-Base."""
    return deepseek_v3(long_context=long_context)


def deepseek_v3_1(*, long_context: bool = False) -> ModelConfig:
    """DeepSeek-V3.1: `deepseek_v3` in every constant.

    What is new is the format of its files, whose FP8 scales are powers of two (`scale_fmt: ue8m0`). That belongs to the
    files and not to the architecture: see `interop.architecture.Quantization`.
    """
    return deepseek_v3(long_context=long_context)


def deepseek_v2(*, long_context: bool = False) -> ModelConfig:
    """DeepSeek-V2 236B: softmax router without bias, groups ranked by their best expert (arXiv 2405.04434).

    `long_context` adds YaRN with the paper's temperature of 0.707, as after the context extension. Files of V2 and V2.5
    differ in it, so take it from `config.json` when loading weights.
    """
    return ModelConfig(
        vocab_size=102_400,
        hidden_size=5120,
        num_layers=60,
        num_dense_layers=1,
        dense_ffn_size=12_288,
        attention=AttentionConfig(yarn=_v2_yarn() if long_context else None),
        moe=_v2_moe(
            num_experts=160,
            num_shared_experts=2,
            experts_per_token=6,
            expert_ffn_size=1536,
            num_groups=8,
            groups_per_token=3,
            routed_scale=16.0,
        ),
        mtp_depth=0,
    )


def deepseek_v2_lite(*, long_context: bool = False) -> ModelConfig:
    """DeepSeek-V2-Lite 15.7B: no query compression, softmax router without bias (arXiv 2405.04434, appendix B).

    `long_context` adds YaRN, as after the context extension and in the released weights.
    """
    return ModelConfig(
        vocab_size=102_400,
        hidden_size=2048,
        num_layers=27,
        num_dense_layers=1,
        dense_ffn_size=10_944,
        attention=AttentionConfig(num_heads=16, q_lora_rank=None, yarn=_v2_yarn() if long_context else None),
        moe=_v2_moe(
            num_experts=64,
            num_shared_experts=2,
            experts_per_token=6,
            expert_ffn_size=1408,
            num_groups=1,
            groups_per_token=1,
            routed_scale=1.0,
        ),
        mtp_depth=0,
    )


def moonlight_16b_a3b() -> ModelConfig:
    """Moonlight-16B-A3B of Moonshot AI: V2-Lite's shape with V3's router, 8192 tokens without YaRN, no MTP."""
    return ModelConfig(
        vocab_size=163_840,
        hidden_size=2048,
        num_layers=27,
        num_dense_layers=1,
        dense_ffn_size=11_264,
        attention=AttentionConfig(num_heads=16, q_lora_rank=None, rope_theta=50_000.0),
        moe=MoEConfig(
            num_experts=64,
            num_shared_experts=2,
            experts_per_token=6,
            expert_ffn_size=1408,
            num_groups=1,
            groups_per_token=1,
            routed_scale=2.446,
        ),
        mtp_depth=0,
        rms_norm_eps=1e-5,
    )


def kimi_k2(*, long_context: bool = False) -> ModelConfig:
    """Kimi K2 of Moonshot AI, 1T: V3 with 384 experts in one group, 64 heads and one dense layer, no MTP.

    `long_context` adds YaRN to 131,072 tokens, as in the first released weights; later ones have factor 64. Files
    differ in the norms' epsilon as well (1e-6 here), so take both from `config.json` when loading weights.
    """
    yarn = YarnConfig(factor=32.0, beta_fast=1.0, beta_slow=1.0) if long_context else None
    return ModelConfig(
        vocab_size=163_840,
        num_dense_layers=1,
        attention=AttentionConfig(num_heads=64, rope_theta=50_000.0, yarn=yarn),
        moe=MoEConfig(num_experts=384, num_groups=1, groups_per_token=1, routed_scale=2.827),
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


def _v2_moe(**sizes: Any) -> MoEConfig:
    """V2's router: softmax without bias, groups ranked by their best expert, weights not renormalised."""
    return MoEConfig(score_function="softmax", group_score="max", normalize_weights=False, use_bias=False, **sizes)


def _v2_yarn() -> YarnConfig:
    """V3's extension with the temperature of V2."""
    return YarnConfig(mscale=0.707, mscale_all_dim=0.707)
