"""Expert dispatch: tokens to the experts they chose, and the experts' outputs back.

A dispatcher is an object with `dispatch(x, routing) -> (inputs, group_sizes, handle)` and
`combine(outputs, handle) -> y`. `inputs` holds one group of rows per expert, each group starting at a multiple of
`alignment`, padding rows zero: what `ops.grouped_matmul` wants. The backward pass of dispatch is a combine and that
of combine a dispatch, with the same indices, so nothing is ever scattered.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp


class Dispatcher(Protocol):
    """What the MoE layer needs: see `LocalDispatcher` for shapes."""

    alignment: int

    def dispatch(self, x: jax.Array, experts: jax.Array) -> tuple[jax.Array, jax.Array, Any]: ...

    def combine(self, outputs: jax.Array, weights: jax.Array, handle: Any) -> jax.Array: ...


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

    def dispatch(self, x: jax.Array, experts: jax.Array) -> tuple[jax.Array, jax.Array, LocalHandle]:
        """Gathers rows of x `[T, D]` by expert: returns inputs `[M, D]`, group sizes int32 `[E]` and the handle."""
        group_sizes, handle = self._plan(experts)
        return _gather_tokens(x, handle), group_sizes, handle

    def combine(self, outputs: jax.Array, weights: jax.Array, handle: LocalHandle) -> jax.Array:
        """Sums the experts' outputs `[M, D]` over each token's choices, times weights `[T, K]`: `[T, D]`."""
        return _combine_rows(outputs, weights, handle)

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
        return group_sizes, LocalHandle(rows.reshape(experts.shape), pair_of_row)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of x by index, zero where the index is past the end."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def _gather_tokens(x: jax.Array, handle: LocalHandle) -> jax.Array:
    return _take_rows(x, handle.pairs // handle.rows.shape[1])


def _gather_tokens_fwd(x, handle):
    return _gather_tokens(x, handle), handle


def _gather_tokens_bwd(handle, grad):
    return grad[handle.rows].sum(axis=1), None


_gather_tokens.defvjp(_gather_tokens_fwd, _gather_tokens_bwd)


@jax.custom_vjp
def _combine_rows(outputs: jax.Array, weights: jax.Array, handle: LocalHandle) -> jax.Array:
    return jnp.einsum("tkd,tk->td", outputs[handle.rows], weights.astype(outputs.dtype))


def _combine_rows_fwd(outputs, weights, handle):
    return _combine_rows(outputs, weights, handle), (outputs, weights, handle)


def _combine_rows_bwd(residuals, grad):
    outputs, weights, handle = residuals
    choices = handle.rows.shape[1]
    row_weights = _take_rows(weights.reshape(-1), handle.pairs).astype(grad.dtype)
    outputs_grad = _take_rows(grad, handle.pairs // choices) * row_weights[:, None]
    weights_grad = jnp.einsum("tkd,td->tk", outputs[handle.rows], grad).astype(weights.dtype)
    return outputs_grad, weights_grad, None


_combine_rows.defvjp(_combine_rows_fwd, _combine_rows_bwd)
