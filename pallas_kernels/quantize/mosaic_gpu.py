"""Quantisation to E4M3 for Hopper, in Pallas' Mosaic GPU: x is read once, and all that training needs of it is written.

    quantize           x -> codes in tiles of 1×128, 128×1 or 128×128
    quantize_both      x -> codes in tiles of 1×128 and of 128×1: a gradient, for Dgrad and Wgrad (section 3.3.2)
    quantize_weight    w -> codes in blocks of 128×128, and the transposed codes, as Fprop's matmul reads them

One block of threads takes one tile of x `[high, wide]` of at most 128×128:

    TMA ──► x tile in shared memory ──► largest magnitude ──► scale ──► codes in shared memory ──► TMA ──► codes, scales

The kernel is bound by memory: 3 bytes are moved for an element of bfloat16, 4 where it is written twice. Nothing in a
block overlaps; several blocks share an SM, and while one waits for its tile the others work. Global memory is read and
written by TMA, and registers are filled with 16 bytes of x at a time.

- 1×128: four neighbouring lanes hold a row; its maximum takes two shuffles. Nothing crosses a warp.
- 128×1: a warp holds whole rows; maxima run down the rows in registers, and across lanes and warps once at the end. x
  is read twice, from shared memory.
- Both: a warpgroup for each, on the same tile of shared memory.
- 128×128: the same, and then the maximum of the columns'. For transposed codes x is read a third time, as a result of
  `wgmma` would lie, where a transposition is one exchange with another lane: Mosaic has it for 16 and 32 bits, not for
  8. Two neighbouring codes of a column are then stored at once, 2 bytes.
- Magnitudes are compared as integers of x's own width, whose order is that of floats with infinity and NaN at the end:
  two elements of bfloat16 in one instruction, and no NaN is lost.

**Rounding.** An element is multiplied by 1 / scale, as the reference has it, so that a division is made once for a
tile. It must be rounded to nearest, else a code next to a tie differs: `rcp.rn`, which has to be inlined, since
Mosaic divides by `div.full`, wrong by up to 2 units in the last place. Products are not clipped: amax / scale is 448
but for its rounding, far from 464, where codes would end.

**Layout.** Scales of 1×128 are written `[⌈N/128⌉, M]`, as `block_scaled_matmul` reads them: transposing them here and
there is a pair that XLA removes.

**Ragged sizes.** TMA reads zeros beyond an array, which change no maximum, and drops what is written there. Its tiles
want M in multiples of 8 (64 for a weight) and N of 64; x of other sizes is padded first, which copies it. None of V3's
needs it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.implementation import in_mesh, not_hopper
from pallas_kernels.quantize import reference
from pallas_kernels.quantize.registers import (
    BLOCK,
    STRIP,
    SWIZZLE,
    How,
    codes_of,
    largest_of_columns,
    load_rows,
    magnitude,
    quads,
    reciprocal_of,
    scale_of,
    strips,
    swizzled,
    write_tiles,
)

LEAST_AMAX = 2.0**-100
"""The least `smallest_amax`: with it scales and their reciprocals are normal numbers."""
DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a kernel makes, and of how much of x each block of threads makes it."""

    name: str
    """What profiles call it."""
    forms: tuple[str, ...]
    """ "rows", "columns" and "block" are codes and scales in such tiles; "transposed" are codes alone."""
    high: int
    """Rows of x."""
    wide: int
    """Columns of x."""

    @property
    def both(self) -> bool:
        """Two warpgroups work on one tile of x."""
        return self.forms == ("rows", "columns")


TILES = {"rows": (1, BLOCK), "columns": (BLOCK, 1), "block": (BLOCK, BLOCK)}
PLANS = {
    TILES["rows"]: _Plan("quantize", ("rows",), 64, BLOCK),
    TILES["columns"]: _Plan("quantize", ("columns",), BLOCK, 64),
    TILES["block"]: _Plan("quantize", ("block",), BLOCK, BLOCK),
}
BOTH = _Plan("quantize_both", ("rows", "columns"), BLOCK, BLOCK)
WEIGHT = _Plan("quantize_weight", ("block", "transposed"), BLOCK, BLOCK)


def supported(x: Any, dtype: jnp.dtype, tile: tuple[int, int] | None, smallest_amax: float) -> str | None:
    """Why the kernel cannot quantise x to `dtype` in tiles of `tile` where the code runs; None if it can."""
    return not_hopper() or _unsupported(x, dtype, tile, smallest_amax)


def _unsupported(x, dtype, tile, smallest_amax) -> str | None:
    if x.ndim != 2 or x.dtype not in DTYPES:
        return f"it needs x [M, N] of bfloat16 or float32, not {x.shape} of {x.dtype}"
    if jnp.dtype(dtype) != jnp.float8_e4m3fn or tile is None:
        return f"it makes float8_e4m3fn in tiles of 1×128, 128×1 or 128×128, not {jnp.dtype(dtype)} in {tile}"
    if not LEAST_AMAX <= smallest_amax <= 1:
        return f"it needs smallest_amax between 2^-100 and 1, not {smallest_amax}"
    return None


