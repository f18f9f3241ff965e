"""The choices that shape a compiled step, and where an experiment makes them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from deepseek_jax.parallel.dispatch import DispatcherName
from deepseek_jax.parallel.dispatch.travel import FP8
from deepseek_jax.parallel.pipeline.protocol import Recompute
from deepseek_jax.parallel.pipeline.ticks import Overlap
from deepseek_jax.precision.policy import DispatchDtype
from deepseek_jax.training.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """The choices that shape the compiled step."""

    microbatch_rows: int | None = None
    schedule: str = "dualpipe"
    chunks: int | None = None
    put_off: int | None = None
    overlap: Overlap | None = None
    recompute: Recompute = "selective"
    unroll_layers: int = 1
    compute_dtype: Any = jnp.float32
    mask_documents: bool = False
    balance_weight: float = 1e-4
    balance_from_routed: bool = False
    force_balance: bool = False
    clip_norm: float = 1.0
    zero: bool = True
    dispatcher: DispatcherName | None = None
    capacity: float = 1.5
    dispatch_dtype: Any = None
    """dtype in which tokens travel between devices, see `dispatch.travel`; None: the compute dtype."""


def step_config(experiment: Experiment) -> StepConfig:
    """What an experiment says of its step."""
    parallel, precision = experiment.parallel, experiment.precision
    return StepConfig(
        microbatch_rows=parallel.rows_at_once,
        schedule=parallel.schedule,
        chunks=parallel.chunks,
        put_off=parallel.put_off,
        overlap=parallel.overlap,
        recompute=parallel.recompute,
        unroll_layers=parallel.unroll_layers,
        compute_dtype=jnp.dtype(precision.compute),
        mask_documents=experiment.mask_documents,
        balance_weight=experiment.schedule.balance_weight,
        balance_from_routed=experiment.balance_from_routed,
        force_balance=experiment.force_balanced_routing,
        clip_norm=experiment.optimizer.clip_norm,
        zero=parallel.zero,
        dispatcher=parallel.dispatcher,
        capacity=parallel.capacity,
        dispatch_dtype=wire(precision.dispatch),
    )


def wire(dispatch: DispatchDtype | None) -> Any:
    """A policy's dispatch as `StepConfig.dispatch_dtype`."""
    return FP8 if dispatch == "float8" else dispatch and jnp.dtype(dispatch)
