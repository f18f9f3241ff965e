"""Rows along hops to the devices of their experts, and back; each way is the backward pass of the other.

With an FP8 wire (section 3.3.3), a row sets out as E4M3 codes and a float32 scale for every 128 of them, and is
dequantised where it arrives. Scales are powers of two, so an expert that quantises what arrived finds the same values:
nothing is rounded twice, and one device, where nothing travels, computes the same. What is summed, on the way back,
travels in its own dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.ops.saved import named
from deepseek_jax.parallel.dispatch.hop import Hop, Leg
from pallas_kernels.quantize import GRADIENT_AMAX, Quantized, quantize

FP8 = jnp.dtype(jnp.float8_e4m3fn)
"""As a wire: codes with scales."""


def travel(x: jax.Array, legs: Sequence[Leg], hops: Sequence[Hop], wire: Any = None) -> jax.Array:
    """Rows `[T, ...]` to those that come to this device `[M, ...]` in the end, zero in empty slots.

    They travel as dtype `wire`, and so do the gradients of what is brought back; None: their own.
    """
    return _there(tuple(hops), wire, x, tuple(legs))


def travel_back(y: jax.Array, legs: Sequence[Leg], hops: Sequence[Hop], wire: Any = None) -> jax.Array:
    """Rows `[M, ...]` to the sums `[T, ...]` of what each row's destinations have; hops are those of the way there."""
    return _back(tuple(hops), wire, y, tuple(legs))


def bytes_there(width: int, wire: Any) -> int:
    """Of a row of `width` numbers on its way: 7392 for DeepSeek-V3's 7168 in FP8."""
    wire = jnp.dtype(wire)
    return width * wire.itemsize + (4 * -(-width // 128) if wire == FP8 else 0)


def _go(hops: tuple[Hop, ...], wire: Any, x: jax.Array, legs: tuple[Leg, ...], smallest: float) -> jax.Array:
    rows: Any = x
    if wire == FP8:
        rows = quantize(x, (1, 128), power_of_two=True, smallest_amax=smallest)
    elif wire is not None:
        rows = x.astype(wire)
    for hop, leg in zip(hops, legs, strict=True):
        rows = jax.tree.map(functools.partial(hop.send, leg=leg), rows)
    # Named, so that a layer that is computed again for its backward pass need not send its tokens again.
    rows = named(rows, "dispatched_rows")
    return rows.dequantize(x.dtype) if isinstance(rows, Quantized) else rows.astype(x.dtype)


def _return(hops: tuple[Hop, ...], wire: Any, y: jax.Array, legs: tuple[Leg, ...]) -> jax.Array:
    dtype = y.dtype
    for hop, leg in zip(reversed(hops), reversed(legs), strict=True):
        y = hop.bring_back(y if wire in (None, FP8) else y.astype(wire), leg, dtype)
    return y


def _tokens_go(hops: tuple[Hop, ...], wire: Any, x: jax.Array, legs: tuple[Leg, ...]) -> jax.Array:
    return _go(hops, wire, x, legs, 1e-4)


# Their forward passes call the plain functions: a name inside of a function with a derivative of its own is not seen.
_there = jax.custom_vjp(_tokens_go, nondiff_argnums=(0, 1))
_back = jax.custom_vjp(_return, nondiff_argnums=(0, 1))
_there.defvjp(
    lambda hops, wire, x, legs: (_tokens_go(hops, wire, x, legs), legs),
    lambda hops, wire, legs, g: (_return(hops, wire, g, legs), None),
)
_back.defvjp(
    lambda hops, wire, y, legs: (_return(hops, wire, y, legs), legs),
    lambda hops, wire, legs, g: (_go(hops, wire, g, legs, GRADIENT_AMAX), None),
)