def quantize(
    x: Array, tile: tuple[int, int], power_of_two: bool, smallest_amax: float, *, interpret: Any = None
) -> tuple[Array, Array]:
    """Codes `[M, N]` float8_e4m3fn and float32 scales of x `[M, N]`, bfloat16 or float32, as the reference has them.

    Args:
      x: What is quantised.
      tile: (1, 128), (128, 1) or (128, 128).
      power_of_two: Rounds scales up to powers of two.
      smallest_amax: 2^-100 at least, and 1 at most.
      interpret: Pallas' `InterpretGPUParams`, to run on a CPU; None for the GPU.

    Raises:
      ValueError: if x or smallest_amax is not of that kind.
    """
    return _run(x, PLANS[tile], How(power_of_two, smallest_amax, interpret))


def quantize_both(
    x: Array, power_of_two: bool, smallest_amax: float, *, interpret: Any = None
) -> tuple[Array, Array, Array, Array]:
    """Codes and scales of x `[M, N]` in tiles of 1×128, then in tiles of 128×1; arguments as for `quantize`."""
    return _run(x, BOTH, How(power_of_two, smallest_amax, interpret))


def quantize_weight(
    w: Array, power_of_two: bool, smallest_amax: float, *, interpret: Any = None
) -> tuple[Array, Array, Array]:
    """Codes `[K, N]` and scales of w in blocks of 128×128, and the codes transposed; arguments as for `quantize`."""
    return _run(w, WEIGHT, How(power_of_two, smallest_amax, interpret))


def _run(x, plan, how):
    obstacle = _unsupported(x, jnp.float8_e4m3fn, TILES[plan.forms[0]], how.smallest_amax)
    if obstacle is not None:
        raise ValueError(f"{plan.name}: implementation 'mosaic_gpu' cannot run here: {obstacle}")
    return _quantize_arrays(x, plan, how)


@functools.partial(jax.jit, static_argnames=("plan", "how"))
def _quantize_arrays(x, plan, how):
    """Pads x as TMA's tiles want it, runs the kernel, and cuts its results to size."""
    m, n = x.shape
    if 0 in (m, n):
        tiles = [TILES[form] for form in plan.forms if form in TILES]
        e4m3 = jnp.dtype(jnp.float8_e4m3fn)
        out = [leaf for tile in tiles for leaf in reference.quantize(x, tile, e4m3, False, how.smallest_amax, None)]
        return (*out, out[0].T) if "transposed" in plan.forms else tuple(out)
    rows = m + -m % (SWIZZLE if "transposed" in plan.forms else 8)
    columns = n + -n % SWIZZLE
    if how.interpret is not None:  # It refuses to write beyond an array, where TMA writes what lies within.
        rows, columns = rows + -rows % plan.high, columns + -columns % plan.wide
    if (rows, columns) != (m, n):
        x = jnp.pad(x, ((0, rows - m), (0, columns - n)))
    results = iter(_kernel(x, plan, how)(x))
    out = []
    for form in plan.forms:
        codes = next(results)
        if form == "transposed":
            out.append(codes[:n, :m])
        else:
            scales = next(results).T if form == "rows" else next(results)
            out += [codes[:m, :n], scales[tuple(map(slice, reference.scale_shape((m, n), TILES[form])))]]
    return tuple(out)


