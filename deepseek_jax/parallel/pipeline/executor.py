"""The pipeline transform: pure functions of a model in, loss and gradients of a whole batch out.

Per-device code, called inside the step's `shard_map`. Nothing here communicates over data or expert axes: losses,
gradients and loads are this device's sums, and the step reduces them. Over `pipe` too each rank has its part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.parallel.pipeline.arrays import filled, only_arrays
from deepseek_jax.parallel.pipeline.protocol import LayerStats, LossScales, Recompute, StagedModel
from deepseek_jax.parallel.pipeline.schedule import Schedule
from deepseek_jax.parallel.pipeline.stage import STACKS, Occupied, Stage
from deepseek_jax.parallel.pipeline.ticks import Machine, Overlap
from deepseek_jax.tree import Tree


class Outputs(NamedTuple):
    """Sums over this device's part of the batch."""

    loss: jax.Array
    """The objective's share of this device, already scaled: the global loss is the sum over devices."""
    sums: dict[str, jax.Array]
    """Unscaled sums: `loss_main`, `loss_mtp` (nats) and `loss_balance`."""
    stats: dict[str, LayerStats]
    """Per stack of layers with experts, leaves `[slots, ...]`: of the layers that this rank holds."""


class Pipeline(NamedTuple):
    """`value_and_grad(params, state, batch, scales) -> (Outputs, gradients)` and the forward-only `evaluate`.

    `batch` is a pytree of `[M, rows, ...]`: one leading index per microbatch. Gradients are float32 or wider.
    """

    value_and_grad: Callable[[Tree, Tree, object, LossScales], tuple[Outputs, Tree]]
    evaluate: Callable[[Tree, Tree, object, LossScales], Outputs]


def pipeline(
    model: StagedModel,
    schedule: Schedule,
    *,
    occupied: Mapping[str, np.ndarray] | None = None,
    recompute: Recompute = "none",
    unroll_layers: int = 1,
    overlap: Overlap = "off",
) -> Pipeline:
    """Runs `model` by `schedule`, over the ranks of the mesh axis `pipe`.

    Args:
      model: the functions to run.
      schedule: the order of work; with one rank, microbatches follow each other and gradients accumulate.
      occupied: bool `[stages, slots]` per stack of layers: which slots of each stage's stack hold a layer. Needed where
        there are several stages.
      recompute: what the backward pass computes again instead of keeping it.
      unroll_layers: layers of one kind that the program holds one after the other before it repeats.
      overlap: how steady ticks are run; see `ParallelConfig.overlap`.

    Parameters and gradients of several stages: a rank's stacks hold its stages' slots one stage after the other, in the
    order of the schedule's slots; where two directions share the model, those of the stage of its first slot alone.
    A weight whose values no function reads, because `state` has a copy for that, may be a `ShapeDtypeStruct`.
    """
    stage = Stage(model, recompute, unroll_layers)
    if schedule.ranks == 1 and schedule.stages.slots == 1:
        return _on_one_rank(stage, schedule)
    assert occupied is not None, "several stages need to know which of their slots hold a layer"
    machine = Machine(stage, schedule, occupied, overlap=overlap)

    def value_and_grad(params, state, batch, scales):
        _check_microbatches(batch, schedule)
        total, gradients = machine.value_and_grad(params, state, batch, scales)
        return Outputs(*total), gradients

    def evaluate(params, state, batch, scales):
        _check_microbatches(batch, schedule)
        return Outputs(*machine.evaluate(params, state, batch, scales))

    return Pipeline(value_and_grad, evaluate)


def _on_one_rank(stage: Stage, schedule: Schedule) -> Pipeline:
    """Gradient accumulation: one microbatch after the other, forward and backward."""
    model = stage.model

    def loss_of(params, state, batch, scales: LossScales):
        out, counted = stage(params, state, model.embed(params, batch), batch, Occupied())
        ends = {name: tree for name, tree in params.items() if name not in STACKS}
        loss, sums = stage.recomputing(model.finish)(ends, out.hidden, batch, scales)
        loss += scales.balance * out.aux
        return loss, Outputs(loss, {**sums, "loss_balance": out.aux}, counted)

    gradient_of = jax.value_and_grad(loss_of, has_aux=True)

    def value_and_grad(params, state, batch, scales):
        params = filled(only_arrays(params), params)

        def add_microbatch(gradients, microbatch):
            (_, outputs), step_gradients = gradient_of(params, state, microbatch, scales)
            return jax.tree.map(lambda total, g: total + g.astype(total.dtype), gradients, step_gradients), outputs

        _check_microbatches(batch, schedule)
        if schedule.microbatches == 1:
            (_, outputs), gradients = gradient_of(params, state, jax.tree.map(lambda leaf: leaf[0], batch), scales)
            return outputs, jax.tree.map(lambda g: g.astype(_accumulator(g)), gradients)
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=_accumulator(p)), params)
        gradients, outputs = lax.scan(add_microbatch, zeros, batch)
        return _total(outputs), gradients

    def evaluate(params, state, batch, scales):
        params = filled(only_arrays(params), params)
        return _total(lax.map(lambda microbatch: loss_of(params, state, microbatch, scales)[1], batch))

    return Pipeline(value_and_grad, evaluate)


def _total(outputs: Outputs) -> Outputs:
    loss, sums = jax.tree.map(lambda leaf: leaf.sum(axis=0, dtype=leaf.dtype), (outputs.loss, outputs.sums))
    return Outputs(loss, sums, {kind: stats.total() for kind, stats in outputs.stats.items()})


def _accumulator(leaf: jax.Array) -> jnp.dtype:
    return jnp.promote_types(leaf.dtype, jnp.float32)


def _check_microbatches(batch, schedule: Schedule) -> None:
    count = jax.tree.leaves(batch)[0].shape[0]
    if count != schedule.microbatches:
        raise ValueError(f"schedule {schedule.name!r} runs {schedule.microbatches} microbatches, the batch has {count}")
