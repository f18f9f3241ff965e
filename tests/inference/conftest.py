"""A model that is small, lively and irregular: big weights, biased routing, every mechanism at work."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import AttentionConfig, ModelConfig, MoEConfig, YarnConfig
from deepseek_jax.inference.binding import bind, create
from deepseek_jax.model.parameters import RouterBias, values
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.tree import map_leaves

CONFIG = ModelConfig(
    vocab_size=53,
    hidden_size=24,
    num_layers=5,
    num_dense_layers=2,
    dense_ffn_size=40,
    attention=AttentionConfig(
        num_heads=3,
        q_lora_rank=12,
        kv_lora_rank=8,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=5,
        yarn=YarnConfig(factor=4.0, original_length=16, beta_fast=4.0, mscale=1.0, mscale_all_dim=0.8),
    ),
    moe=MoEConfig(num_experts=8, experts_per_token=3, expert_ffn_size=16, num_groups=4, groups_per_token=2),
    mtp_depth=1,
    init_std=0.3,
)


def without_query_compression(config: ModelConfig = CONFIG) -> ModelConfig:
    return dataclasses.replace(config, attention=dataclasses.replace(config.attention, q_lora_rank=None, yarn=None))


def lively_model(config: ModelConfig, dtype, seed: int = 0) -> Transformer:
    """Initial weights, and router biases that change which experts and groups are chosen; some scores go negative."""
    model = create(config, seed, dtype=dtype)
    rng = np.random.default_rng(seed)
    bias = map_leaves(lambda b: jnp.asarray(rng.normal(0, 0.5, b.shape), b.dtype), values(model, RouterBias))
    # Back in the run-time form, with the dimension of stages.
    params, bias = (
        {k: map_leaves(lambda x: x[None], v) if k in ("dense", "moe", "mtp") else v for k, v in tree.items()}
        for tree in (values(model), bias)
    )
    return bind(config, params, bias)


@pytest.fixture(scope="session")
def model32() -> Transformer:
    return lively_model(CONFIG, jnp.float32)


@pytest.fixture(scope="session")
def model64() -> Transformer:
    with jax.enable_x64(True):
        return lively_model(CONFIG, jnp.float64)
