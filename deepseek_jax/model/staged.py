"""The model as the pure functions that a pipeline runs: embed, layers of each kind, finish.

`parallel.pipeline` knows no model; this is what it is given. Parameters and router biases are nested dicts, layers
of one kind stacked along the leading dimension.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.model.block import SAVED_ACTIVATIONS
from deepseek_jax.model.context import LayerContext
from deepseek_jax.model.mtp import shift_left
from deepseek_jax.model.targets import Microbatch, targets
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.dispatch import Dispatcher
from deepseek_jax.parallel.pipeline.protocol import Ahead, LossScales, StagedModel, Streams
from deepseek_jax.parallel.vocabulary import Vocabulary, WholeVocabulary
from deepseek_jax.tree import Tree


def staged_model(
    model: Transformer,
    *,
    compute_dtype=jnp.float32,
    mask_documents: bool = False,
    balance_from_routed: bool = False,
    force_balance: bool = False,
    dispatcher: Dispatcher | None = None,
    vocabulary: Vocabulary = WholeVocabulary(),  # noqa: B008 - frozen and empty
) -> StagedModel:
    """The model's functions for `pipeline()`.

    Args:
      model: abstract or bound; only its structure is used.
      compute_dtype: dtype of activations and of the weights that are not kept in full precision.
      mask_documents: attention and predictions stay within a packed document (SFT); pre-training crosses them.
      balance_from_routed: see `LayerContext`.
      force_balance: see `LayerContext`.
      dispatcher: how tokens reach experts; default: all experts are local.
      vocabulary: how embedding and head are held; default: whole. Tied, they are one shard's rows and columns.
    """

    def context(batch: Microbatch) -> LayerContext:
        length = batch.tokens.shape[1] - 1
        segments = batch.segment_ids[:, :length]
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), segments.shape)
        return model.context(
            batch.positions[:, :length] if mask_documents else positions,
            segment_ids=segments if mask_documents else None,
            valid=segments > 0,
            dispatcher=dispatcher,
            balance_from_routed=balance_from_routed,
            force_balance=force_balance,
            dtype=compute_dtype,
        )

    def narrow(ctx: LayerContext, real: Any, ahead: Any) -> LayerContext:
        valid = ctx.valid
        assert valid is not None
        if ahead is not None:
            depth, is_module = ahead
            shifted = shift_left(valid, depth, False)
            valid = shifted if is_module is True else jnp.where(is_module, shifted, valid)
        return dataclasses.replace(ctx, valid=valid if real is True else valid & real)

    def embed(params: Tree, batch: Microbatch) -> Streams:
        x = vocabulary.lookup(params["embedding"]["weight"], batch.tokens[:, :-1]).astype(compute_dtype)
        return Streams(x, x if model.config.mtp_depth else None)

    def layer_function(stack: nnx.Module):
        graphdef = nnx.graphdef(stack)

        def layer(params: Tree, x: jax.Array, ctx: LayerContext):
            return nnx.merge(graphdef, params)(x, ctx)

        return layer

    def loss_sum(hidden: jax.Array, head: jax.Array, batch: Microbatch, depth: int) -> jax.Array:
        """Sum of the cross entropies (nats) over the positions whose prediction counts."""
        labels, weights = targets(batch, depth, within_documents=mask_documents)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        weights = weights.astype(jnp.promote_types(weights.dtype, hidden.dtype))
        return vocabulary.cross_entropy_sum(hidden, head, labels.reshape(-1), weights.reshape(-1))

    def join(k: int, params: Tree, ends: Tree, hidden: jax.Array, embedding: jax.Array) -> jax.Array:
        if k == 0:
            hidden = _bind(model.final_norm, ends["final_norm"])(hidden)
        return _bind(model.mtp, params).join(hidden, shift_left(embedding, k + 1))

    def leave(params: Tree, x: jax.Array) -> jax.Array:
        return _bind(model.mtp, params).leave(x)

    def finish(params: Tree, hidden: tuple, batch: Microbatch, scales: LossScales):
        main, *ahead = hidden
        head = (params["embedding"]["weight"].T if model.head is None else params["head"]["weight"]).astype(main.dtype)
        main_sum = loss_sum(_bind(model.final_norm, params["final_norm"])(main), head, batch, 0)
        mtp_sum = jnp.zeros_like(main_sum)
        for depth, x in enumerate(ahead, 1):
            mtp_sum += loss_sum(x, head, batch, depth)
        loss = scales.main * main_sum + scales.mtp * mtp_sum
        return loss, {"loss_main": main_sum, "loss_mtp": mtp_sum}

    ahead = None
    if model.mtp is not None:
        module: Any = model.mtp
        ahead = Ahead(model.config.mtp_depth, join, layer_function(module.block), leave)
    layers = {kind: getattr(model, kind) for kind in ("dense", "moe")}
    return StagedModel(
        context=context,
        narrow=narrow,
        embed=embed,
        layers={kind: layer_function(stack) for kind, stack in layers.items() if stack is not None},
        finish=finish,
        ahead=ahead,
        shared_ends=("final_norm",),
        split_ends=("embedding", "head"),
        saved_activations=SAVED_ACTIVATIONS,
    )


def _bind(module: Any, params: Tree) -> Any:
    return nnx.merge(nnx.graphdef(module), params)
