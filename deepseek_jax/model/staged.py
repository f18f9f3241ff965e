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
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.model.block import SAVED_ACTIVATIONS
from deepseek_jax.model.context import LayerContext
from deepseek_jax.model.mtp import shift_left
from deepseek_jax.model.targets import Microbatch, targets
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.dispatch import Dispatcher
from deepseek_jax.parallel.pipeline.protocol import LossScales, StagedModel
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

    def embed(params: Tree, batch: Microbatch) -> jax.Array:
        return vocabulary.lookup(params["embedding"]["weight"], batch.tokens[:, :-1]).astype(compute_dtype)

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

    def finish(params: Tree, x: jax.Array, batch: Microbatch, ctx, scales: LossScales):
        hidden = _bind(model.final_norm, params["final_norm"])(x)
        head = (params["embedding"]["weight"].T if model.head is None else params["head"]["weight"]).astype(x.dtype)
        main_sum = loss_sum(hidden, head, batch, 0)
        mtp_sum, aux, counted = jnp.zeros_like(main_sum), jnp.zeros_like(main_sum), []
        for depth in range(1, model.config.mtp_depth + 1):
            module = _bind(model.mtp, jax.tree.map(lambda leaf, d=depth: leaf[d - 1], params["mtp"]))
            embedding = vocabulary.lookup(params["embedding"]["weight"], shift_left(batch.tokens[:, :-1], depth))
            embedding = checkpoint_name(embedding.astype(x.dtype), "mtp_embedding")  # not summed over pipe again
            depth_ctx = dataclasses.replace(ctx, valid=shift_left(ctx.valid, depth, False))
            hidden, balance_loss, stats = module(hidden, embedding, depth_ctx)
            mtp_sum += loss_sum(hidden, head, batch, depth)
            aux += balance_loss
            counted.append(stats)
        loss = scales.main * main_sum + scales.mtp * mtp_sum
        sums = {"loss_main": main_sum, "loss_mtp": mtp_sum}
        return loss, sums, aux, {"mtp": jax.tree.map(lambda *leaves: jnp.stack(leaves), *counted)} if counted else {}

    layers = {kind: getattr(model, kind) for kind in ("dense", "moe")}
    return StagedModel(
        context=context,
        embed=embed,
        layers={kind: layer_function(stack) for kind, stack in layers.items() if stack is not None},
        finish=finish,
        saved_activations=SAVED_ACTIVATIONS,
    )


def _bind(module: Any, params: Tree) -> Any:
    return nnx.merge(nnx.graphdef(module), params)
