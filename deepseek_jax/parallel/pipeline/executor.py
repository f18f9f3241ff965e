"""The pipeline transform: pure functions of a model in, loss and gradients of a whole batch out.

Per-device code, called inside the step's `shard_map`. Nothing here communicates over data or expert axes: losses,
gradients and loads are this device's sums, and the step reduces them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import require
from deepseek_jax.parallel.pipeline.protocol import LayerStats, LossScales, Recompute, StagedModel
from deepseek_jax.parallel.pipeline.schedule import Schedule
from deepseek_jax.tree import Tree


class Outputs(NamedTuple):
    """Sums over this device's part of the batch."""

    loss: jax.Array
    """The objective's share of this device, already scaled: the global loss is the sum over devices."""
    sums: dict[str, jax.Array]
    """Unscaled sums: `loss_main`, `loss_mtp` (nats) and `loss_balance`."""
    stats: dict[str, LayerStats]
    """Per kind of layer with experts, leaves `[layers, ...]`."""


class Pipeline(NamedTuple):
    """`value_and_grad(params, state, batch, scales) -> (Outputs, gradients)` and the forward-only `evaluate`.

    `batch` is a pytree of `[M, rows, ...]`: one leading index per microbatch. Gradients are float32 or wider.
    """

    value_and_grad: Callable[[Tree, Tree, Any, LossScales], tuple[Outputs, Tree]]
    evaluate: Callable[[Tree, Tree, Any, LossScales], Outputs]


def pipeline(
    model: StagedModel, schedule: Schedule, *, recompute: Recompute = "none", unroll_layers: int = 1
) -> Pipeline:
    """Runs `model` by `schedule`.

    Args:
      model: the functions to run.
      schedule: the order of work; with one rank, microbatches follow each other and gradients accumulate.
      recompute: what the backward pass computes again instead of keeping it.
      unroll_layers: layers of one kind that the program holds one after the other before it repeats.

    Raises:
      ConfigError: the schedule is over several ranks.
    """
    require(
        schedule.ranks == 1,
        f"schedule {schedule.name!r} over {schedule.ranks} pipeline ranks cannot be run yet: set parallel.pipe to 1",
    )
    recomputing = functools.partial(_recomputing, model, recompute)

    def loss_of(params, state, batch, scales):
        return _microbatch(model, params, state, batch, scales, recomputing, unroll_layers)

    gradient_of = jax.value_and_grad(loss_of, has_aux=True)

    def value_and_grad(params, state, batch, scales):
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
        return _total(lax.map(lambda microbatch: loss_of(params, state, microbatch, scales)[1], batch))

    return Pipeline(value_and_grad, evaluate)


def _microbatch(model: StagedModel, params, state, batch, scales: LossScales, recomputing: Callable, unroll: int):
    """The scaled loss of one microbatch and its `Outputs`."""
    ctx = model.context(batch)
    x = model.embed(params, batch)
    aux_total: Any = 0.0
    counted: dict[str, LayerStats] = {}
    for kind, layer in model.layers.items():
        stack = _merge(params[kind], state.get(kind))
        x, aux, stats = scan_layers(recomputing(layer), stack, x, ctx, unroll)
        aux_total += aux
        if stats.load.shape[-1]:
            counted[kind] = stats
    ends = {name: _merge(tree, state.get(name)) for name, tree in params.items() if name not in model.layers}
    loss, sums, aux, of_ends = recomputing(model.finish)(ends, x, batch, ctx, scales)
    aux_total += aux
    loss += scales.balance * aux_total
    return loss, Outputs(loss, {**sums, "loss_balance": aux_total}, {**counted, **of_ends})


def _recomputing(model: StagedModel, recompute: Recompute, function: Callable) -> Callable:
    """`function`, keeping for its backward pass what `recompute` says."""
    if recompute == "none":
        return function
    names = model.saved_activations if recompute == "selective" else ()
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    # Inside a scan nothing can be merged across the barrier that prevent_cse would put there, at some cost.
    return jax.checkpoint(function, policy=policy, prevent_cse=False)


def scan_layers(layer, stack: Tree, x, ctx, unroll: int = 1):
    """Applies `layer` with each entry of a stack of parameters in turn: (x, Σ aux, stats `[layers, ...]`)."""

    def step(x, params):
        x, aux, stats = layer(params, x, ctx)
        return x, (aux, stats)

    x, (aux, stats) = lax.scan(step, x, stack, unroll=unroll)
    return x, aux.sum(), stats


def _merge(params: Tree, state: Tree | None) -> Tree:
    """Parameters and router biases of the same modules as one nested dict."""
    if state is None:
        return params
    merged = dict(params)
    for name, value in state.items():
        merged[name] = _merge(params.get(name, {}), value) if isinstance(value, dict) else value
    return merged


def _total(outputs: Outputs) -> Outputs:
    loss, sums = jax.tree.map(lambda leaf: leaf.sum(axis=0, dtype=leaf.dtype), (outputs.loss, outputs.sums))
    return Outputs(loss, sums, {kind: stats.total() for kind, stats in outputs.stats.items()})


def _accumulator(leaf: jax.Array) -> jnp.dtype:
    return jnp.promote_types(leaf.dtype, jnp.float32)


def _check_microbatches(batch, schedule: Schedule) -> None:
    count = jax.tree.leaves(batch)[0].shape[0]
    if count != schedule.microbatches:
        raise ValueError(f"schedule {schedule.name!r} runs {schedule.microbatches} microbatches, the batch has {count}")
