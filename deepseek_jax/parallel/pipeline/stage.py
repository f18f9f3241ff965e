"""One stage of a model: its dense layers, its MoE layers, and its tail, which in the last stage predicts further ahead.

Stages hold stacks of equal size, because one program runs them all: where a stage has fewer layers, slots are empty,
and a mask says which. An empty slot passes its input on; its layer runs all the same, without a valid token, since
other devices wait for its exchange. Only what no device waits for is left out: dense layers where a stage has none, and
the join of an MTP module where a stage is not the last.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.compat import to_varying, varying_axes
from deepseek_jax.parallel.pipeline.protocol import LayerStats, Recompute, StagedModel, Streams
from deepseek_jax.tree import Tree

STACKS = ("dense", "moe", "mtp")
"""Parameters that are stacks of layers; the stack of MTP modules is every stage's tail."""


class Occupied(NamedTuple):
    """Which slots of a stage hold a layer: bool `[slots]` per stack, or None where all do."""

    dense: Any = None
    moe: Any = None
    mtp: Any = None
    last: Any = True
    """Whether this is the last stage, whose tail is MTP modules; bool scalar. In any other the tail is MoE layers."""


class StageOutputs(NamedTuple):
    """What a stage gives."""

    x: Streams
    """For the next stage."""
    hidden: tuple
    """`[B, S, D]` before the tail and after each slot of it: in the last stage, what the loss is made of."""
    aux: jax.Array
    """Σ of the unscaled balance losses."""


class Stage(NamedTuple):
    """How a model's stages are run."""

    model: StagedModel
    recompute: Recompute = "none"
    unroll: int = 1

    def __call__(
        self, params: Tree, state: Tree, x: Streams, batch: Any, occupied: Occupied
    ) -> tuple[StageOutputs, dict[str, LayerStats]]:
        """Runs a stage.

        Args:
          params: its stacks `[slots, ...]`, and the ends that the model shares with stages.
          state: router biases, under the same names.
          x: what it reads.
          batch: the microbatch.
          occupied: which of its slots hold layers.

        Returns its outputs, and per stack with experts the stats of its slots `[slots, ...]`.
        """
        ctx = self.model.context(batch)
        stacks = {kind: merge(params[kind], state.get(kind)) for kind in STACKS if kind in params}
        hidden, counted = x.hidden, {}
        aux = jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))
        if "dense" in stacks:
            run = functools.partial(self._layers, "dense", stacks["dense"], occupied.dense)
            hidden = _unless_empty(occupied.dense, lambda h: run(h, ctx)[0], hidden)
        if "moe" in stacks:
            hidden, aux, counted["moe"] = self._layers("moe", stacks["moe"], occupied.moe, hidden, ctx)
        outputs = [hidden]
        if "mtp" in stacks:
            ends = {name: params[name] for name in self.model.shared_ends}
            found = []
            for k in range(jax.tree.leaves(stacks["mtp"])[0].shape[0]):
                slot = jax.tree.map(lambda leaf, k=k: leaf[k], stacks["mtp"])
                real = True if occupied.mtp is None else occupied.mtp[k]
                tail = self.recomputing(functools.partial(self._tail, k, real, occupied.last))
                hidden, of_slot, stats = tail(slot, ends, hidden, x.embedding, ctx)
                outputs.append(hidden)
                aux += of_slot
                found.append(stats)
            counted["mtp"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
        return StageOutputs(Streams(hidden, x.embedding), tuple(outputs), aux), counted

    def recomputing(self, function: Callable) -> Callable:
        """`function`, keeping for its backward pass what `recompute` says."""
        if self.recompute == "none":
            return function
        names = self.model.saved_activations if self.recompute == "selective" else ()
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        # Inside a scan nothing can be merged across the barrier that prevent_cse would put there, at some cost.
        return jax.checkpoint(function, policy=policy, prevent_cse=False)

    def _layers(self, kind: str, stack: Tree, occupied: Any, hidden, ctx):
        """A stack of layers one after the other: (hidden, Σ aux, stats `[slots, ...]`)."""

        def layer(params, x, ctx, real):
            y, aux, stats = self.model.layers[kind](params, x, self.model.narrow(ctx, real, None))
            return _if_real(real, y, x), _if_real(real, aux, jnp.zeros_like(aux)), stats

        run = self.recomputing(layer if occupied is not None else functools.partial(layer, real=True))

        def step(x, of_slot):
            params, real = of_slot
            x, aux, stats = run(params, x, ctx) if real is None else run(params, x, ctx, real)
            return x, (aux, stats)

        hidden, (aux, stats) = lax.scan(step, hidden, (stack, occupied), unroll=self.unroll)
        return hidden, aux.sum(), stats

    def _tail(self, k: int, real, last, params: Tree, ends: Tree, hidden, embedding, ctx):
        """Slot k of the tail: module k where the stage is the last, else one more MoE layer."""
        ahead = self.model.ahead
        assert ahead is not None
        join = functools.partial(ahead.join, k, params, ends)
        x = join(hidden, embedding) if last is True else _cond(last, join, lambda h, _: h, hidden, embedding)
        ctx = self.model.narrow(ctx, real, (k + 1, last))
        y, aux, stats = ahead.layer(params["block"], x, ctx)
        y, aux = _if_real(real, y, x), _if_real(real, aux, jnp.zeros_like(aux))
        return (ahead.leave(params, y) if last is True else jnp.where(last, ahead.leave(params, y), y)), aux, stats


def _if_real(real: Any, value: jax.Array, otherwise: jax.Array) -> jax.Array:
    return value if real is True else jnp.where(real, value, otherwise)


def _unless_empty(occupied: Any, function: Callable, x: jax.Array) -> jax.Array:
    """`function(x)`, or x itself where no slot holds a layer."""
    return function(x) if occupied is None else _cond(occupied.any(), function, lambda x: x, x)


def _cond(predicate: jax.Array, then: Callable, otherwise: Callable, *operands: jax.Array) -> jax.Array:
    """`lax.cond`, whose branches may differ in the mesh axes that their results vary over."""

    def alike(function: Callable) -> Callable:
        return lambda *xs: to_varying(function(*xs), tuple(varying_axes(operands[0])))

    return lax.cond(predicate, alike(then), alike(otherwise), *operands)


def merge(params: Tree, state: Tree | None) -> Tree:
    """Parameters and router biases of the same modules as one nested dict."""
    if state is None:
        return params
    merged = dict(params)
    for name, value in state.items():
        merged[name] = merge(params.get(name, {}), value) if isinstance(value, dict) else value
    return merged
