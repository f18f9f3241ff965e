"""What the benchmarks of the train step share: the batch, the trainer, Hugging Face's config, the machine's name."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from deepseek_jax.config import ModelConfig
from experiments.cores import usable_cores

ROWS, LENGTH = 8, 512
"""Sequences of a batch, and the tokens that each predicts."""


def make_trainer(config: ModelConfig, **step_options):
    """A trainer on all devices, a batch of random tokens, and the scalars of a step; jax starts here."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from deepseek_jax.model.targets import Microbatch
    from deepseek_jax.model.transformer import Transformer
    from deepseek_jax.parallel.mesh import ParallelConfig, make_mesh
    from deepseek_jax.parallel.placement import place
    from deepseek_jax.training.optimizer import OptimizerConfig
    from deepseek_jax.training.step import Hyperparameters, StepConfig, Trainer

    mesh = make_mesh(ParallelConfig(data=jax.device_count()))
    optimizer = OptimizerConfig().make
    trainer = Trainer(Transformer(config), place(config), mesh, optimizer, StepConfig(**step_options))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    ones, positions = np.ones_like(tokens), np.broadcast_to(np.arange(LENGTH + 1, dtype=np.int32), tokens.shape)
    batch = jax.device_put(Microbatch(tokens, ones, positions, ones))
    return trainer, batch, Hyperparameters(*(jnp.float32(x) for x in (2.2e-4, 0.3, 0.001)))


def hugging_face_config(config: ModelConfig):
    """`transformers.DeepseekV3Config` of the same architecture, without MTP."""
    import transformers

    attention, moe = config.attention, config.moe
    rope = {"rope_type": "default", "rope_theta": attention.rope_theta}
    if attention.yarn is not None:
        yarn = attention.yarn
        rope |= {
            "rope_type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_length,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale_all_dim,
        }
    return transformers.DeepseekV3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.dense_ffn_size,
        moe_intermediate_size=moe.expert_ffn_size,
        num_hidden_layers=config.num_layers,
        first_k_dense_replace=config.num_dense_layers,
        num_attention_heads=attention.num_heads,
        num_key_value_heads=attention.num_heads,
        q_lora_rank=attention.q_lora_rank,
        kv_lora_rank=attention.kv_lora_rank,
        qk_nope_head_dim=attention.qk_nope_head_dim,
        qk_rope_head_dim=attention.qk_rope_head_dim,
        v_head_dim=attention.v_head_dim,
        rope_parameters=rope,
        n_routed_experts=moe.num_experts,
        n_shared_experts=moe.num_shared_experts,
        num_experts_per_tok=moe.experts_per_token,
        n_group=moe.num_groups,
        topk_group=moe.groups_per_token,
        norm_topk_prob=moe.normalize_weights,
        routed_scaling_factor=moe.routed_scale,
        rms_norm_eps=config.rms_norm_eps,
        initializer_range=config.init_std,
        tie_word_embeddings=config.tie_embeddings,
        num_mtp_layers=0,
    )


def machine() -> str:
    """The processor, how many of its cores there are for us, and how busy they are."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{name}, {usable_cores()} cores{load}"
