"""A model that is small, lively and irregular: big weights, biased routing, every mechanism at work."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.config import AttentionConfig, ModelConfig, MoEConfig, YarnConfig
from deepseek_jax.model.parameters import RouterBias, abstract_values, parameter_specs
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.tree import flatten, unflatten

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


def lively_model(config: ModelConfig, dtype, seed: int = 0) -> Transformer:
    """Random weights, norms and router biases; with these biases some scores go negative and many choices change."""
    model = Transformer(config)
    rng = np.random.default_rng(seed)

    around = {"normal": (0, config.init_std), "ones": (1, 0.2), "zeros": (0, 0.5)}
    flat = {}
    for kind in (nnx.Param, RouterBias):
        specs = flatten(parameter_specs(model, kind))
        for name, value in flatten(abstract_values(model, kind)).items():
            mean, std = around[specs[name].initializer]
            flat[name] = jnp.asarray(rng.normal(mean, std, value.shape), dtype)
    return nnx.merge(nnx.graphdef(model), unflatten(flat))


def layer_of(layers: nnx.Module, index: int):
    """One layer of a stack, as a module."""
    graphdef, state = nnx.split(layers)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[index], state))


@pytest.fixture(scope="session")
def model32() -> Transformer:
    return lively_model(CONFIG, jnp.float32)


@pytest.fixture(scope="session")
def model64() -> Transformer:
    with jax.enable_x64(True):
        return lively_model(CONFIG, jnp.float64)
