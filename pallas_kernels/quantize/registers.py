"""What the Hopper kernels that quantise share: how tiles lie in shared memory and registers, scales and codes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

BLOCK = 128
LARGEST = 448.0
SWIZZLE = 64
"""Codes of a row that lie together in shared memory: what divides every width of V3, as 128 does not."""
STRIP = 16
"""Rows that a warpgroup holds in registers where maxima run down the rows."""


@dataclasses.dataclass(frozen=True)
class How:
    """What the scales are, and where the code runs."""

    power_of_two: bool
    smallest_amax: float
    interpret: Any
    """Pallas' `InterpretGPUParams`; None on a GPU. The interpreter has no layouts and no inlined instructions."""


def swizzled(size, dtype):
    """A tile in shared memory: 8 rows of `size` bytes together, swizzled so that lanes do not share a bank."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.TilingTransform((8, size // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(size)


def load_rows(tile, rows, layout, how):
    """Rows of a tile, in registers."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return tile[rows] if how.interpret is not None else plgpu.load(tile, (rows,), layout=layout)


def write_tiles(*copies):
    """Copies (tile of shared memory, array, where in it counted in tiles), and waits until the tiles have been read."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    plgpu.commit_smem()
    for tile, out, where in copies:
        leading = len(where) - len(tile.shape)
        slices = [pl.ds(i * size, size) for i, size in zip(where[leading:], tile.shape, strict=True)]
        plgpu.copy_smem_to_gmem(tile, out.at[(*where[:leading], *slices)])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def quads(dtype):
    """32 rows in registers: 8 of each warp, a row in 4 lanes, which hold 16 neighbouring bytes at a time."""
    return _layout(dtype, 8, 4)


def strips(dtype):
    """STRIP rows in registers: 4 of each warp, 128 neighbouring bytes of a row in 8 lanes."""
    return _layout(dtype, STRIP // 4, 8)


def _layout(dtype, rows, lanes):
    """4 warps with `rows` rows each, a row in `lanes` lanes of 16 bytes, as often as a row is longer."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    vector = 16 // dtype.itemsize
    tiling = plgpu.Tiling(((4 * rows, lanes * vector), (rows, lanes * vector), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def magnitude(x):
    """The bits of |x|, as integers that are ordered as |x| is."""
    integer = np.int16 if x.dtype.itemsize == 2 else np.int32
    return lax.bitcast_convert_type(x, integer) & integer(np.iinfo(integer).max)


def largest_of_columns(strip_of, high):
    """The largest magnitude of each column, as integers, where `strip_of` loads STRIP of the `high` rows."""
    from jax.experimental import pallas as pl

    def add(i, largest):
        return lax.max(largest, magnitude(strip_of(pl.ds(i * STRIP, STRIP))))

    return lax.fori_loop(1, high // STRIP, add, magnitude(strip_of(pl.ds(0, STRIP)))).max(0)


def scale_of(largest, how):
    """float32 scales of tiles with such a largest magnitude: amax * (1 / 448), or NaN."""
    if largest.dtype == jnp.int16:  # A bfloat16 is the upper half of a float32.
        largest = largest.astype(jnp.int32) << 16
    amax = lax.bitcast_convert_type(largest, jnp.float32)
    scale = lax.max(amax, lax.full_like(amax, how.smallest_amax)) * np.float32(1 / LARGEST)
    if how.power_of_two:  # Rounded up: a fraction carries into the exponent.
        fraction = np.int32(2**23 - 1)
        bits = (lax.bitcast_convert_type(scale, jnp.int32) + fraction) & ~fraction
        scale = lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(amax < np.float32(np.inf), scale, np.float32(np.nan))


def reciprocal_of(scale, layout, how):
    """1 / scale, rounded to nearest even; `layout` is that of the scales in registers."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if how.interpret is not None:
        return np.float32(1) / scale
    out = plgpu.ShapeDtypeStruct(scale.shape, jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=out)
    def reciprocal(_, values):
        return values._pointwise(values._lift_fast_instr("rcp.rn.f32"))

    return reciprocal(scale)


def codes_of(x, reciprocal, axis):
    """Codes of x `[R, C]` for the reciprocals of scales along one of its axes."""
    return (x.astype(jnp.float32) * lax.broadcast_in_dim(reciprocal, x.shape, (axis,))).astype(jnp.float8_e4m3fn)
