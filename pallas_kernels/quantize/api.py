"""FP8 arrays with a scale per tile, as DeepSeek-V3 trains with them (tech report, section 3.3.2).

An activation has a scale per token and 128 channels, tiles of 1×128; where the contraction runs over tokens, as in a
weight's gradient, 128×1. A weight has one per block of 128×128. Tiles at the edge of a ragged matrix are smaller.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels.implementation import choose
from pallas_kernels.quantize import mosaic_gpu, mosaic_gpu_requantize, reference
from pallas_kernels.quantize.reference import Tile, scale_shape

TILES: tuple[Tile, ...] = ((1, 128), (128, 1), (128, 128), None)
GRADIENT_AMAX = 2.0**-100
"""`smallest_amax` for gradients. A loss that is a mean over 63 million tokens has gradients far below 1e-4 everywhere:
with that floor, most would be zero. Scales are still normal float32 numbers."""
FORMATS = (jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """An FP8 array with its scales: a value is its code times the scale of its tile. A pytree of two leaves.

    A transformation of the leaves that keeps matrices whole (indexing or stacking leading dimensions, vmap, scan, a
    transfer) gives another one.

    Raises:
      ValueError: if the scales are not one per tile. Leaves that are no arrays are not looked at.
    """

    codes: Array
    """`[..., M, N]`, float8_e4m3fn, or float8_e5m2 for a comparison."""
    scales: Array
    """`[..., ⌈M / tile[0]⌉, ⌈N / tile[1]⌉]` float32; `[..., 1, 1]` where tile is None."""
    tile: Tile = dataclasses.field(metadata={"static": True})
    """(1, 128), (128, 1) or (128, 128): rows and columns that share a scale; None: one scale for each matrix."""

    def __post_init__(self):
        if not all(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in (self.codes, self.scales)):
            return
        if self.codes.ndim < 2 or self.scales.shape != scale_shape(self.codes.shape, self.tile):
            wanted = scale_shape(self.codes.shape, self.tile) if self.codes.ndim >= 2 else "codes [..., M, N]"
            raise ValueError(
                f"Quantized: codes {self.codes.shape} in tiles {self.tile} need scales {wanted}, "
                f"not {self.scales.shape}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., M, N]`, that of the codes."""
        return self.codes.shape

    @property
    def T(self) -> Quantized:
        """Each matrix transposed, and its tiles with it: the same values, nothing is quantised again."""
        tile = None if self.tile is None else (self.tile[1], self.tile[0])
        return Quantized(self.codes.mT, self.scales.mT, tile)

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> Array:
        """The values, `[..., M, N]`: code × scale in float32 or wider, rounded to `dtype`."""
        return reference.dequantize(self.codes, self.scales, self.tile, jnp.dtype(dtype))


def quantize(
    x: Array,
    tile: Tile,
    *,
    dtype: DTypeLike = jnp.float8_e4m3fn,
    power_of_two: bool = False,
    smallest_amax: float = 1e-4,
    scale: float | None = None,
    implementation: str | None = None,
) -> Quantized:
    """Rounds x to FP8 with a scale per tile, which brings the tile's largest magnitude to the format's largest number.

    `scale = max(amax, smallest_amax) / largest`, where largest is 448 for E4M3 and 57344 for E5M2, and
    `code = cast(clip(x / scale, ±largest))`, to nearest even; all in float32, and both quotients as products with
    reciprocals, 1 / largest and 1 / scale. A NaN or an infinity makes its whole tile NaN, codes and scale.

    Args:
      x: `[..., M, N]` of any float dtype; no dimension need be a multiple of 128, and any may be zero.
      tile: (1, 128), (128, 1), (128, 128), or None for one scale per matrix.
      dtype: float8_e4m3fn, or float8_e5m2.
      power_of_two: Rounds scales up to powers of two, so that dividing by them and multiplying by them is exact.
      smallest_amax: A tile whose largest magnitude is below this gets the scale of one where it is this: 1e-4 as the
        public quantisers have it, `GRADIENT_AMAX` for gradients.
      scale: For a comparison, with tile None: this scale for all, whatever the values are. Those beyond the format's
        range are clipped, those below it become zero; 1 is a plain cast.
      implementation: "reference", "mosaic_gpu" (the kernel for Hopper: matrices of bfloat16 or float32 to E4M3 in
        tiles), or None for the best that is supported here, see `pallas_kernels.implementation`.

    Raises:
      ValueError: if x is no array of float matrices, tile or dtype is unknown, the implementation is unknown or not
        supported here, or a scale is given for tiles.
    """
    if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"quantize needs x [..., M, N] of a float dtype, not {x.shape} of {x.dtype}")
    if tile not in TILES:
        raise ValueError(f"quantize: tile must be (1, 128), (128, 1), (128, 128) or None, not {tile}")
    if jnp.dtype(dtype) not in FORMATS:
        raise ValueError(f"quantize: dtype must be float8_e4m3fn or float8_e5m2, not {jnp.dtype(dtype)}")
    if scale is not None and (tile is not None or not 0 < scale < float("inf")):
        raise ValueError(f"quantize: a given scale is positive, and for tile None: scale={scale}, tile={tile}")
    obstacles = {"mosaic_gpu": mosaic_gpu.supported(x, jnp.dtype(dtype), tile, smallest_amax), "reference": None}
    if choose("quantize", implementation, obstacles) == "mosaic_gpu" and tile is not None:
        codes, scales = mosaic_gpu.quantize(x, tile, power_of_two, float(smallest_amax))
    else:
        codes, scales = reference.quantize(x, tile, jnp.dtype(dtype), power_of_two, float(smallest_amax), scale)
    return Quantized(codes, scales, tile)


