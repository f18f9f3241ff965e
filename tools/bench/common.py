"""What the benchmarks of the train step share: the batch, the trainer, Hugging Face's config, the machine's name."""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path

from deepseek_jax.config import ModelConfig
from deepseek_jax.precision.policy import Fp8Config
from experiments.cores import usable_cores

ROWS, LENGTH = 8, 512
"""Sequences of a batch, and the tokens that each predicts."""


def make_trainer(
    config: ModelConfig, axes: dict[str, int] | None = None, *, fp8: Fp8Config | None = None, **step_options
):
    """A trainer on all devices, a batch of random tokens, and the scalars of a step; jax starts here.

    `axes` lays the devices out (`ParallelConfig`'s); by default they are data ranks. `fp8`: see `Transformer`.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from deepseek_jax.model.targets import Microbatch
    from deepseek_jax.model.transformer import Transformer
    from deepseek_jax.parallel.mesh import ParallelConfig, make_mesh
    from deepseek_jax.parallel.placement import place
    from deepseek_jax.training.optimizer import OptimizerConfig
    from deepseek_jax.training.step import Hyperparameters, Trainer
    from deepseek_jax.training.step_config import StepConfig

    mesh = make_mesh(ParallelConfig(**(axes or {"data": jax.device_count()})))
    optimizer = OptimizerConfig().make
    trainer = Trainer(Transformer(config, fp8), place(config), mesh, optimizer, StepConfig(**step_options))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    ones, positions = np.ones_like(tokens), np.broadcast_to(np.arange(LENGTH + 1, dtype=np.int32), tokens.shape)
    batch = jax.device_put(Microbatch(tokens, ones, positions, ones))
    return trainer, batch, Hyperparameters(*(jnp.float32(x) for x in (2.2e-4, 0.3, 0.001)))


def hugging_face_config(config: ModelConfig):
    """`transformers.DeepseekV3Config` of the same architecture, without MTP."""
    import transformers

    from deepseek_jax.interop.architecture import write_architecture

    described = write_architecture(dataclasses.replace(config, mtp_depth=0))
    return transformers.DeepseekV3Config.from_dict(described)


def machine() -> str:
    """The processor, how many of its cores there are for us, and how busy they are."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{name}, {usable_cores()} cores{load}"
