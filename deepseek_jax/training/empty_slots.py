"""What the slots cost that stay empty: a stack of layers has as many for every stage, and stages are uneven."""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.parallel.placement import KINDS, ParameterLayout
from deepseek_jax.training.optimizer import map_moments
from deepseek_jax.training.step import Trainer
from deepseek_jax.tree import Tree, flatten


class EmptySlots(NamedTuple):
    """Bytes of empty slots on a device of the pipeline rank that has most of them."""

    state: int
    """Of master weights, moments and router biases, as a device keeps them between steps."""
    working: int
    """Of the weights that a step works with and of their gradients, float32; twice where a rank runs two directions."""

    @property
    def total(self) -> int:
        """Both."""
        return self.state + self.working


def empty_slots(trainer: Trainer) -> EmptySlots:
    """The bytes, from shapes alone."""
    ranks = range(trainer.placement.ranks)
    state, working = [0 for _ in ranks], [0 for _ in ranks]
    params = trainer.params_layout.abstract()
    kept: list[Tree] = [params]
    opt_state = jax.eval_shape(trainer.optimizer.init, params)
    map_moments(lambda _, part: kept.append(part), opt_state, params, other=lambda *_: None)
    per_element = sum(jax.tree.leaves(tree)[0].dtype.itemsize for tree in kept)
    for layout, itemsize, gradient in ((trainer.params_layout, per_element, 4), (trainer.bias_layout, 4, 0)):
        share, whole = _slot_elements(layout), _slot_elements(dataclasses.replace(layout, zero=False))
        for name, spec in flatten(layout.specs).items():
            kind, _, path = name.partition(".")
            if kind not in KINDS:
                continue
            dtype = jnp.dtype(jnp.float32 if spec.full_precision else trainer.config.compute_dtype)
            for rank, (kept_slots, worked_slots) in zip(ranks, _missing(layout, kind, path), strict=True):
                state[rank] += kept_slots * share[name] * itemsize
                working[rank] += worked_slots * whole[name] * (dtype.itemsize + gradient)
    return max((EmptySlots(*both) for both in zip(state, working, strict=True)), key=lambda slots: slots.total)


def _missing(layout: ParameterLayout, kind: str, path: str) -> list[tuple[int, int]]:
    """Per rank how many slots of the stacks that it keeps, and of those that it works with, have no such parameter."""
    placement = layout.placement
    stages, size = placement.stage_map, placement.size(kind)
    held = collections.Counter(stages.stage(rank, slot // size) for rank, slot, _, _ in placement.arrays(kind, [path]))
    empty = lambda rank, slots: sum(size - held[stages.stage(rank, slot)] for slot in slots)  # noqa: E731
    kept = range(placement.num_stages // placement.ranks)
    return [(empty(rank, kept), empty(rank, range(stages.slots))) for rank in range(placement.ranks)]


def _slot_elements(layout: ParameterLayout) -> dict[str, int]:
    """Elements of one slot of every stack on one device."""
    arrays = flatten(layout.abstract())
    return {name: math.prod(array.sharding.shard_shape(array.shape)[2:]) for name, array in arrays.items()}
