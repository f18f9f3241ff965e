"""The architecture's defaults are DeepSeek-V3's, and what cannot work says what to change."""

import dataclasses

import pytest

from deepseek_jax.config import AttentionConfig, ConfigError, ModelConfig, MoEConfig, YarnConfig


def test_defaults_are_deepseek_v3():
    # Tech report (arXiv 2412.19437), section 4.2.
    model = ModelConfig()
    assert (model.num_layers, model.num_dense_layers, model.hidden_size) == (61, 3, 7168)
    assert (model.dense_ffn_size, model.vocab_size, model.mtp_depth) == (18432, 129280, 1)
    attention = model.attention
    assert (attention.num_heads, attention.q_lora_rank, attention.kv_lora_rank) == (128, 1536, 512)
    assert (attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.v_head_dim) == (128, 64, 128)
    moe = model.moe
    assert (moe.num_experts, moe.num_shared_experts, moe.experts_per_token, moe.expert_ffn_size) == (256, 1, 8, 2048)
    assert (moe.num_groups, moe.groups_per_token, moe.routed_scale) == (8, 4, 2.5)
    assert (model.init_std, model.num_moe_layers, attention.qk_head_dim, moe.experts_per_group) == (0.006, 58, 192, 32)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().num_layers = 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MoEConfig(num_experts=30), r"moe.num_experts \(30\) must be a multiple of moe.num_groups \(8\)"),
        (lambda: MoEConfig(groups_per_token=9), r"moe.groups_per_token \(9\) exceeds moe.num_groups \(8\)"),
        (
            lambda: MoEConfig(num_experts=16, num_groups=8, groups_per_token=2),
            r"moe.experts_per_token \(8\) exceeds the 4 experts that 2 groups of 2 offer; raise moe.groups_per_token",
        ),
        (
            lambda: MoEConfig(num_experts=8, num_groups=8, groups_per_token=8),
            "top2_sum needs at least 2 experts per group; lower moe.num_groups",
        ),
        (lambda: MoEConfig(num_shared_experts=-1), "moe.num_shared_experts cannot be negative: -1"),
        (lambda: MoEConfig(score_function="tanh"), "moe.score_function must be one of sigmoid, softmax, not 'tanh'"),
        (lambda: AttentionConfig(num_heads=0), "attention.num_heads must be positive, not 0"),
        (lambda: AttentionConfig(qk_rope_head_dim=7), "attention.qk_rope_head_dim rotates pairs and must be even"),
        (lambda: AttentionConfig(q_lora_rank=0), "attention.q_lora_rank must be positive, or none"),
        (lambda: YarnConfig(factor=0.5), "yarn.factor must be at least 1, not 0.5"),
        (lambda: YarnConfig(beta_fast=0.5), r"yarn.beta_fast \(0.5\) must be at least yarn.beta_slow \(1.0\)"),
        (lambda: ModelConfig(num_dense_layers=62), r"between 0 and model.num_layers \(61\), not 62"),
        (lambda: ModelConfig(mtp_depth=-1), "model.mtp_depth cannot be negative: -1"),
    ],
)
def test_what_cannot_work_says_what_to_change(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
