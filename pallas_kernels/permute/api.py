"""Rows to experts and back: tokens gathered into rows that are sorted by expert, and each token's rows summed.

Shape letters: T tokens, D channels, R rows, K rows of a token at most. Two tables say where things are:

    index [R]      the token in each row        rows[r] = x[index[r]]
    slots [T, K]   the rows of each token       y[t]    = Σ_k weights[t, k] · rows[slots[t, k]]

An entry below zero or past the end names nothing: the row is zeros, or the term is missing. The gradient of either
function is the other with the other table, which is why both take it as `inverse`: that is exact if the tables belong
together, each row in one slot (`inverse_of_slots` makes an index that does), and taken on trust, since a compiled
program cannot refuse them (`check_inverse` does, on the host). Without it the gradient is a scatter-add of XLA's, right
for any table and slower.
"""

from __future__ import annotations

from typing import overload

import jax.numpy as jnp
from jax import Array

from pallas_kernels.implementation import choose
from pallas_kernels.permute import mosaic_gpu, reference, vjp
from pallas_kernels.quantize import Quantized


@overload
def gather_rows(
    x: Array, index: Array, *, inverse: Array | None = None, implementation: str | None = None
) -> Array: ...


@overload
def gather_rows(
    x: Quantized, index: Array, *, inverse: Array | None = None, implementation: str | None = None
) -> Quantized: ...


def gather_rows(
    x: Array | Quantized, index: Array, *, inverse: Array | None = None, implementation: str | None = None
) -> Array | Quantized:
    """Rows of x in the order of an index: `rows[r] = x[index[r]]`.

    Args:
      x: `[T, D]` of any float dtype; or Quantized in tiles of 1×128, of which codes and scales are gathered.
      index: `[R]` integers; a row whose index is below 0 or at least T is zeros (quantised: codes and scales).
      inverse: `[T, K]` integers, the rows of each token: with it the gradient is `combine_rows`, whose limits hold too.
      implementation: "reference", "portable", "mosaic_gpu" (the kernel for Hopper: bfloat16, float32 or quantised), or
        None for the best that is supported here, see `pallas_kernels.implementation`.

    Returns:
      `[R, D]` of x's dtype, or Quantized as x is. It can be differentiated for arrays; a Quantized has no gradient.

    Raises:
      ValueError: if shapes, dtypes or tiles make no sense, or the implementation is unknown or not supported here.
    """
    codes = x.codes if isinstance(x, Quantized) else x
    if codes.ndim != 2 or index.ndim != 1:
        raise ValueError(f"gather_rows needs x [T, D] and index [R], not {codes.shape} and {index.shape}")
    if isinstance(x, Quantized) and x.tile != (1, 128):
        raise ValueError(f"gather_rows: x must be in tiles of 1×128, which keep rows apart, not {x.tile}")
    _check_table("gather_rows", "index", index)
    if inverse is not None:
        _check_table("gather_rows", "inverse", inverse, 2, codes.shape[0])
    _check_float("gather_rows", "x", codes)
    choices = 0 if inverse is None else inverse.shape[1]
    obstacles = {"mosaic_gpu": mosaic_gpu.supported(codes, choices), "portable": None, "reference": None}
    name = choose("gather_rows", implementation, obstacles, rests_on=() if inverse is None else ("combine_rows",))
    if isinstance(x, Quantized):
        if inverse is not None:
            raise ValueError("gather_rows: a Quantized has no gradient, so `inverse` would not be used; leave it out")
        codes = vjp.gather_codes(x.codes, index, name)
        # They are a 32nd of the bytes of the codes.
        return Quantized(codes, vjp.gather_codes(x.scales, index, "portable"), x.tile)
    if name == "reference":
        return reference.gather_rows(x, index)
    return vjp.gather_rows(x, index, inverse, name)


def combine_rows(
    rows: Array,
    slots: Array,
    weights: Array | None = None,
    *,
    inverse: Array | None = None,
    implementation: str | None = None,
) -> Array:
    """The weighted sum of each token's rows: `y[t] = Σ_k weights[t, k] · rows[slots[t, k]]`.

    Args:
      rows: `[R, D]` of any float dtype.
      slots: `[T, K]` integers; a slot below 0 or at least R adds nothing, whatever its weight.
      weights: `[T, K]`, of a float dtype; None for a plain sum.
      inverse: `[R]` integers, the token of each row: with it the gradient of the rows is `gather_rows`.
      implementation: As for `gather_rows`; the kernel takes rows of bfloat16 or float32 and K of at most 16.

    Returns:
      `[T, D]` of the rows' dtype: summed in float32 or wider, and rounded once. It can be differentiated for rows and
      weights; with `inverse` the gradient of a weight is `Σ_d dy[t, d] · rows[slots[t, k], d]` in float32 all the same.

    Raises:
      ValueError: if shapes or dtypes make no sense, or the implementation is unknown or not supported here.
    """
    if rows.ndim != 2 or slots.ndim != 2:
        raise ValueError(f"combine_rows needs rows [R, D] and slots [T, K], not {rows.shape} and {slots.shape}")
    if weights is not None and weights.shape != slots.shape:
        raise ValueError(f"combine_rows needs a weight for every slot: {slots.shape}, not {weights.shape}")
    _check_table("combine_rows", "slots", slots)
    if inverse is not None:
        _check_table("combine_rows", "inverse", inverse, 1, rows.shape[0])
    _check_float("combine_rows", "rows", rows)
    if weights is not None:
        _check_float("combine_rows", "weights", weights)
    obstacles = {"mosaic_gpu": mosaic_gpu.supported(rows, slots.shape[1]), "portable": None, "reference": None}
    name = choose("combine_rows", implementation, obstacles, rests_on=() if inverse is None else ("gather_rows",))
    if name == "reference":
        return reference.combine_rows(rows, slots, weights)
    return vjp.combine_rows(rows, slots, weights, inverse, name)


def _check_table(op, name, table, ndim=None, length=None):
    if not jnp.issubdtype(table.dtype, jnp.integer):
        raise ValueError(f"{op}: {name} must be integers, not {table.dtype}")
    if ndim is not None and (table.ndim != ndim or table.shape[0] != length):
        wanted = f"[{length}]" if ndim == 1 else f"[{length}, K]"
        raise ValueError(f"{op}: {name} must be {wanted}, not {table.shape}")


def _check_float(op, name, x):
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{op}: {name} must be of a float dtype, not {x.dtype}")
