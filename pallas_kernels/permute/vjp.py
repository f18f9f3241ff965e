"""The derivatives of gathering and combining rows: of each, the other, where the other's table is known."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.implementation import accumulator
from pallas_kernels.permute import mosaic_gpu, portable, reference
from pallas_kernels.permute.tables import past_the_end, weights_of_rows

_IMPLEMENTATIONS: dict[str, Any] = {"portable": portable, "reference": reference, "mosaic_gpu": mosaic_gpu}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def gather_codes(x: Array, index: Array, name: str) -> Array:
    """Rows of x `[T, D]` by index `[R]` in the implementation `name`, without a derivative."""
    return _IMPLEMENTATIONS[name].gather_rows(x, index)


def _no_gradient(name, residuals, dy):
    raise ValueError("gather_rows: a Quantized has no gradient; gather the array, or its lax.stop_gradient")


gather_codes.defvjp(lambda x, index, name: (gather_codes(x, index, name), None), _no_gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def gather_rows(x: Array, index: Array, slots: Array | None, name: str) -> Array:
    """x `[T, D]`, index `[R]`, and for the backward pass slots `[T, K]` or None: `[R, D]`."""
    return _IMPLEMENTATIONS[name].gather_rows(x, index)


def _gather_forward(x, index, slots, name):
    return gather_rows(x, index, slots, name), (index, slots, x.shape[0])


def _gather_backward(name, residuals, dy):
    index, slots, tokens = residuals
    if slots is not None:
        return _IMPLEMENTATIONS[name].combine_rows(dy, slots, None), None, None
    total = jnp.zeros((tokens, dy.shape[1]), accumulator(dy))
    dx = total.at[past_the_end(index, tokens)].add(dy.astype(total.dtype), mode="drop")
    return dx.astype(dy.dtype), None, None


gather_rows.defvjp(_gather_forward, _gather_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def combine_rows(rows: Array, slots: Array, weights: Array | None, index: Array | None, name: str) -> Array:
    """rows `[R, D]`, slots and weights `[T, K]`, and for the backward pass index `[R]` or None: `[T, D]`."""
    return _IMPLEMENTATIONS[name].combine_rows(rows, slots, weights)


def _combine_forward(rows, slots, weights, index, name):
    # A plain sum is linear: of its rows the backward pass needs to know how many there are.
    kept = rows.shape[0] if weights is None else rows
    return combine_rows(rows, slots, weights, index, name), (kept, slots, weights, index)


def _combine_backward(name, residuals, dy):
    kept, slots, weights, index = residuals
    if weights is None:
        return _rows_gradient(name, dy, slots, None, index, kept), None, None, None
    rows = kept.shape[0]
    if index is not None:
        of_rows = weights_of_rows(weights, slots, rows)
        drows, dots = _IMPLEMENTATIONS[name].gather_rows_and_dots(dy, index, of_rows, kept)
        dweights = jnp.take(dots, past_the_end(slots, rows), mode="fill", fill_value=0)
    else:
        drows = _rows_gradient(name, dy, slots, weights, None, rows)
        wide = dy.astype(accumulator(dy))
        chosen = (portable.gather_rows(kept, slots[:, k]) for k in range(slots.shape[1]))
        dweights = jnp.stack([(wide * row).sum(1) for row in chosen], 1)
    return drows, None, dweights.astype(weights.dtype), None


def _rows_gradient(name, dy, slots, weights, index, rows):
    """Of `Σ_k weights · rows[slots]` for the rows, by gathering if the index is known, else by scattering."""
    if index is not None:
        return _IMPLEMENTATIONS[name].gather_rows(dy, index)
    total = jnp.zeros((rows, dy.shape[1]), accumulator(dy))
    for k in range(slots.shape[1]):
        term = dy.astype(total.dtype)
        if weights is not None:
            term = term * weights[:, k, None]
        total = total.at[past_the_end(slots[:, k], rows)].add(term, mode="drop")
    return total.astype(dy.dtype)


combine_rows.defvjp(_combine_forward, _combine_backward)
