"""Grouping rows by expert on one device: the dispatcher of a run whose experts are all local, and the last leg of every
other.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.parallel.dispatch.interface import Dispatched, Traffic
from deepseek_jax.parallel.dispatch.rows import sum_rows, take_rows, transposed_by


class Grouping(NamedTuple):
    """The permutation between (token, choice) pairs and rows of a buffer that is grouped by expert."""

    rows: jax.Array
    """int32 `[T, K]`: the buffer row of each pair, or M for a pair that has none."""
    some: jax.Array
    """int32 `[T, L]`: the same without the columns that can hold none: a token has at most L experts here."""
    pairs: jax.Array
    """int32 `[M]`: the pair t*K + k in each buffer row, or T*K for a padding row."""


def group(
    experts: jax.Array, num_experts: int, *, capacity: int, alignment: int
) -> tuple[Grouping, jax.Array, jax.Array]:
    """Groups pairs by expert.

    Args:
      experts: int32 `[T, K]`: experts of this device, numbered from 0, or `NO_EXPERT`.
      num_experts: how many there are here.
      capacity: pairs that the buffer must hold; with alignment it has a few more rows.
      alignment: groups start at multiples of this.

    Returns:
      The grouping, int32 `[num_experts]` sizes of the groups, and how many pairs found no room.
    """
    tokens, choices = experts.shape
    buffer = round_up(capacity + num_experts * (alignment - 1), alignment)
    keys = jnp.where(experts < 0, num_experts, experts)
    columns = jnp.broadcast_to(jnp.arange(choices, dtype=jnp.int32), experts.shape)
    most = min(choices, num_experts)
    if most < choices:  # pairs without an expert here are most of them where experts are spread over many devices
        columns = jnp.argsort(keys, axis=1, stable=True)[:, :most].astype(jnp.int32)
        keys = jnp.take_along_axis(keys, columns, axis=1)
    pair = (jnp.arange(tokens, dtype=jnp.int32)[:, None] * choices + columns).reshape(-1)
    flat = keys.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    sizes = (flat[:, None] == jnp.arange(num_experts)).sum(axis=0, dtype=jnp.int32)
    ends = jnp.cumsum(sizes)
    aligned = (sizes + alignment - 1) // alignment * alignment
    starts = jnp.cumsum(aligned) - aligned
    # The i-th pair in expert order sits at row i plus the padding before its group; those of no expert come last.
    shift = jnp.append(starts - (ends - sizes), buffer)
    row_of_sorted = jnp.minimum(jnp.arange(flat.size, dtype=jnp.int32) + shift[flat[order]], buffer)
    pairs = jnp.full(buffer, tokens * choices, jnp.int32).at[row_of_sorted].set(pair[order], mode="drop")
    some = jnp.zeros(flat.size, jnp.int32).at[order].set(row_of_sorted, unique_indices=True).reshape(keys.shape)
    rows = some
    if most < choices:
        rows = jnp.full(tokens * choices, buffer, jnp.int32).at[pair].set(some.reshape(-1), unique_indices=True)
        rows = rows.reshape(experts.shape)
    fitting = jnp.clip(buffer - starts, 0, sizes)
    return Grouping(rows, some, pairs), fitting, (sizes - fitting).sum(dtype=jnp.int32)


@jax.custom_vjp
def gather_tokens(x: jax.Array, grouping: Grouping) -> jax.Array:
    """`[T, D]` -> `[M, D]`: the token of each buffer row."""
    return take_rows(x, grouping.pairs // grouping.rows.shape[1])


@jax.custom_vjp
def gather_weights(weights: jax.Array, grouping: Grouping) -> jax.Array:
    """`[T, K]` -> `[M]`: the weight of each buffer row."""
    return take_rows(weights.reshape(-1), grouping.pairs)


@jax.custom_vjp
def sum_choices(rows: jax.Array, grouping: Grouping) -> jax.Array:
    """`[M, D]` -> `[T, D]`: the sum of each token's rows."""
    return sum_rows(rows, grouping.some)


transposed_by(gather_tokens, sum_choices)
transposed_by(sum_choices, gather_tokens)
transposed_by(gather_weights, lambda g, grouping: take_rows(g, grouping.rows))


class LocalPlan(NamedTuple):
    """A grouping and the sizes of its groups, int32 `[E]`."""

    grouping: Grouping
    sizes: jax.Array


@dataclasses.dataclass(frozen=True)
class LocalDispatcher:
    """All experts on this device: the oracle that every other dispatcher must equal."""

    num_experts: int
    alignment: int = 1

    def plan(self, experts: jax.Array) -> tuple[tuple[LocalPlan], Traffic]:
        """See `Dispatcher`; one round has room for every pair."""
        grouping, sizes, lost = group(experts, self.num_experts, capacity=experts.size, alignment=self.alignment)
        received = sizes.sum(dtype=jnp.int32)
        plan = LocalPlan(grouping, sizes)
        plan = jax.tree.map(lambda leaf: checkpoint_name(leaf, "dispatch_plan"), plan)
        return (plan,), Traffic(received, jnp.zeros(0, jnp.int32), lost, received[None])

    def dispatch(self, x: jax.Array, weights: jax.Array, plan: LocalPlan) -> Dispatched:
        """See `Dispatcher`."""
        grouping = plan.grouping
        return Dispatched(gather_tokens(x, grouping), gather_weights(weights, grouping), plan.sizes, grouping)

    def combine(self, outputs: jax.Array, handle: Grouping) -> jax.Array:
        """See `Dispatcher`."""
        return sum_choices(outputs, handle)


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is not below `value`."""
    return -(-value // multiple) * multiple
