"""What a model offers to be run by a pipeline: five pure functions, in one file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.parallel.dispatch import Traffic
from deepseek_jax.tree import Tree


class LossScales(NamedTuple):
    """What each sum is multiplied by in the loss, so that it is a mean over the whole global batch."""

    main: jax.Array
    """1 / number of labels in the global batch."""
    mtp: jax.Array
    """λ / depth / number of labels of the main model (equation 24 divides every depth by the same T)."""
    balance: jax.Array
    """alpha / number of sequences."""


Recompute = Literal["none", "selective", "full"]
"""What the backward pass computes again: nothing, what is cheap, or all but each layer's input."""


class LayerStats(NamedTuple):
    """What a layer counts, in integers that carry no gradient. Leaves may have leading dimensions, such as layers."""

    load: jax.Array
    """int32 `[E]`: pairs of token and choice per expert, of this device's tokens; `[0]` for a layer without experts."""
    traffic: Traffic
    """What its dispatch meant for this device."""

    @classmethod
    def none(cls) -> LayerStats:
        """Of a layer without experts."""
        zero, empty = jnp.zeros((), jnp.int32), jnp.zeros(0, jnp.int32)
        return cls(empty, Traffic(received=zero, crossed=empty, lost=zero, demand=empty))

    def total(self) -> LayerStats:
        """Over the microbatches of the leading dimension: sums, and of what is demanded at once the largest."""
        total = jax.tree.map(lambda leaf: leaf.sum(axis=0, dtype=leaf.dtype), self)
        return total._replace(traffic=total.traffic._replace(demand=self.traffic.demand.max(axis=0)))


LayerFunction = Callable[[Tree, Any, Any], tuple[Any, jax.Array, LayerStats]]
"""`layer(params, x, ctx) -> (x, aux, stats)`: aux is the unscaled balance loss."""


@dataclasses.dataclass(frozen=True)
class StagedModel:
    """A model cut where a pipeline may cut it. Parameters are one nested dict; `params[kind]` is a stack of layers."""

    context: Callable[[Any], Any]
    """`context(microbatch) -> ctx`, the same for every layer."""
    embed: Callable[[Tree, Any], Any]
    """`embed(params, microbatch) -> x`, what the first layer reads."""
    layers: Mapping[str, LayerFunction]
    """One function per kind of layer, in the order in which the kinds follow each other."""
    finish: Callable[[Tree, Any, Any, Any, LossScales], tuple[jax.Array, dict, jax.Array, dict[str, LayerStats]]]
    """`finish(params, x, microbatch, ctx, scales) -> (loss, sums, aux, stats)`: final norm, MTP, losses."""
    saved_activations: tuple[str, ...] = ()
    """Names (`checkpoint_name`) of what the backward pass keeps under selective recomputation."""
