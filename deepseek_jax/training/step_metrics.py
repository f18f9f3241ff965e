"""What a step reports, and the loads of all layers in one order, wherever their stages are."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh

from deepseek_jax.parallel.mesh import BATCH_AXES
from deepseek_jax.parallel.pipeline.executor import Outputs
from deepseek_jax.parallel.pipeline.protocol import LayerStats
from deepseek_jax.parallel.placement import KINDS, Placement
from deepseek_jax.parallel.sharding import largest_over, sum_over
from deepseek_jax.training.balance import max_violation


class StepMetrics(NamedTuple):
    """What a step reports; losses are means over the global batch, in nats."""

    loss: jax.Array
    loss_main: jax.Array
    loss_mtp: jax.Array
    """Mean over depths, without λ."""
    loss_balance: jax.Array
    """Mean over sequences of Σ f_i P_i over layers, without α."""
    grad_norm: jax.Array
    load: jax.Array
    """int32 `[MoE layers and MTP modules, E]`."""
    max_vio: jax.Array
    """float32, one per row of `load`."""
    received: jax.Array
    """int32 `[MoE layers and MTP modules, devices that share a batch]`: rows that each device's experts computed."""
    crossed: jax.Array
    """int32 `[MoE layers and MTP modules, hops]`: rows that devices sent to others, all together."""
    demand: jax.Array
    """int32 `[hops + 1]`: the most that any layer needed room for anywhere; see `Traffic`."""
    lost: jax.Array
    """int32 scalar: the most rows of one layer on one device without room. Unless it is 0, the step changed nothing and
    is to be run again with more."""


class LayerRows:
    """The layers with experts of all stages in one order, the main model's first: a row each. Inside `shard_map`."""

    def __init__(self, placement: Placement, mesh: Mesh | AbstractMesh):
        self._placement, self._devices = placement, math.prod(mesh.shape[axis] for axis in BATCH_AXES)

    @jax.named_scope("sum_outputs")
    def of(self, stats: Mapping[str, LayerStats], leaf: Callable[[LayerStats], jax.Array]) -> jax.Array:
        """One leaf of all layers' stats `[layers, ...]`, from those of each rank's stacks."""
        kinds = tuple(kind for kind in KINDS if kind in stats)
        if not kinds:
            return jnp.zeros((0, 1), jnp.int32)
        mine = jnp.concatenate([leaf(stats[kind]) for kind in kinds])
        rows, count = self._rows(kinds)
        row = jnp.asarray(rows)[lax.axis_index("pipe")]
        # An empty slot has no row, and a row is one rank's.
        return sum_over(jnp.zeros((count, *mine.shape[1:]), mine.dtype).at[row].set(mine, mode="drop"), ("pipe",))

    def on_all_devices(self, stats: Mapping[str, LayerStats]) -> jax.Array:
        """The rows that each device's experts computed, int32 `[layers, devices that share a batch]`."""
        received = self.of(stats, lambda of_stack: of_stack.traffic.received)
        mine = jnp.arange(self._devices) == lax.axis_index(BATCH_AXES)
        return sum_over(jnp.where(mine, received.reshape(-1, 1), 0))

    def metrics(
        self, outputs: Outputs, counts: Mapping[str, jax.Array], grad_norm: jax.Array, received: jax.Array
    ) -> StepMetrics:
        """What a step reports, of sums over all devices."""
        of = functools.partial(self.of, outputs.stats)
        load = of(lambda stats: stats.load)
        depth = max(self._depth, 1)
        return StepMetrics(
            loss=outputs.loss,
            loss_main=outputs.sums["loss_main"] / counts["labels"],
            loss_mtp=outputs.sums["loss_mtp"] / depth / counts["labels"],
            loss_balance=outputs.sums["loss_balance"] / counts["sequences"],
            grad_norm=grad_norm,
            load=load,
            max_vio=max_violation(load),
            received=received,
            crossed=of(lambda stats: stats.traffic.crossed),
            demand=of(lambda stats: stats.traffic.demand).max(axis=0, initial=0),
            lost=of(lambda stats: stats.traffic.lost).max(initial=0),
        )

    @property
    def _depth(self) -> int:
        """MTP modules."""
        return sum(name.startswith("mtp.") for _, _, name in self._placement.layers("mtp"))

    def _rows(self, kinds: tuple[str, ...]) -> tuple[np.ndarray, int]:
        """For each slot of a rank's stacks its layer's row, int32 `[P, slots]`, the number of rows where it is empty;
        and that number."""
        by_rank = zip(*(self._placement.stacks(kind) for kind in kinds), strict=True)
        stacks = [list(itertools.chain(*of_kinds)) for of_kinds in by_rank]
        names = sorted(filter(None, itertools.chain(*stacks)), key=lambda name: (name[0], int(name.split(".")[1])))
        row = {name: place for place, name in enumerate(names)}
        return np.array([[row.get(name, len(names)) for name in stack] for stack in stacks], np.int32), len(names)


def over_ranks(stats: LayerStats) -> LayerStats:
    """Stats of all devices that share a batch: sums, and the largest of what any demands, and of what it loses.

    A sum of what all devices lose in a whole batch would overflow, and might come out as zero.
    """
    total = jax.tree.map(functools.partial(sum_over, axes=BATCH_AXES), stats)
    worst = {name: largest_over(getattr(stats.traffic, name), BATCH_AXES) for name in ("demand", "lost")}
    return total._replace(traffic=total.traffic._replace(**worst))
