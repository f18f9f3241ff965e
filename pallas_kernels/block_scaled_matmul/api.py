"""FP8 matmuls whose operands carry their scales: the three products of a linear layer (section 3.3 of the report).

For a layer `y = x @ w` with x `[T, K]` and w `[K, N]`:

- Fprop, `y = block_scaled_matmul(x, w)`: x in 1×128 tiles, w in 128×128 blocks.
- Dgrad, `dx = block_scaled_matmul(dy, w.T)`: dy in 1×128 tiles, the same w.
- Wgrad, `dw = block_scaled_matmul(x.T, dy)`: x and dy in 128×1 tiles, so that tokens share a scale.

These are the gradients; none of the implementations promises a derivative of its own, and "mosaic_gpu" refuses one.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels.block_scaled_matmul import mosaic_gpu, portable, reference, tensor_core
from pallas_kernels.implementation import choose
from pallas_kernels.quantize import Quantized
from pallas_kernels.quantize.api import FORMATS


def block_scaled_matmul(
    a: Quantized, b: Quantized, *, out_dtype: DTypeLike = jnp.bfloat16, implementation: str | None = None
) -> Array:
    """`a @ b` of quantised matrices, accumulated in float32.

    Args:
      a: `[M, K]` in tiles of 1×128, or, for comparisons, 128×128 or one scale.
      b: `[K, N]` in tiles of 128×128 or 128×1, or one scale. Any of M, K and N may be ragged, or zero.
      out_dtype: bfloat16 or float32.
      implementation: "reference" (one product per 128 of K: the meaning), "dequantize" (portable: one float32 product
        of the dequantised matrices), "14_bits" (for study: what `matmul_14_bits` makes of them without promotion),
        "mosaic_gpu" (the kernel for Hopper, for all three products in E4M3), or None for the best that is supported
        here, see `pallas_kernels.implementation`.

    Returns:
      `[M, N]` of `out_dtype`.

    Raises:
      ValueError: if shapes, tiles or dtypes do not fit, or the implementation is unknown or not supported here.
    """
    check_operands("block_scaled_matmul", a, b)
    check_out_dtype("block_scaled_matmul", out_dtype)
    if a.codes.ndim != 2 or b.codes.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"block_scaled_matmul needs a [M, K] and b [K, N], not {a.shape} and {b.shape}")
    check_tile("block_scaled_matmul", "a", a, ((1, 128), (128, 128), None))
    check_tile("block_scaled_matmul", "b", b, ((128, 1), (128, 128), None))
    implementations = {"mosaic_gpu": mosaic_gpu, "dequantize": portable, "reference": reference, "14_bits": tensor_core}
    obstacles = dict.fromkeys(implementations) | {"mosaic_gpu": mosaic_gpu.supported(a, b)}
    name = choose("block_scaled_matmul", implementation, obstacles)
    return implementations[name].block_scaled_matmul(a, b, jnp.dtype(out_dtype))


def check_operands(op: str, *operands: Quantized) -> None:
    """Raises ValueError unless each is Quantized, with FP8 codes and float32 scales."""
    for operand in operands:
        if not isinstance(operand, Quantized):
            raise ValueError(f"{op} needs both operands Quantized, but one is an array: make it one with `quantize`")
        if operand.codes.dtype not in FORMATS or operand.scales.dtype != jnp.float32:
            raise ValueError(
                f"{op} needs codes of float8_e4m3fn or float8_e5m2 and scales of float32, "
                f"not {operand.codes.dtype} and {operand.scales.dtype}"
            )


def check_out_dtype(op: str, out_dtype: DTypeLike) -> None:
    """Raises ValueError unless it is bfloat16 or float32."""
    if jnp.dtype(out_dtype) not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"{op}: out_dtype must be bfloat16 or float32, not {jnp.dtype(out_dtype)}")


def check_tile(op: str, name: str, operand: Quantized, allowed: tuple) -> None:
    """Raises ValueError unless the operand's tile is one of `allowed`."""
    if operand.tile not in allowed:
        tiles = " or ".join("one scale" if tile is None else f"{tile[0]}×{tile[1]}" for tile in allowed)
        raise ValueError(
            f"{op} needs {name} in tiles of {tiles}, which share a scale along the contraction, not {operand.tile}"
        )
