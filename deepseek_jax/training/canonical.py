"""A train state as canonical checkpoint entries, and back: independent of mesh, stacking and schedule.

Weights and router biases stand under their canonical names, each part of the optimizer state that is shaped like the
parameters under `optimizer.<part>/<canonical name>`, its scalars under `optimizer.<path>`. The moving average of the
weights is no part of the state: `moving_average.py` saves it beside it.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.parallel.placement import KINDS
from deepseek_jax.training.optimizer import map_moments
from deepseek_jax.training.step import Trainer, TrainState
from deepseek_jax.tree import Tree, flatten

OPTIMIZER = "optimizer."
"""Prefix of every entry of the optimizer: what a run that starts from weights alone leaves on disk."""
MOVING_AVERAGE = "moving_average/"
"""Prefix of the entries of the weights' moving average, one for each weight and router bias."""


def to_canonical(trainer: Trainer, state: TrainState) -> dict[str, jax.Array]:
    """All arrays of a state but its step number, each staying on the devices that hold it."""
    entries = {**trainer.params_layout.unstack(state.params), **trainer.bias_layout.unstack(state.router_bias)}

    def add_part(path: str, part: Tree) -> None:
        unstacked = trainer.params_layout.unstack(part)
        entries.update({f"{OPTIMIZER}{path}/{name}": array for name, array in unstacked.items()})

    map_moments(add_part, state.opt_state, state.params, other=entries.setdefault)
    return entries


def templates(trainer: Trainer) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding of every entry that `to_canonical` makes for this trainer."""
    layout = trainer.params_layout
    entries = {**layout.canonical(), **trainer.bias_layout.canonical()}

    def add_part(path: str, part: Tree) -> None:
        dtype = jax.tree.leaves(part)[0].dtype
        entries.update({f"{OPTIMIZER}{path}/{name}": entry for name, entry in layout.canonical(dtype).items()})

    def add_other(path: str, leaf: Any) -> None:
        replicated = NamedSharding(trainer.mesh, P())
        entries[path] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)

    map_moments(add_part, *_abstract_optimizer(trainer), other=add_other)
    return entries


def from_canonical(trainer: Trainer, entries: dict[str, jax.Array], step: int) -> TrainState:
    """The state after `step` steps, from entries on the shardings that `templates` names."""

    def part(path: str, _: Tree) -> Tree:
        prefix = f"{OPTIMIZER}{path}/"
        found = {name.removeprefix(prefix): array for name, array in entries.items() if name.startswith(prefix)}
        return trainer.params_layout.stack(found)

    opt_state = map_moments(part, *_abstract_optimizer(trainer), other=lambda path, _: entries[path])
    number = jax.device_put(jax.numpy.asarray(step, jax.numpy.int32), NamedSharding(trainer.mesh, P()))
    return TrainState(trainer.params_layout.stack(entries), trainer.bias_layout.stack(entries), opt_state, number)


def whole_weights(trainer: Trainer, state: TrainState) -> dict[str, jax.Array]:
    """All weights and router biases under their canonical names, on a device of this process.

    All processes call this together, and each has them all: for models of which one device can hold that many.
    """
    everywhere = NamedSharding(trainer.mesh, P())
    copies = jax.jit(lambda trees: trees, out_shardings=everywhere)((state.params, state.router_bias))
    arrays: dict[str, jax.Array] = {}
    for layout, tree in zip((trainer.params_layout, trainer.bias_layout), copies, strict=True):
        for name, array in flatten(tree).items():
            here = array.addressable_data(0)
            kind, _, path = name.partition(".")
            if kind in KINDS:
                arrays |= {n: here[rank, slot] for rank, slot, _, n in layout.placement.arrays(kind, [path])}
            else:
                arrays[name] = here
    return arrays


def parameter_count(trainer: Trainer) -> int:
    """Trained numbers of the model; the slots of a stack that stay empty are none."""
    layout, count = trainer.params_layout, 0
    for name, spec in flatten(layout.specs).items():
        kind, _, path = name.partition(".")
        layers = len(list(layout.placement.arrays(kind, [path]))) if kind in KINDS else 1
        count += layers * math.prod(spec.shape)
    return count


def _abstract_optimizer(trainer: Trainer) -> tuple[Any, Tree]:
    """The shapes of the optimizer state and of the parameters."""
    params = trainer.params_layout.abstract()
    return jax.eval_shape(trainer.optimizer.init, params), params
