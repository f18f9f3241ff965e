"""A block-scaled matmul on any device: dequantise, then one float32 matmul."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.quantize import Quantized


@functools.partial(jax.jit, static_argnames="out_dtype")
def block_scaled_matmul(a: Quantized, b: Quantized, out_dtype: jnp.dtype) -> Array:
    """a `[M, K]` times b `[K, N]`: `[M, N]` of `out_dtype`.

    Differs from the reference by the order of sums, and by the rounding of code × scale, which a float32 holds exactly
    where the scale is a power of two. HIGHEST keeps a GPU from rounding the operands to TF32.
    """
    product = jnp.matmul(a.dequantize(), b.dequantize(), precision=lax.Precision.HIGHEST)
    return product.astype(out_dtype)
