"""The model over a latent cache: prefill in expanded form, further tokens in absorbed form.

Both run the same blocks as training, scanned over the stacked layers, so compile time does not grow with depth.
B rows, S tokens of a prompt, N further tokens, T capacity of the cache, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from deepseek_jax.inference.cache import LatentCache
from deepseek_jax.model.block import Block
from deepseek_jax.model.context import LayerContext
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.dispatch import LocalDispatcher
from deepseek_jax.tree import Tree


def prefill(
    model: Transformer, tokens: jax.Array, lengths: jax.Array, cache: LatentCache
) -> tuple[jax.Array, LatentCache]:
    """Reads whole prompts into an empty cache.

    Padding stands on the right: attention is causal, so no token of a prompt sees it, and positions are those of
    training whatever the row's batch mates are.

    Args:
      model: bound to arrays.
      tokens: int32 `[B, S]`, S at most the cache's capacity; what follows a row's length is ignored.
      lengths: int32 `[B]`, at least 1.
      cache: its old contents are overwritten.

    Returns:
      Logits after each row's last token, `[B, V]` float32 or wider, and the cache with `lengths` tokens.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    x = model.embedding(tokens)
    ctx = model.context(positions, valid=positions < lengths[:, None], dtype=x.dtype)
    entries = dict(cache.entries)
    for kind, graphdef, params in _stacks(model):

        def layer(x, params, graphdef=graphdef):
            block = nnx.merge(graphdef, params)
            y, new = block.attention.expanded(block.attention_norm(x), ctx)
            return block.feed_forward(x + y, ctx)[0], new

        x, new = lax.scan(layer, x, params)
        entries[kind] = lax.dynamic_update_slice(entries[kind], new.astype(entries[kind].dtype), (0, 0, 0, 0))
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return model.logits(model.final_norm(last)), LatentCache(entries, lengths)


def decode_step(model: Transformer, cache: LatentCache, tokens: jax.Array) -> tuple[jax.Array, LatentCache]:
    """Appends one token int32 `[B]` to every row: the logits that follow it, `[B, V]`, and the grown cache."""
    logits, cache = extend(model, cache, tokens[:, None])
    return logits[:, 0], cache


def extend(model: Transformer, cache: LatentCache, tokens: jax.Array) -> tuple[jax.Array, LatentCache]:
    """Appends N tokens int32 `[B, N]` to every row, in absorbed form.

    Returns:
      Logits after each of them, `[B, N, V]`, and the cache with N tokens more. Tokens past the capacity are not
      kept, so leave room for them.
    """
    positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    visible = jnp.arange(cache.capacity) <= positions[..., None]
    x = model.embedding(tokens)
    # Groups of few rows stand side by side: aligned ones would be a buffer of mostly padding.
    dispatcher = LocalDispatcher(model.config.moe.num_experts, alignment=1)
    ctx = model.context(positions, dispatcher=dispatcher, dtype=x.dtype)
    entries = dict(cache.entries)
    for kind, graphdef, params in _stacks(model):
        # The cache is carried, not mapped over: each layer writes its few entries in place.
        def layer(carry, inputs, graphdef=graphdef):
            x, entries = carry
            index, params = inputs
            return _absorbed_layer(nnx.merge(graphdef, params), x, entries, index, positions, visible, ctx), None

        indices = jnp.arange(entries[kind].shape[0])
        (x, entries[kind]), _ = lax.scan(layer, (x, entries[kind]), (indices, params))
    logits = model.logits(model.final_norm(x))
    return logits, LatentCache(entries, cache.lengths + tokens.shape[1])


def _absorbed_layer(
    block: Block,
    x: jax.Array,
    entries: jax.Array,
    index: jax.Array,
    positions: jax.Array,
    visible: jax.Array,
    ctx: LayerContext,
) -> tuple[jax.Array, jax.Array]:
    """Layer `index`: x `[B, N, D]` and the stack's entries `[L, B, T, C + R]` -> the next x and the new entries."""
    normed = block.attention_norm(x)
    new = block.attention.cache_entries(normed, ctx).astype(entries.dtype)
    rows = jnp.arange(x.shape[0])[:, None]
    entries = entries.at[index, rows, positions].set(new, mode="drop")
    held = lax.dynamic_index_in_dim(entries, index, keepdims=False)
    with jax.named_scope("attention"):
        x = x + block.attention.absorbed(normed, held, visible, ctx)
    with jax.named_scope("ffn"):
        return block.feed_forward(x, ctx)[0], entries


def _stacks(model: Transformer) -> Iterator[tuple[str, nnx.GraphDef, Tree]]:
    """(kind, structure of one layer, parameters `[L, ...]`) of each stack of main-model layers, in order."""
    for kind in ("dense", "moe"):
        if (layers := getattr(model, kind)) is not None:
            graphdef, state = nnx.split(layers)
            yield kind, graphdef, nnx.to_pure_dict(state)