def _kernel(x, plan, how):
    """The kernel for x `[M, N]`: for each form its codes, and scales as they lie in memory."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    (m, n), high, wide = x.shape, plan.high, plan.wide
    down, across = -(-m // high), -(-n // wide)
    codes = jax.ShapeDtypeStruct((m, n), jnp.float8_e4m3fn)
    codes_here = plgpu.SMEM((high, wide), codes.dtype, transforms=swizzled(SWIZZLE, codes.dtype))
    # Scales are written whole tiles at a time, since a copy of one dimension is not cut off at the end of an array.
    out, scratch = [], []
    for form in plan.forms:
        if form == "rows":
            out += [codes, jax.ShapeDtypeStruct((across, down * high), jnp.float32)]
            scratch += [codes_here, plgpu.SMEM((high,), jnp.float32)]
        elif form == "columns":
            out += [codes, jax.ShapeDtypeStruct((down, across * wide), jnp.float32)]
            scratch += [codes_here, plgpu.SMEM((wide,), jnp.float32)]
        elif form == "block":
            out += [codes, jax.ShapeDtypeStruct((down, across), jnp.float32)]
            scratch += [codes_here]
        else:  # These codes take the place of the others when those are written.
            out += [jax.ShapeDtypeStruct((n, m), codes.dtype)]
            scratch += [plgpu.SMEM((wide,), jnp.float32)]

    def body(x, *refs):
        outs, (tile, full, *shared) = refs[: len(out)], refs[len(out) :]
        where = lax.axis_index("row"), lax.axis_index("column")

        def load():
            source = x.at[pl.ds(where[0] * high, high), pl.ds(where[1] * wide, wide)]
            plgpu.copy_gmem_to_smem(source, tile, full)

        if plan.both:
            warpgroup = lax.axis_index("warpgroup")
            pl.when(warpgroup == 0)(load)
            plgpu.barrier_wait(full)
            pl.when(warpgroup == 0)(lambda: _rows(tile, shared[:2], outs[:2], where, how))
            pl.when(warpgroup == 1)(lambda: _columns(tile, shared[2:], outs[2:], where, how))
        else:
            load()
            plgpu.barrier_wait(full)
            {"rows": _rows, "columns": _columns, "block": _block}[plan.forms[0]](tile, shared, outs, where, how)

    body.__name__ = plan.name
    warpgroups: dict[str, Any] = {"num_threads": 2, "thread_name": "warpgroup"} if plan.both else {}
    x_here = plgpu.SMEM((high, wide), x.dtype, transforms=swizzled(128, x.dtype))
    return in_mesh(
        plgpu.kernel(
            body,
            out_type=tuple(out),
            scratch_types=(x_here, plgpu.Barrier(), *scratch),
            grid=(down, across),
            grid_names=("row", "column"),
            **warpgroups,
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
            interpret=how.interpret,
        )
    )


def _rows(tile, shared, out, where, how):
    """Codes and scales of a tile `[high, 128]` of x, a scale for each row."""
    from jax.experimental import pallas as pl

    codes, scales = shared
    layout = quads(tile.dtype)

    @pl.loop(0, tile.shape[0] // 32)
    def _(i):
        rows = pl.ds(i * 32, 32)
        x = load_rows(tile, rows, layout, how)
        scale = scale_of(magnitude(x).max(1), how)
        codes[rows] = codes_of(x, reciprocal_of(scale, layout.reduce(1), how), 0)
        scales[rows] = scale

    write_tiles((codes, out[0], where), (scales, out[1], where[::-1]))


def _columns(tile, shared, out, where, how):
    """Codes and scales of a tile `[128, wide]` of x, a scale for each column."""
    codes, scales = shared
    scale = scale_of(_largest_of_columns(tile, how), how)
    scales[...] = scale
    _quantize_rows(tile, codes, scale, how)
    write_tiles((codes, out[0], where), (scales, out[1], where))


def _block(tile, shared, out, where, how):
    """Codes of a tile `[128, 128]` of x with one scale, and the transposed codes if there is a place for them."""
    from jax.experimental import pallas as pl

    codes, *scales = shared
    of_columns = _largest_of_columns(tile, how)
    largest = of_columns.max()
    # Of columns and their maximum, since an array that is only a repeated scalar cannot be passed to `reciprocal_of`.
    scale = scale_of(lax.max(of_columns, lax.broadcast(largest, of_columns.shape)), how)
    _quantize_rows(tile, codes, scale, how)
    out[1][where[0], pl.ds(where[1], 1)] = scale_of(lax.broadcast(largest, (1,)), how)
    if scales:
        scales[0][...] = scale
    write_tiles((codes, out[0], where))  # Its barrier is one for the scales too, which are read in another layout.
    if scales:
        _quantize_transposed(tile, codes, scales[0], how)
        write_tiles((codes, out[2], where[::-1]))


def _largest_of_columns(tile, how):
    layout = strips(tile.dtype)
    return largest_of_columns(lambda rows: load_rows(tile, rows, layout, how), tile.shape[0])


def _quantize_rows(tile, codes, scale, how):
    """Writes the codes of a tile, some rows at a time, for scales of its columns."""
    from jax.experimental import pallas as pl

    layout = strips(tile.dtype)
    reciprocal = reciprocal_of(scale, layout.reduce(0), how)

    @pl.loop(0, tile.shape[0] // STRIP)
    def _(i):
        rows = pl.ds(i * STRIP, STRIP)
        codes[rows] = codes_of(load_rows(tile, rows, layout, how), reciprocal, 1)


def _quantize_transposed(tile, codes, scales, how):
    """Writes the transposed codes of a tile: two neighbouring rows of a column in one register."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    layout = plgpu.Layout.WGMMA_TRANSPOSED
    reciprocal = reciprocal_of(load_rows(scales, slice(None), layout.reduce(0), how), layout.reduce(0), how)

    @pl.loop(0, tile.shape[0] // 64)
    def _(i):
        rows = pl.ds(i * 64, 64)
        x = load_rows(tile, rows, plgpu.Layout.WGMMA, how)
        if how.interpret is not None:
            codes[:, rows] = codes_of(x, reciprocal, 1).T
        else:
            turned = codes_of(plgpu.layout_cast(x, layout), reciprocal, 1)
            plgpu.transpose_ref(codes.at[:, rows], (1, 0))[...] = turned
