"""E5M6: 12-bit numbers for activations that wait for the backward pass, two of them packed in three bytes.

DeepSeek-V3 keeps the input of the projection behind attention in it (section 3.3.3). The report gives neither bias nor
packing. Here E5M6 is IEEE float16 whose fraction is rounded to 6 bits: bias 15, subnormal numbers, largest finite
65024; the codes 0x7C0 and above, of either sign, are float16's infinities and NaN.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels.quantize.reference import clip, scales_of, spread

LARGEST = 65024.0
"""(2 - 2^-6) · 2^15."""
_TILE = (1, 128)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedE5M6:
    """E5M6 numbers with a power of two as the scale of each 1×128 tile: 1.53 bytes a value. A pytree of two leaves."""

    packed: Array
    """`[..., M, ⌈3N / 2⌉]` uint8."""
    scales: Array
    """`[..., M, ⌈N / 128⌉]` float32."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., M, N]`, that of the values."""
        return (*self.packed.shape[:-1], _values_in(self.packed.shape[-1]))

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> Array:
        """The values, `[..., M, N]`. Exact in float32, and in bfloat16 too, whose fraction is longer by a bit."""
        values = unpack_e5m6(self.packed, jnp.float32)
        return (values * spread(self.scales, _TILE, values.shape)).astype(dtype)


def quantize_e5m6(x: Array) -> PackedE5M6:
    """x `[..., M, N]` of any float dtype, in 1×128 tiles whose largest magnitude lies in (32512, 65024].

    The top of the range, because what a tile loses is at its bottom: there it has 29 powers of two down to the last
    normal number. A NaN or an infinity makes its whole tile NaN.

    Raises:
      ValueError: if x is no array of float matrices.
    """
    if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"quantize_e5m6 needs x [..., M, N] of a float dtype, not {x.shape} of {x.dtype}")
    scales = scales_of(x, _TILE, LARGEST, True, 1e-4)
    return PackedE5M6(pack_e5m6(x.astype(jnp.float32) / spread(scales, _TILE, x.shape)), scales)


@jax.jit
def pack_e5m6(x: Array) -> Array:
    """E5M6 codes of x `[..., N]`, packed: uint8 `[..., ⌈3N / 2⌉]`. Unscaled; what is beyond ±65024 becomes ±65024.

    Codes a and b take the bytes `a & 255`, `a >> 8 | (b & 15) << 4`, `b >> 4`; a last one without a partner takes two.
    """
    *leading, count = x.shape
    codes = jnp.pad(_encode(x.astype(jnp.float32)), [(0, 0)] * len(leading) + [(0, count % 2)])
    pairs = codes.shape[-1] // 2
    a, b = jnp.moveaxis(codes.reshape(*leading, pairs, 2), -1, 0)
    triples = jnp.stack([a & 255, (a >> 8) | ((b & 15) << 4), b >> 4], -1).astype(jnp.uint8)
    return triples.reshape(*leading, 3 * pairs)[..., : -(-3 * count // 2)]


@functools.partial(jax.jit, static_argnames="dtype")
def unpack_e5m6(packed: Array, dtype: DTypeLike) -> Array:
    """The values of `pack_e5m6`'s bytes `[..., ⌈3N / 2⌉]`, `[..., N]` of `dtype`."""
    *leading, size = packed.shape
    pairs = -(-size // 3)
    triples = jnp.pad(packed, [(0, 0)] * len(leading) + [(0, 3 * pairs - size)]).astype(jnp.uint16)
    low, middle, high = jnp.moveaxis(triples.reshape(*leading, pairs, 3), -1, 0)
    codes = jnp.stack([low | ((middle & 15) << 8), (middle >> 4) | (high << 4)], -1).reshape(*leading, 2 * pairs)
    return lax.bitcast_convert_type(codes[..., : _values_in(size)] << 4, jnp.float16).astype(dtype)


def _values_in(size):
    """How many values `size` bytes hold: an odd number where the last triple lacks a byte."""
    return size * 2 // 3


def _encode(x):
    """E5M6 codes of float32 x, uint16: rounded to nearest even in one step, by way of the spacing around each value."""
    exponent = (lax.bitcast_convert_type(x, jnp.uint32) >> 23) & 255
    # Below the smallest normal number, 2^-14, whose exponent field is 113, the spacing does not shrink any more.
    spacing = jnp.maximum(exponent, 113) - 6
    reciprocal = lax.bitcast_convert_type((254 - spacing) << 23, jnp.float32)
    rounded = lax.round(x * reciprocal, lax.RoundingMethod.TO_NEAREST_EVEN)
    rounded = rounded * lax.bitcast_convert_type(spacing << 23, jnp.float32)
    half = clip(rounded, LARGEST).astype(jnp.float16)  # exact: its last four bits are zero
    return lax.bitcast_convert_type(half, jnp.uint16) >> 4
