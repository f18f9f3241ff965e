"""FP8 weights as the released folders hold them: E4M3 codes with one scale per block of 128×128.

A value is its code times the scale of its block (the files call it `weight_scale_inv`, for it is the inverse of what
the quantiser multiplied by). Edge blocks are smaller: 576 rows are five blocks. Both ways are those of
`pallas_kernels.quantize`, which training quantises its weights with, here on the host's CPU.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from deepseek_jax.interop.host import on_host
from pallas_kernels.quantize import Quantized, quantize

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
BLOCK = (128, 128)


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = BLOCK) -> tuple[int, int]:
    """How many blocks a matrix of `shape` has, rows and columns."""
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def dequantise(codes: np.ndarray, scales: np.ndarray, dtype, block: tuple[int, int] = BLOCK) -> np.ndarray:
    """Codes `[M, N]` times the scales of their blocks `[⌈M/128⌉, ⌈N/128⌉]`: a product in float32, or wider where
    `dtype` is, rounded to `dtype`."""
    return on_host(_dequantise, codes, scales, dtype=dtype, block=block)


def quantise(weights: np.ndarray, *, powers_of_two: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Codes E4M3 `[M, N]` and float32 scales by block: the largest of a block becomes 448, or less where the scale is
    rounded up to a power of two, or where it is smaller than 1e-4: no scale is less than 1e-4 / 448, and a block of
    zeros has that one. Scale and codes of a block are NaN where one of its weights is not finite.
    """
    quantised = on_host(_quantise, weights, powers_of_two=powers_of_two)
    return quantised.codes, quantised.scales


def _dequantise(codes: np.ndarray, scales: np.ndarray, *, dtype, block: tuple[int, int]) -> jax.Array:
    return Quantized(jnp.asarray(codes), jnp.asarray(scales), block).dequantize(dtype)


def _quantise(weights: np.ndarray, *, powers_of_two: bool) -> Quantized:
    return quantize(jnp.asarray(weights), BLOCK, power_of_two=powers_of_two)
