"""FP8 weights as the released folders hold them: E4M3 codes with one scale per block of 128×128.

A value is its code times the scale of its block (the files call it `weight_scale_inv`, for it is the inverse of what
the quantiser multiplied by). Edge blocks are smaller: 576 rows are five blocks. Runs on the host's CPU.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from deepseek_jax.interop.host import on_host

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E4M3_MAX = 448.0
BLOCK = (128, 128)


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = BLOCK) -> tuple[int, int]:
    """How many blocks a matrix of `shape` has, rows and columns."""
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def dequantise(codes: np.ndarray, scales: np.ndarray, dtype, block: tuple[int, int] = BLOCK) -> np.ndarray:
    """Codes `[M, N]` times the scales of their blocks `[⌈M/128⌉, ⌈N/128⌉]`: a float32 product, rounded to `dtype`."""
    return on_host(_dequantise, codes, scales, dtype=jnp.dtype(dtype), block=block)


def quantise(
    weights: np.ndarray, *, powers_of_two: bool = False, block: tuple[int, int] = BLOCK
) -> tuple[np.ndarray, np.ndarray]:
    """Codes E4M3 `[M, N]` and float32 scales by block: the largest of a block becomes 448, or less where the scale is
    rounded up to a power of two. A block of zeros has scale 1; all scales are NaN where a weight is not finite.
    """
    return on_host(_quantise, weights, powers_of_two=powers_of_two, block=block)


@functools.partial(jax.jit, static_argnames=("dtype", "block"))
def _dequantise(codes: jax.Array, scales: jax.Array, *, dtype, block) -> jax.Array:
    return (codes.astype(jnp.float32) * _spread(scales.astype(jnp.float32), codes.shape, block)).astype(dtype)


@functools.partial(jax.jit, static_argnames=("powers_of_two", "block"))
def _quantise(weights: jax.Array, *, powers_of_two: bool, block) -> tuple[jax.Array, jax.Array]:
    (rows, columns), (high, wide) = weights.shape, block
    weights = weights.astype(jnp.float32)
    padded = jnp.pad(jnp.abs(weights), ((0, -rows % high), (0, -columns % wide)))
    largest = padded.reshape(-1, high, padded.shape[1] // wide, wide).max(axis=(1, 3))
    scales = jnp.where(largest > 0, largest / E4M3_MAX, 1.0)
    if powers_of_two:
        mantissa, exponent = jnp.frexp(scales)  # mantissa in [0.5, 1)
        scales = jnp.ldexp(jnp.float32(1), jnp.where(mantissa == 0.5, exponent - 1, exponent))
    scales = jnp.where(jnp.isfinite(weights).all(), scales, jnp.nan)
    # Clipped, because a cast out of range is NaN, and the division may round up beyond the range.
    scaled = jnp.clip(weights / _spread(scales, weights.shape, block), -E4M3_MAX, E4M3_MAX)
    return scaled.astype(jnp.float8_e4m3fn), scales


def _spread(scales: jax.Array, shape: tuple[int, ...], block: tuple[int, int]) -> jax.Array:
    """Each block's scale at each of its elements."""
    by_column = jnp.repeat(scales, block[1], axis=1)[:, : shape[1]]
    return jnp.repeat(by_column, block[0], axis=0)[: shape[0]]
