"""What a block-scaled matmul means: products per 128 of the contraction, each scaled and added in float32."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.quantize import Quantized
from pallas_kernels.quantize.reference import spread

BLOCK = 128
"""How much of the contraction shares its scales."""


@functools.partial(jax.jit, static_argnames="out_dtype")
def block_scaled_matmul(a: Quantized, b: Quantized, out_dtype: jnp.dtype) -> Array:
    """a `[M, K]` times b `[K, N]`, both with scales that are constant along 128 of K: `[M, N]` of `out_dtype`.

    For each 128 of K: the float32 product of the codes (every one of them exact), times a's scales, times b's; the sum
    is float32. This is DeepSeek-V3's promotion to CUDA cores (section 3.3.2) with nothing lost inside a block.
    """

    def add_block(total, block):
        a_codes, a_scales, b_codes, b_scales = block
        product = jnp.matmul(a_codes.astype(jnp.float32), b_codes.astype(jnp.float32), precision=lax.Precision.HIGHEST)
        return total + product * a_scales * b_scales, None

    zeros = jnp.zeros_like(a.codes, jnp.float32, (a.shape[0], b.shape[1]))
    transposed, transposed_scales = _blocks(b.T)
    blocks = (*_blocks(a), transposed.mT, transposed_scales.mT)
    return lax.scan(add_block, zeros, blocks)[0].astype(out_dtype)


def _blocks(a):
    """Codes `[B, M, 128]` of a `[M, K]` in B blocks, the last filled up with zeros, and their scales `[B, M, 1]`."""
    rows, depth = a.shape
    count = -(-depth // BLOCK)
    codes = jnp.pad(a.codes, ((0, 0), (0, count * BLOCK - depth))).reshape(rows, count, BLOCK)
    scales = spread(a.scales, None if a.tile is None else (a.tile[0], 1), (rows, count))
    return codes.swapaxes(0, 1), jnp.broadcast_to(scales, (rows, count)).T[:, :, None]
