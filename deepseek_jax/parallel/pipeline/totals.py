"""What a pipeline sums over its ticks."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.parallel.pipeline.arrays import add
from deepseek_jax.parallel.pipeline.protocol import LayerStats
from deepseek_jax.tree import Tree


class Totals(NamedTuple):
    """Sums over the ticks."""

    stacks: Tree
    """`[phases, slots, ...]`: the gradients of stacks of layers."""
    shared: Tree
    """Gradients that stages give of the ends that they read."""
    ends: Tree
    """Gradients that the model's ends give: equal on all ranks but for `split_ends`."""
    loss: jax.Array
    sums: dict[str, jax.Array]
    aux: jax.Array
    stats: tuple[dict[str, LayerStats], ...]
    """Per phase."""


def joined_stats(a: dict[str, LayerStats], b: dict[str, LayerStats]) -> dict[str, LayerStats]:
    """Of two microbatches, or two copies of a stage: sums, and of what is demanded at once the larger."""

    def join(a: LayerStats, b: LayerStats) -> LayerStats:
        total, demand = add(a, b), jnp.maximum(a.traffic.demand, b.traffic.demand)
        return total._replace(traffic=total.traffic._replace(demand=demand))

    return {kind: join(a[kind], b[kind]) for kind in a}