def quantize_both(
    x: Array, *, power_of_two: bool = False, smallest_amax: float = 1e-4, implementation: str | None = None
) -> tuple[Quantized, Quantized]:
    """x `[M, N]` in E4M3 in tiles of 1×128, and in tiles of 128×1: a layer's gradient, for Dgrad and for Wgrad.

    `quantize` twice, whose arguments and errors these are; the kernel "mosaic_gpu" reads x once.
    """
    name = _choose_for_matrix("quantize_both", x, (1, 128), smallest_amax, implementation)
    if name == "mosaic_gpu":
        codes, scales, column_codes, column_scales = mosaic_gpu.quantize_both(x, power_of_two, float(smallest_amax))
        return Quantized(codes, scales, (1, 128)), Quantized(column_codes, column_scales, (128, 1))
    rows, columns = (
        quantize(x, tile, power_of_two=power_of_two, smallest_amax=smallest_amax, implementation=implementation)
        for tile in ((1, 128), (128, 1))
    )
    return rows, columns


def quantize_weight(
    w: Array, *, power_of_two: bool = False, smallest_amax: float = 1e-4, implementation: str | None = None
) -> tuple[Quantized, Quantized]:
    """w `[K, N]` in E4M3 in blocks of 128×128, and its transpose `[N, K]`, the same values in an array of its own.

    The first is for Dgrad (`w.T` of it), the second for Fprop (`transposed.T`): each lies as the kernel of
    `block_scaled_matmul` reads it. Arguments and errors are those of `quantize`; the kernel "mosaic_gpu" reads w once.
    """
    name = _choose_for_matrix("quantize_weight", w, (128, 128), smallest_amax, implementation)
    if name == "mosaic_gpu":
        codes, scales, transposed = mosaic_gpu.quantize_weight(w, power_of_two, float(smallest_amax))
        return Quantized(codes, scales, (128, 128)), Quantized(transposed, scales.T, (128, 128))
    blocks = quantize(
        w, (128, 128), power_of_two=power_of_two, smallest_amax=smallest_amax, implementation=implementation
    )
    return blocks, blocks.T


def _choose_for_matrix(op, x, tile, smallest_amax, implementation):
    """The implementation for E4M3 of a matrix x; raises ValueError if x is none, or there is none such here."""
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{op} needs a matrix of a float dtype, not {x.shape} of {x.dtype}")
    obstacle = mosaic_gpu.supported(x, jnp.dtype(jnp.float8_e4m3fn), tile, smallest_amax)
    return choose(op, implementation, {"mosaic_gpu": obstacle, "reference": None})


def requantize(
    q: Quantized,
    tile: Tile,
    *,
    dtype: DTypeLike | None = None,
    power_of_two: bool = False,
    smallest_amax: float = 1e-4,
    implementation: str | None = None,
) -> Quantized:
    """The values of q in other tiles and, unless `dtype` is given, the same format: dequantised and quantised again.

    For a weight's gradient: what was kept from the forward pass in 1×128 tiles is needed in 128×1. With powers of two
    as scales on both sides no code loses a bit, unless it falls below the normal range of its new tile.

    Arguments and errors are those of `quantize`. The kernel "mosaic_gpu" makes 128×1 from 1×128, of matrices in E4M3,
    and writes the codes transposed, as Wgrad reads them: within `jax.jit`, the `.T` of the result costs nothing.
    """
    dtype = jnp.dtype(q.codes.dtype if dtype is None else dtype)
    obstacle = mosaic_gpu_requantize.supported(q.codes, q.tile, tile, dtype, smallest_amax)
    name = choose("requantize", implementation, {"mosaic_gpu": obstacle, "reference": None})
    if name == "mosaic_gpu":
        transposed, scales = mosaic_gpu_requantize.requantize_columns(
            q.codes, q.scales, power_of_two, float(smallest_amax)
        )
        return Quantized(transposed.T, scales, tile)
    how: Any = {"power_of_two": power_of_two, "smallest_amax": smallest_amax, "implementation": implementation}
    return quantize(q.dequantize(), tile, dtype=dtype, **how)
