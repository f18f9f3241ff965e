"""Expert dispatch: tokens to the experts they chose, and the experts' outputs back.

A dispatcher is an object with `dispatch(x, experts, weights) -> Dispatched` and `combine(outputs, handle) -> y`. The
rows it makes hold one group per expert, each group starting at a multiple of `alignment`, padding rows zero: what
`ops.grouped_matmul` wants. Combine weights travel with their rows and multiply an expert's hidden activations, so
combining is a plain sum and its backward pass needs no expert outputs. The backward pass of dispatch is a combine and
that of combine a dispatch, with the same indices, so nothing is ever scattered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


class Dispatcher(Protocol):
    """What the MoE layer needs: see `LocalDispatcher` for shapes."""

    @property
    def alignment(self) -> int: ...

    def dispatch(self, x: jax.Array, experts: jax.Array, weights: jax.Array) -> Dispatched: ...

    def combine(self, outputs: jax.Array, handle: Any) -> jax.Array: ...


class Dispatched(NamedTuple):
    """Tokens grouped by expert."""

    rows: jax.Array
    """`[M, D]`: one group per expert."""
    weights: jax.Array
    """`[M]`: the combine weight of each row, 0 for padding."""
    group_sizes: jax.Array
    """int32 `[E]`: rows of each group, padding not counted."""
    handle: Any
    """What `combine` needs to bring the rows back."""


class LocalHandle(NamedTuple):
    """The permutation between (token, choice) pairs and rows of the grouped buffer."""

    rows: jax.Array
    """int32 `[T, K]`: the buffer row of each pair."""
    pairs: jax.Array
    """int32 `[M]`: the pair t*K + k in each buffer row, or T*K for a padding row."""


@dataclasses.dataclass(frozen=True)
class LocalDispatcher:
    """All experts on this device: the oracle that every other dispatcher must equal."""

    num_experts: int
    alignment: int = 1

    def buffer_rows(self, pairs: int) -> int:
        """Rows that hold `pairs` under any routing, every group aligned."""
        return _round_up(pairs + self.num_experts * (self.alignment - 1), self.alignment)

    def dispatch(self, x: jax.Array, experts: jax.Array, weights: jax.Array) -> Dispatched:
        """Gathers rows of x `[T, D]` by expert; experts int32 and weights are `[T, K]`."""
        group_sizes, handle = self._plan(experts)
        return Dispatched(_gather_tokens(x, handle), _gather_pairs(weights, handle), group_sizes, handle)

    def combine(self, outputs: jax.Array, handle: LocalHandle) -> jax.Array:
        """Sums rows `[M, D]` over each token's choices: `[T, D]`."""
        return _sum_choices(outputs, handle)

    def _plan(self, experts: jax.Array) -> tuple[jax.Array, LocalHandle]:
        pairs = experts.size
        flat = experts.reshape(-1)
        order = jnp.argsort(flat, stable=True).astype(jnp.int32)
        group_sizes = (flat[:, None] == jnp.arange(self.num_experts)).sum(axis=0, dtype=jnp.int32)
        ends = jnp.cumsum(group_sizes)
        aligned = (group_sizes + self.alignment - 1) // self.alignment * self.alignment
        shift = (jnp.cumsum(aligned) - aligned) - (ends - group_sizes)
        # The i-th pair in expert order sits at row i plus the padding before its group.
        row_of_sorted = jnp.arange(pairs, dtype=jnp.int32) + shift[flat[order]]
        pair_of_row = (
            jnp.full(self.buffer_rows(pairs), pairs, jnp.int32).at[row_of_sorted].set(order, unique_indices=True)
        )
        rows = jnp.zeros(pairs, jnp.int32).at[order].set(row_of_sorted, unique_indices=True)
        plan = group_sizes, LocalHandle(rows.reshape(experts.shape), pair_of_row)
        return jax.tree.map(lambda leaf: checkpoint_name(leaf, "dispatch_plan"), plan)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of x by index, zero where the index is past the end."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def _gather_tokens(x: jax.Array, handle: LocalHandle) -> jax.Array:
    """`[T, D]` -> `[M, D]`: the token of each buffer row."""
    return _take_rows(x, handle.pairs // handle.rows.shape[1])


@jax.custom_vjp
def _gather_pairs(weights: jax.Array, handle: LocalHandle) -> jax.Array:
    """`[T, K]` -> `[M]`: the weight of each buffer row."""
    return _take_rows(weights.reshape(-1), handle.pairs)


@jax.custom_vjp
def _sum_choices(rows: jax.Array, handle: LocalHandle) -> jax.Array:
    """`[M, D]` -> `[T, D]`: the sum of each token's rows, made in float32 or wider and rounded once."""
    # One gather per choice and a running sum: a gather of [T, K, D] would be written out and read again.
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    total = sum(rows[handle.rows[:, choice]].astype(wide) for choice in range(handle.rows.shape[1]))
    return jnp.asarray(total, rows.dtype)


def _transposed_by(gather: jax.custom_vjp, transpose: Callable) -> None:
    """Makes `transpose(gradient, handle)` the backward pass of the linear map `gather(x, handle)`."""
    gather.defvjp(lambda x, handle: (gather(x, handle), handle), lambda handle, g: (transpose(g, handle), None))


_transposed_by(_gather_tokens, _sum_choices)
_transposed_by(_sum_choices, _gather_tokens)
_transposed_by(_gather_pairs, lambda g, handle: g[handle.rows])
