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
import numpy as np
from jax import Array, lax

from pallas_kernels.implementation import not_hopper
from pallas_kernels.quantize import reference

BLOCK = 128
LARGEST = 448.0
SWIZZLE = 64
"""Codes of a row that lie together in shared memory: what divides every width of V3, as 128 does not."""
STRIP = 16
"""Rows that a warpgroup holds in registers where maxima run down the rows."""
LEAST_AMAX = 2.0**-100
"""The least `smallest_amax`: with it scales and their reciprocals are normal numbers."""
DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class _How:
    """What the scales are, and where the code runs."""

    power_of_two: bool
    smallest_amax: float
    interpret: Any
    """Pallas' `InterpretGPUParams`; None on a GPU. The interpreter has no layouts and no inlined instructions."""


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
    return _run(x, PLANS[tile], _How(power_of_two, smallest_amax, interpret))


def quantize_both(
    x: Array, power_of_two: bool, smallest_amax: float, *, interpret: Any = None
) -> tuple[Array, Array, Array, Array]:
    """Codes and scales of x `[M, N]` in tiles of 1×128, then in tiles of 128×1; arguments as for `quantize`."""
    return _run(x, BOTH, _How(power_of_two, smallest_amax, interpret))


def quantize_weight(
    w: Array, power_of_two: bool, smallest_amax: float, *, interpret: Any = None
) -> tuple[Array, Array, Array]:
    """Codes `[K, N]` and scales of w in blocks of 128×128, and the codes transposed; arguments as for `quantize`."""
    return _run(w, WEIGHT, _How(power_of_two, smallest_amax, interpret))


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
    codes_here = plgpu.SMEM((high, wide), codes.dtype, transforms=_swizzled(SWIZZLE, codes.dtype))
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
    x_here = plgpu.SMEM((high, wide), x.dtype, transforms=_swizzled(128, x.dtype))
    return plgpu.kernel(
        body,
        out_type=tuple(out),
        scratch_types=(x_here, plgpu.Barrier(), *scratch),
        grid=(down, across),
        grid_names=("row", "column"),
        **warpgroups,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=how.interpret,
    )


