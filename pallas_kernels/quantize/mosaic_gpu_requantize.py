"""Tiles of 1×128 into tiles of 128×1 for Hopper, in Pallas' Mosaic GPU: what Wgrad reads of a kept activation.

The codes leave transposed, `[N, M]`: the tensor cores want FP8 operands with the contraction contiguous in memory,
which in Wgrad runs over the rows. `requantize` returns the transpose of that array, so that Wgrad's operand,
`requantize(x, (128, 1)).T`, is the array itself: inside `jax.jit` XLA removes the pair.

One block of threads takes a tile of 128×128 and moves 2 bytes for each code:

    TMA ──► codes, scales of rows ──► largest magnitude of each column ──► scales
                                  └─► code · scale · (1 / new scale) ──► codes, transposed ──► TMA

Codes are read from shared memory twice: for the maxima, four at a time; and for the new codes as a result of `wgmma`
would lie, two at a time, where a transposition is one exchange with another lane. Mosaic has that for 16 bits and not
for 8, and float16 holds every E4M3 number, so codes are exchanged as float16. Rounding is the reference's, see
`mosaic_gpu`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.implementation import in_mesh, not_hopper
from pallas_kernels.quantize.mosaic_gpu import LEAST_AMAX
from pallas_kernels.quantize.registers import (
    BLOCK,
    SWIZZLE,
    How,
    codes_of,
    largest_of_columns,
    load_rows,
    reciprocal_of,
    scale_of,
    strips,
    swizzled,
    write_tiles,
)


def supported(codes: Any, tile: Any, new_tile: Any, dtype: jnp.dtype, smallest_amax: float) -> str | None:
    """Why the kernel cannot requantise codes in tiles of `tile` where the code runs; None if it can."""
    return not_hopper() or _unsupported(codes, tile, new_tile, dtype, smallest_amax)


def _unsupported(codes, tile, new_tile, dtype, smallest_amax) -> str | None:
    e4m3 = jnp.dtype(jnp.float8_e4m3fn)
    if codes.ndim != 2 or (codes.dtype, dtype) != (e4m3, e4m3):
        return f"it needs codes [M, N] of float8_e4m3fn, and makes such, not {codes.shape} of {codes.dtype} to {dtype}"
    if (tile, new_tile) != ((1, BLOCK), (BLOCK, 1)):
        return f"it makes tiles of 128×1 from tiles of 1×128, not {new_tile} from {tile}"
    if not LEAST_AMAX <= smallest_amax <= 1:
        return f"it needs smallest_amax between 2^-100 and 1, not {smallest_amax}"
    return None


@functools.partial(jax.jit, static_argnames=("power_of_two", "smallest_amax", "interpret"))
def requantize_columns(
    codes: Array, scales: Array, power_of_two: bool, smallest_amax: float, *, interpret: Any = None
) -> tuple[Array, Array]:
    """Codes `[M, N]` and scales `[M, ⌈N/128⌉]` of tiles of 1×128 to those of tiles of 128×1, the codes transposed.

    Args:
      codes: float8_e4m3fn.
      scales: float32.
      power_of_two: Rounds the new scales up to powers of two.
      smallest_amax: 2^-100 at least, and 1 at most.
      interpret: Pallas' `InterpretGPUParams`, to run on a CPU; None for the GPU.

    Returns:
      Codes `[N, M]` and scales `[⌈M/128⌉, N]`.

    Raises:
      ValueError: if codes or smallest_amax are not of that kind.
    """
    obstacle = _unsupported(codes, (1, BLOCK), (BLOCK, 1), codes.dtype, smallest_amax)
    if obstacle is not None:
        raise ValueError(f"requantize: implementation 'mosaic_gpu' cannot run here: {obstacle}")
    m, n = codes.shape
    if 0 in (m, n):
        return jnp.zeros((n, m), codes.dtype), jnp.zeros((-(-m // BLOCK), n), jnp.float32)
    unit = SWIZZLE if interpret is None else BLOCK  # The interpreter refuses to write beyond an array.
    rows, columns = -m % unit, -n % unit
    if rows or columns:
        codes = jnp.pad(codes, ((0, rows), (0, columns)))
        scales = jnp.pad(scales, ((0, rows), (0, 0)))
    turned, new_scales = _kernel(codes, How(power_of_two, smallest_amax, interpret))(codes, scales.T)
    return turned[:n, :m], new_scales[:, :n]


def _kernel(codes, how):
    """The kernel for codes `[M, N]` and scales `[⌈N/128⌉, M]`: codes `[N, M]`, and scales as they lie in memory."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    m, n = codes.shape
    down, across = -(-m // BLOCK), -(-n // BLOCK)

    def requantize(codes, scales, out, new_scales, tile, rows, turned, columns, full):  # What profiles call it.
        where = lax.axis_index("row"), lax.axis_index("column")
        here = [pl.ds(i * BLOCK, BLOCK) for i in where]
        plgpu.copy_gmem_to_smem(codes.at[here[0], here[1]], tile, full)
        plgpu.copy_gmem_to_smem(scales.at[where[1], here[0]], rows, full)
        plgpu.barrier_wait(full)
        columns[...] = scale_of(largest_of_columns(lambda some: _values(tile, rows, some, how), BLOCK), how)
        plgpu.commit_smem()  # Its barrier is for the new scales, which are read in another layout.
        _requantize_transposed(tile, rows, turned, columns, how)
        write_tiles((turned, out, where[::-1]), (columns, new_scales, where))

    codes_here = plgpu.SMEM((BLOCK, BLOCK), codes.dtype, transforms=swizzled(SWIZZLE, codes.dtype))
    scales_here = plgpu.SMEM((BLOCK,), jnp.float32)
    return in_mesh(
        plgpu.kernel(
            requantize,
            out_type=(
                jax.ShapeDtypeStruct((n, m), codes.dtype),
                jax.ShapeDtypeStruct((down, across * BLOCK), jnp.float32),
            ),
            scratch_types=(codes_here, scales_here, codes_here, scales_here, plgpu.Barrier(num_arrivals=2)),
            grid=(down, across),
            grid_names=("row", "column"),
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
            interpret=how.interpret,
        )
    )


def _values(tile, rows, some, how):
    """The values of some rows of a tile of codes, for the scales of its rows, lying as float32 does.

    So a thread reads 4 codes at a time: Mosaic reduces 32-bit values over warps where no more lie together.
    """
    layout = strips(jnp.dtype(jnp.float32))
    codes = load_rows(tile, some, layout, how).astype(jnp.float32)
    return codes * lax.broadcast_in_dim(load_rows(rows, some, layout.reduce(1), how), codes.shape, (0,))


def _requantize_transposed(tile, rows, turned, columns, how):
    """Writes the transposed new codes of a tile: two neighbouring rows of a column in one register."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    layout = plgpu.Layout.WGMMA_TRANSPOSED
    reciprocal = reciprocal_of(load_rows(columns, slice(None), layout.reduce(0), how), layout.reduce(0), how)

    @pl.loop(0, BLOCK // 64)
    def _(i):
        some = pl.ds(i * 64, 64)
        scale = load_rows(rows, some, layout.reduce(1), how)
        codes = load_rows(tile, some, plgpu.Layout.WGMMA, how).astype(jnp.float16)
        if how.interpret is None:
            codes = plgpu.layout_cast(codes, layout)
        values = codes.astype(jnp.float32) * lax.broadcast_in_dim(scale, codes.shape, (0,))
        new = codes_of(values, reciprocal, 1)
        if how.interpret is None:
            plgpu.transpose_ref(turned.at[:, some], (1, 0))[...] = new
        else:
            turned[:, some] = new.T
