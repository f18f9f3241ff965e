"""What a model offers to be run by a pipeline: a few pure functions, in one file."""

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


class Streams(NamedTuple):
    """What goes from stage to stage."""

    hidden: jax.Array
    """`[B, S, D]`."""
    embedding: Any = None
    """`[B, S, D]`: the tokens' embeddings, which MTP modules read in the last stage; None where there is none."""


LayerFunction = Callable[[Tree, Any, Any], tuple[Any, jax.Array, LayerStats]]
"""`layer(params, x, ctx) -> (x, aux, stats)`: aux is the unscaled balance loss."""


@dataclasses.dataclass(frozen=True)
class Ahead:
    """Multi-token prediction: what turns a layer behind the last one into a module that predicts a token further."""

    depth: int
    """Modules, each after the other."""
    join: Callable[[int, Tree, Tree, Any, Any], Any]
    """`join(k, params, ends, hidden, embedding) -> x`: what the layer of module k (from 0) reads; hidden is the main
    model's for k = 0, else what module k - 1 left."""
    layer: LayerFunction
    """The layer of a module, an MoE layer."""
    leave: Callable[[Tree, Any], Any]
    """`leave(params, x) -> hidden`: what the module leaves, of what its layer made."""


@dataclasses.dataclass(frozen=True)
class StagedModel:
    """A model cut where a pipeline may cut it.

    Parameters are one nested dict: `params["dense"]` and `params["moe"]` are stacks of layers, `params["mtp"]` of MTP
    modules, whose layer is under `block`; the others are the *ends*.
    """

    context: Callable[[Any], Any]
    """`context(microbatch) -> ctx`, the same for every layer."""
    narrow: Callable[[Any, Any, Any], Any]
    """`narrow(ctx, real, ahead) -> ctx` for a layer that is there only if `real` (True, or a bool scalar); `ahead` is
    None, or (k, whether the layer is that of the MTP module of depth k)."""
    embed: Callable[[Tree, Any], Streams]
    """`embed(ends, microbatch) -> x`, what the first layer reads."""
    layers: Mapping[str, LayerFunction]
    """One function per kind of layer, in the order in which the kinds follow each other: dense, moe."""
    finish: Callable[[Tree, tuple, Any, LossScales], tuple[jax.Array, dict[str, jax.Array]]]
    """`finish(ends, hidden, microbatch, scales) -> (loss, sums)`: hidden states of the main model, before the final
    norm, and of each MTP module."""
    ahead: Ahead | None = None
    shared_ends: tuple[str, ...] = ()
    """Ends that `Ahead.join` reads besides."""
    split_ends: tuple[str, ...] = ()
    """Ends of which each rank of `pipe` has its own part; any other is whole and equal on all."""
    saved_activations: tuple[str, ...] = ()
    """Names (`checkpoint_name`) of what the backward pass keeps under selective recomputation."""
