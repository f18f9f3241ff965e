"""What quantising to FP8 means: one scale per tile, codes rounded to nearest even. Fast enough on a CPU to be used."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Tile = tuple[int, int] | None
"""Rows and columns that share a scale; None: one scale per matrix."""


def scale_shape(shape: tuple[int, ...], tile: Tile) -> tuple[int, ...]:
    """The shape of the scales of an array `[..., M, N]`: `[..., ⌈M / tile rows⌉, ⌈N / tile columns⌉]`."""
    *leading, rows, columns = shape
    if tile is None:
        return (*leading, 1, 1)
    return (*leading, -(-rows // tile[0]), -(-columns // tile[1]))


@functools.partial(jax.jit, static_argnames=("tile", "largest", "power_of_two", "smallest_amax"))
def scales_of(x: Array, tile: Tile, largest: float, power_of_two: bool, smallest_amax: float) -> Array:
    """float32 scales of x `[..., M, N]`, which bring the largest of each tile to `largest`, or just below it.

    The scale is the product of the tile's largest magnitude, at least `smallest_amax`, and the float32 next to
    1 / largest. With `power_of_two` it is rounded up to one. It is NaN where the tile holds a NaN or an infinity.
    """
    *leading, rows, columns = x.shape
    high, wide = (rows, columns) if tile is None else tile
    down, across = scale_shape(x.shape, tile)[-2:]
    # A maximum of bits: those of positive floats are ordered as they are, with infinity and NaN at the end. XLA's CPU
    # backend may lose a NaN from a maximum of floats.
    bits = lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)
    edges = [(0, 0)] * len(leading) + [(0, down * high - rows), (0, across * wide - columns)]
    tiles = jnp.pad(bits, edges).reshape(*leading, down, high, across, wide)
    amax = lax.bitcast_convert_type(tiles.max((-3, -1), initial=np.float32(smallest_amax).view(np.int32)), jnp.float32)
    # A product, since XLA makes one of a division by a constant; both are exact where amax is largest times 2^n.
    scales = amax * jnp.float32(1 / largest)
    if power_of_two:
        scales = _next_power_of_two(scales)
    return jnp.where(jnp.isfinite(amax), scales, jnp.nan)


def _next_power_of_two(x):
    """The least power of two that is at least x, a positive normal float32: a fraction carries into the exponent."""
    fraction = jnp.uint32(2**23 - 1)
    return lax.bitcast_convert_type((lax.bitcast_convert_type(x, jnp.uint32) + fraction) & ~fraction, jnp.float32)


def spread(scales: Array, tile: Tile, shape: tuple[int, ...]) -> Array:
    """The scales of tiles in an array of `shape` `[..., M, N]`, at every element: what broadcasts to that shape."""
    if tile is None:
        return scales
    for axis, length in enumerate(tile, -2):
        if length > 1:
            scales = lax.slice_in_dim(jnp.repeat(scales, length, axis), 0, shape[axis], axis=scales.ndim + axis)
    return scales


@functools.partial(jax.jit, static_argnames=("tile", "dtype", "power_of_two", "smallest_amax", "scale"))
def quantize(
    x: Array, tile: Tile, dtype: jnp.dtype, power_of_two: bool, smallest_amax: float, scale: float | None
) -> tuple[Array, Array]:
    """Codes `[..., M, N]` of `dtype` and their scales, or the given one: `code = round(clip(x * (1 / scale)))`."""
    largest = float(jnp.finfo(dtype).max)
    scales = scales_of(x, tile, largest, power_of_two, smallest_amax)
    if scale is not None:
        scales = jnp.where(jnp.isnan(scales), scales, jnp.float32(scale))
    # A product, since XLA makes one of a division by what is broadcast; both are exact where scales are powers of two.
    # Clipped, because a cast out of range is NaN, and the product may be rounded up beyond it.
    return clip(x.astype(jnp.float32) * spread(1 / scales, tile, x.shape), largest).astype(dtype), scales


def clip(x: Array, largest: float) -> Array:
    """x within ±largest, where NaN stays NaN: minimum and maximum of XLA's CPU backend do not promise that."""
    return jnp.where(x > largest, largest, jnp.where(x < -largest, -largest, x))


@functools.partial(jax.jit, static_argnames=("tile", "dtype"))
def dequantize(codes: Array, scales: Array, tile: Tile, dtype: jnp.dtype) -> Array:
    """`code * scale` in float32, or wider where `dtype` is, rounded to `dtype`: `[..., M, N]`."""
    exact = jnp.promote_types(dtype, jnp.float32)
    return (codes.astype(exact) * spread(scales.astype(exact), tile, codes.shape)).astype(dtype)
