"""What a step adds to `metrics.jsonl`: losses, loads, and what the dispatch of tokens cost."""

from __future__ import annotations

from typing import Any

import numpy as np

from deepseek_jax.parallel.dispatch import ExchangeDispatcher
from deepseek_jax.parallel.dispatch.travel import FP8, bytes_there
from deepseek_jax.training.load_metrics import load_metrics
from deepseek_jax.training.step import Hyperparameters, Trainer
from deepseek_jax.training.step_metrics import StepMetrics


def step_record(metrics: StepMetrics, hyper: Hyperparameters) -> dict[str, Any]:
    """Losses, the schedules' values, and how even the loads are; `metrics` are NumPy arrays."""
    share = metrics.load / np.maximum(metrics.load.sum(axis=1, keepdims=True), 1)
    return {
        "loss": metrics.loss,
        "loss_main": metrics.loss_main,
        "loss_mtp": metrics.loss_mtp,
        "loss_balance": metrics.loss_balance,
        "grad_norm": metrics.grad_norm,
        "learning_rate": hyper.learning_rate,
        "mtp_weight": hyper.mtp_weight,
        "bias_rate": hyper.bias_rate,
        "max_vio": metrics.max_vio,
        "load": np.round(share, 6),
        **load_metrics(np.asarray(metrics.load), np.asarray(metrics.received)),
    }


def dispatch_record(metrics: StepMetrics, trainer: Trainer, shape: tuple[int, ...]) -> dict[str, Any]:
    """Room and need of the dispatch, bytes that crossed between devices, and reruns; empty where experts are local.

    Args:
      metrics: of the step, as NumPy arrays.
      trainer: what ran it.
      shape: of its global batch, `[rows, S + 1]`.
    """
    dispatcher = trainer.dispatchers(shape)[trainer.room.used]
    if not isinstance(dispatcher, ExchangeDispatcher):
        return {}
    config = trainer.model.config
    per_row = bytes_per_row(
        config.hidden_size,
        config.moe.experts_per_token,
        wire=trainer.config.dispatch_dtype,
        compute=trainer.config.compute_dtype,
    )
    return {
        "dispatch_room": dispatcher.room,
        "dispatch_demand": metrics.demand,
        "dispatch_bytes": metrics.crossed.astype(np.int64).sum(axis=0) * per_row,
        "dispatch_reruns": trainer.room.reruns,
    }


def bytes_per_row(width: int, choices: int, *, wire: Any, compute: Any) -> int:
    """Bytes that must cross for one row from one device to another in a step: out and back, forward and backward.

    Static buffers send empty slots besides, full recomputation sends the forward pass twice, and a step that ran again
    counts once. A token with its weights and the numbers of its experts goes out, an output comes back; its gradient
    goes out, and that of the token and of the weights comes back. `width` numbers of dtype `wire`, which where it is
    None or FP8 means `compute` for what comes back; `choices` of four bytes.
    """
    back = compute if wire in (None, FP8) else wire
    return 2 * (bytes_there(width, wire or compute) + bytes_there(width, back)) + 3 * choices * 4