def _swizzled(size, dtype):
    """A tile in shared memory: 8 rows of `size` bytes together, swizzled so that lanes do not share a bank."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.TilingTransform((8, size // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(size)


def _rows(tile, shared, out, where, how):
    """Codes and scales of a tile `[high, 128]` of x, a scale for each row."""
    from jax.experimental import pallas as pl

    codes, scales = shared
    layout = _quads(tile.dtype)

    @pl.loop(0, tile.shape[0] // 32)
    def _(i):
        rows = pl.ds(i * 32, 32)
        x = _load(tile, rows, layout, how)
        scale = _scale(_magnitude(x).max(1), how)
        codes[rows] = _codes(x, _reciprocal(scale, layout.reduce(1), how), 0)
        scales[rows] = scale

    _write((codes, out[0], where), (scales, out[1], where[::-1]))


def _columns(tile, shared, out, where, how):
    """Codes and scales of a tile `[128, wide]` of x, a scale for each column."""
    codes, scales = shared
    scale = _scale(_largest_of_columns(tile, how), how)
    scales[...] = scale
    _quantize_rows(tile, codes, scale, how)
    _write((codes, out[0], where), (scales, out[1], where))


def _block(tile, shared, out, where, how):
    """Codes of a tile `[128, 128]` of x with one scale, and the transposed codes if there is a place for them."""
    from jax.experimental import pallas as pl

    codes, *scales = shared
    of_columns = _largest_of_columns(tile, how)
    largest = of_columns.max()
    # Of columns and their maximum, since an array that is only a repeated scalar cannot be passed to `_reciprocal`.
    scale = _scale(lax.max(of_columns, lax.broadcast(largest, of_columns.shape)), how)
    _quantize_rows(tile, codes, scale, how)
    out[1][where[0], pl.ds(where[1], 1)] = _scale(lax.broadcast(largest, (1,)), how)
    if scales:
        scales[0][...] = scale
    _write((codes, out[0], where))  # Its barrier is one for the scales too, which are read in another layout.
    if scales:
        _quantize_transposed(tile, codes, scales[0], how)
        _write((codes, out[2], where[::-1]))


def _largest_of_columns(tile, how):
    """The largest magnitude of each column of a tile, as integers."""
    from jax.experimental import pallas as pl

    def add(i, largest):
        return lax.max(largest, _magnitude(_load(tile, pl.ds(i * STRIP, STRIP), layout, how)))

    layout = _strips(tile.dtype)
    first = _magnitude(_load(tile, pl.ds(0, STRIP), layout, how))
    return lax.fori_loop(1, tile.shape[0] // STRIP, add, first).max(0)


def _quantize_rows(tile, codes, scale, how):
    """Writes the codes of a tile, some rows at a time, for scales of its columns."""
    from jax.experimental import pallas as pl

    layout = _strips(tile.dtype)
    reciprocal = _reciprocal(scale, layout.reduce(0), how)

    @pl.loop(0, tile.shape[0] // STRIP)
    def _(i):
        rows = pl.ds(i * STRIP, STRIP)
        codes[rows] = _codes(_load(tile, rows, layout, how), reciprocal, 1)


def _quantize_transposed(tile, codes, scales, how):
    """Writes the transposed codes of a tile: two neighbouring rows of a column in one register."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    layout = plgpu.Layout.WGMMA_TRANSPOSED
    reciprocal = _reciprocal(_load(scales, slice(None), layout.reduce(0), how), layout.reduce(0), how)

    @pl.loop(0, tile.shape[0] // 64)
    def _(i):
        rows = pl.ds(i * 64, 64)
        x = _load(tile, rows, plgpu.Layout.WGMMA, how)
        if how.interpret is not None:
            codes[:, rows] = _codes(x, reciprocal, 1).T
        else:
            turned = _codes(plgpu.layout_cast(x, layout), reciprocal, 1)
            plgpu.transpose_ref(codes.at[:, rows], (1, 0))[...] = turned


def _load(tile, rows, layout, how):
    """Rows of a tile, in registers."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return tile[rows] if how.interpret is not None else plgpu.load(tile, (rows,), layout=layout)


def _write(*copies):
    """Copies (tile of shared memory, array, where in it counted in tiles), and waits until the tiles have been read."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    plgpu.commit_smem()
    for tile, out, where in copies:
        leading = len(where) - len(tile.shape)
        slices = [pl.ds(i * size, size) for i, size in zip(where[leading:], tile.shape, strict=True)]
        plgpu.copy_smem_to_gmem(tile, out.at[(*where[:leading], *slices)])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _quads(dtype):
    """32 rows in registers: 8 of each warp, a row in 4 lanes, which hold 16 neighbouring bytes at a time."""
    return _layout(dtype, 8, 4)


def _strips(dtype):
    """STRIP rows in registers: 4 of each warp, 128 neighbouring bytes of a row in 8 lanes."""
    return _layout(dtype, STRIP // 4, 8)


def _layout(dtype, rows, lanes):
    """4 warps with `rows` rows each, a row in `lanes` lanes of 16 bytes, as often as a row is longer."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    vector = 16 // dtype.itemsize
    tiling = plgpu.Tiling(((4 * rows, lanes * vector), (rows, lanes * vector), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def _magnitude(x):
    """The bits of |x|, as integers that are ordered as |x| is."""
    integer = np.int16 if x.dtype.itemsize == 2 else np.int32
    return lax.bitcast_convert_type(x, integer) & integer(np.iinfo(integer).max)


def _scale(largest, how):
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


def _reciprocal(scale, layout, how):
    """1 / scale, rounded to nearest even; `layout` is that of the scales in registers."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if how.interpret is not None:
        return np.float32(1) / scale
    out = plgpu.ShapeDtypeStruct(scale.shape, jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=out)
    def reciprocal(_, values):
        return values._pointwise(values._lift_fast_instr("rcp.rn.f32"))

    return reciprocal(scale)


def _codes(x, reciprocal, axis):
    """Codes of x `[R, C]` for the reciprocals of scales along one of its axes."""
    return (x.astype(jnp.float32) * lax.broadcast_in_dim(reciprocal, x.shape, (axis,))).astype(jnp.float8_e4m3fn)
