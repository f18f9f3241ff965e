"""The model that the pipeline's benchmarks run, and its trainer."""

from __future__ import annotations

from typing import Any

from deepseek_jax.config import AttentionConfig, ModelConfig, MoEConfig


def model_of(stages: int, *, hidden: int = 256) -> ModelConfig:
    """DeepSeek-V3's layers, one dense and 16 MoE slots, which 2, 4, 8 or 16 stages fill without padding.

    The MTP module takes the last slot; 16 stages have one slot each and no MTP, since every stage has a layer.
    """
    mtp = int(stages < 16)
    return ModelConfig(
        vocab_size=2048,
        hidden_size=hidden,
        num_layers=17 - mtp,
        num_dense_layers=1,
        dense_ffn_size=3 * hidden,
        mtp_depth=mtp,
        attention=AttentionConfig(
            **{"num_heads": 4, "q_lora_rank": 3 * hidden // 8, "kv_lora_rank": hidden // 4},
            **{"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32},
        ),
        moe=MoEConfig(
            num_experts=4, experts_per_token=2, expert_ffn_size=hidden // 2, num_groups=1, groups_per_token=1
        ),
    )


def make_trainer(
    config: ModelConfig, *, pipe: int = 1, data: int = 1, schedule: str = "dualpipe", devices=None, **options
):
    """A trainer of plain gradient descent on the first devices, so that a step is little but gradients."""
    import jax
    import optax

    from deepseek_jax.model.transformer import Transformer
    from deepseek_jax.parallel.mesh import ParallelConfig, make_mesh
    from deepseek_jax.parallel.placement import place
    from deepseek_jax.training.step import Trainer
    from deepseek_jax.training.step_config import StepConfig

    parallel = ParallelConfig(pipe=pipe, data=data, schedule=schedule)
    mesh = make_mesh(parallel, jax.devices()[: pipe * data] if devices is None else devices)
    placement = place(config, stage_map=parallel.schedule_choice.stage_map)
    options = StepConfig(schedule=schedule, microbatch_rows=1, force_balance=True, **options)
    return Trainer(Transformer(config), placement, mesh, lambda specs: optax.identity(), options)


def lowered(trainer, rows: int, length: int):
    """The step for so many rows, lowered from shapes."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from deepseek_jax.model.targets import Microbatch
    from deepseek_jax.parallel.sharding import BATCH_SPEC
    from deepseek_jax.training.sharding_table import abstract_state
    from deepseek_jax.training.step import Hyperparameters

    split, everywhere = (NamedSharding(trainer.mesh, spec) for spec in (BATCH_SPEC, jax.P()))
    tokens = jax.ShapeDtypeStruct((rows, length + 1), jnp.int32, sharding=split)
    scalar: Any = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
    hyper = Hyperparameters(scalar, scalar, scalar)
    return trainer.lower(abstract_state(trainer), Microbatch(*[tokens] * len(Microbatch._fields)), hyper)
