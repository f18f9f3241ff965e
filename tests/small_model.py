"""A whole DeepSeek-V3 small enough for a unit test, its batches, and a trainer around it."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import AttentionConfig, ModelConfig, MoEConfig
from deepseek_jax.model.targets import Microbatch
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.mesh import ParallelConfig, make_mesh
from deepseek_jax.parallel.placement import ParameterLayout, place
from deepseek_jax.parallel.sharding import BATCH_SPEC
from deepseek_jax.training.step import Hyperparameters, Trainer, TrainState
from deepseek_jax.training.step_config import StepConfig

ATTENTION = AttentionConfig(
    num_heads=2, q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
)
MOE = MoEConfig(num_experts=8, experts_per_token=2, expert_ffn_size=16, num_groups=4, groups_per_token=2)


def small(*, moe: dict | None = None, attention: dict | None = None, **changes) -> ModelConfig:
    """One dense and two MoE layers and one MTP module; `init_std` is large enough for routing to differ by token."""
    return ModelConfig(
        **{"vocab_size": 64, "hidden_size": 24, "num_layers": 3, "num_dense_layers": 1, "dense_ffn_size": 40}
        | {"init_std": 0.1, "mtp_depth": 1}
        | changes,
        attention=dataclasses.replace(ATTENTION, **(attention or {})),
        moe=dataclasses.replace(MOE, **(moe or {})),
    )


def packed(config: ModelConfig, documents: list[list[int]], *, length: int, seed: int = 0) -> Microbatch:
    """Rows of `length` + 1 tokens; `documents[row]` lists the lengths of its documents, what is left is padding."""
    rng = np.random.default_rng(seed)
    shape = (len(documents), length + 1)
    tokens = rng.integers(0, config.vocab_size, shape).astype(np.int32)
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row, lengths in enumerate(documents):
        assert sum(lengths) <= length + 1
        segments[row, : sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        positions[row, : sum(lengths)] = np.concatenate([np.arange(n) for n in lengths]) if lengths else []
    return Microbatch(tokens * (segments > 0), segments, positions, (segments > 0).astype(np.int32))


def full(config: ModelConfig, rows: int, length: int, *, seed: int = 0) -> Microbatch:
    """Rows without padding, one document each."""
    return packed(config, [[length + 1]] * rows, length=length, seed=seed)


def hyperparameters(*, learning_rate=1e-2, mtp_weight=0.3, bias_rate=1e-3, dtype=jnp.float32) -> Hyperparameters:
    return Hyperparameters(*(jnp.asarray(x, dtype) for x in (learning_rate, mtp_weight, bias_rate)))


def gradient_descent(specs) -> optax.GradientTransformation:
    """The step then moves every parameter by -learning_rate * gradient, so parameters show the gradients."""
    del specs
    return optax.identity()


def trainer(
    config: ModelConfig, *, optimizer=gradient_descent, devices=None, parallel: ParallelConfig | None = None, **step
) -> Trainer:
    """A trainer on data-parallel `devices` (default: the first one), or laid out as `parallel` says."""
    if parallel is None:
        parallel = ParallelConfig(data=1 if devices is None else len(devices))
    mesh = make_mesh(parallel, jax.devices()[: math.prod(parallel.shape)] if devices is None else devices)
    return Trainer(Transformer(config), place(config), mesh, optimizer, StepConfig(**step))


def initial_state(trainer: Trainer, dtype=jnp.float32, seed: int = 0) -> TrainState:
    """A state as `trainer.initial_state` makes it, the same on every mesh, from NumPy: nothing is compiled."""

    def values(layout: ParameterLayout):
        rng = np.random.default_rng(seed)
        std = trainer.model.config.init_std

        def draw(path, like: jax.ShapeDtypeStruct) -> jax.Array:
            name = jax.tree_util.keystr(path)
            value = np.ones(like.shape) if "scale" in name else rng.normal(size=like.shape) * std
            value = np.zeros(like.shape) if "bias" in name else value
            return jax.device_put(value.astype(dtype), like.sharding)

        return jax.tree_util.tree_map_with_path(draw, layout.abstract(dtype))

    return trainer.fresh_state(values(trainer.params_layout), values(trainer.bias_layout))


def assert_same_metrics(seen, expected) -> None:
    """Steps' metrics in float64: loads exactly, losses and norms to 1e-9, and every row that was routed received."""
    for step, (metrics, wanted) in enumerate(zip(seen, expected, strict=True)):
        np.testing.assert_array_equal(metrics.load, wanted.load, err_msg=f"step {step}")
        np.testing.assert_array_equal(metrics.received.sum(axis=1), metrics.load.sum(axis=1), err_msg=f"step {step}")
        for name in ("loss", "loss_main", "loss_mtp", "loss_balance", "grad_norm"):
            pair = getattr(metrics, name), getattr(wanted, name)
            np.testing.assert_allclose(*pair, rtol=1e-9, err_msg=f"{name} of step {step}")


QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiler options that halve the time to compile, which for these sizes is nearly all the time."""


def abstract_state(trainer: Trainer, dtype=jnp.float32) -> TrainState:
    """Shapes, dtypes and shardings of a state, without any array."""
    params = trainer.params_layout.abstract(dtype)
    shapes = TrainState(
        params,
        trainer.bias_layout.abstract(dtype),
        jax.eval_shape(trainer.optimizer.init, params),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    placed = lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(placed, shapes, trainer.state_shardings())


@functools.cache
def _step(trainer: Trainer, shape, dtype):
    sharding = NamedSharding(trainer.mesh, BATCH_SPEC)
    batch = Microbatch(*(jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding) for _ in Microbatch._fields))
    lowered = trainer.lower(abstract_state(trainer, dtype), batch, hyperparameters(dtype=dtype))
    return lowered.compile(compiler_options=QUICK)


def quickly(trainer: Trainer) -> Trainer:
    """The same trainer, whose steps are compiled with the options above."""
    trainer._step = jax.jit(trainer._sharded_step, donate_argnums=0, static_argnums=3, compiler_options=QUICK)
    trainer._evaluate = jax.jit(trainer._sharded_evaluate, static_argnums=2, compiler_options=QUICK)
    return trainer


def run_step(trainer: Trainer, state, batch: Microbatch, hyper: Hyperparameters):
    """`trainer.step` of the first setting, compiled with the options above."""
    placed = jax.device_put(batch, NamedSharding(trainer.mesh, BATCH_SPEC))
    hyper = jax.device_put(hyper, NamedSharding(trainer.mesh, P()))
    return _step(trainer, batch.tokens.shape, hyper.learning_rate.dtype)(state, placed, hyper)
