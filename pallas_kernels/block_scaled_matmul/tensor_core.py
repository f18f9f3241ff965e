"""How Hopper's tensor cores add up FP8 products, and what adding to float32 in between is good for: for study only.

DeepSeek-V3's report (section 3.3.2) found that they keep about 14 bits of a sum, and that a matmul of random matrices
over K = 4096 is wrong by nearly 2% at its worst element; so every 128 of K the partial sum is added to a float32 one.

Modelled: a wgmma of FP8 operands takes 32 of K. Its 32 products, which are exact, and the accumulator are aligned to
the largest exponent among them, and what lies more than 13 bits behind its leading bit is cut off, toward zero. The sum
of what remains is cut to 14 bits itself, and becomes the accumulator. Not modelled: any grouping or order inside the
32, guard bits beyond the 14, and the exponents' range.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.quantize import Quantized

STEP = 32
"""How much of K one wgmma of FP8 operands takes."""
FRACTION_BITS = 13
"""Bits kept behind the leading one: 14 in all."""


@functools.partial(jax.jit, static_argnames="promote_every")
def matmul_14_bits(a_codes: Array, b_codes: Array, *, promote_every: int | None = 128) -> Array:
    """`a_codes @ b_codes` as Hopper's FP8 tensor cores would, `[M, N]` float32; some forty times slower than a matmul.

    Args:
      a_codes: `[M, K]` FP8, without scales; or float32 that stands for such.
      b_codes: `[K, N]`, likewise.
      promote_every: After how much of K, a multiple of 32, the accumulator is added to a float32 sum and starts again
        at zero; None: never, the accumulator is the result.

    Raises:
      ValueError: if the shapes do not fit, or promote_every is no positive multiple of 32.
    """
    if a_codes.ndim != 2 or b_codes.ndim != 2 or a_codes.shape[1] != b_codes.shape[0]:
        raise ValueError(f"matmul_14_bits needs [M, K] and [K, N], not {a_codes.shape} and {b_codes.shape}")
    if promote_every is not None and (promote_every < STEP or promote_every % STEP):
        raise ValueError(f"matmul_14_bits: promote_every must be a positive multiple of {STEP}, not {promote_every}")
    (rows, depth), columns = a_codes.shape, b_codes.shape[1]
    steps = -(-max(depth, 1) // STEP) if promote_every is None else promote_every // STEP
    chunks = -(-depth // (steps * STEP))
    fill = chunks * steps * STEP - depth
    a = jnp.pad(a_codes.astype(jnp.float32), ((0, 0), (0, fill))).reshape(rows, chunks, steps, STEP)
    b = jnp.pad(b_codes.astype(jnp.float32), ((0, fill), (0, 0))).reshape(chunks, steps, STEP, columns)

    def wgmma(accumulator, operands):
        a, b = operands  # [32, M] and [32, N]
        # One array per product and no array of all, so that XLA's CPU backend goes through them with vectors along N.
        addends = [accumulator, *(a[k, :, None] * b[k] for k in range(STEP))]
        largest = functools.reduce(jnp.maximum, map(jnp.abs, addends))
        total = functools.reduce(jnp.add, (_cut(addend, largest) for addend in addends))  # exact: 20 bits at most
        return _cut(total, jnp.abs(total)), None

    zeros = jnp.zeros_like(a_codes, jnp.float32, (rows, columns))

    def promote(total, operands):
        return total + lax.scan(wgmma, zeros, operands)[0], None

    return lax.scan(promote, zeros, (a.transpose(1, 2, 3, 0), b))[0]


@functools.partial(jax.jit, static_argnames="out_dtype")
def block_scaled_matmul(a: Quantized, b: Quantized, out_dtype: jnp.dtype) -> Array:
    """a `[M, K]` times b `[K, N]` as if nothing were promoted: the scales go into the operands, `[M, N]`."""
    return matmul_14_bits(a.dequantize(), b.dequantize(), promote_every=None).astype(out_dtype)


def _cut(x, largest):
    """x without what lies 14 or more bits below the leading one of `largest`, cut off toward zero."""
    field = (lax.bitcast_convert_type(largest, jnp.uint32) >> 23) & 255  # largest >= 0
    field = jnp.maximum(field, FRACTION_BITS + 1)
    unit = lax.bitcast_convert_type((field - FRACTION_BITS) << 23, jnp.float32)
    reciprocal = lax.bitcast_convert_type((254 + FRACTION_BITS - field) << 23, jnp.float32)
    return jnp.trunc(x * reciprocal) * unit
