"""SwiGLU with its quantisation for Hopper, in Pallas' Mosaic GPU, see `swiglu`. Both kernels read and write all once.

**Forward.** A block of threads takes 32 rows and 128 channels of the gate and of up:

    TMA ──► gate, up ──► silu(gate) · up [· weight] ──► three times, for hidden, gate and up:
                         largest magnitude of a row ──► scale ──► codes ──► TMA

7 bytes are moved for a channel of hidden in bfloat16. Eight neighbouring lanes hold a row.

**Backward.** A block of two warpgroups takes 128 rows and 64 channels, a warpgroup half of the rows:

    TMA ──► codes and scales of gate and up, dhidden ──► dgate, dup ──► TMA
                                                     └─► hidden (in dhidden's place), its columns' largest magnitudes
    both have those ──► scales ──► hidden's codes, transposed ──► TMA

9 bytes for a channel. The warpgroups meet once, to exchange magnitudes. Sums for the weights' gradients are made of 64
channels each, and added up outside: 4 bytes for 64 channels of a row.

Mosaic's quotient is within 2 units in the last place, and so is its exponential: enough for a sigmoid, whose result is
rounded to bfloat16. Scales and codes are rounded as the reference's, see `mosaic_gpu`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels.implementation import in_mesh, not_hopper
from pallas_kernels.quantize.mosaic_gpu import DTYPES, LEAST_AMAX
from pallas_kernels.quantize.registers import (
    BLOCK,
    STRIP,
    SWIZZLE,
    How,
    codes_of,
    load_rows,
    magnitude,
    reciprocal_of,
    scale_of,
    strips,
    swizzled,
    write_tiles,
)

ROWS = 64
"""Of a warpgroup's tile in the backward pass."""
FEW = 32
"""Rows of a block in the forward pass: with more, fewer blocks share an SM."""
NARROW = 64
"""Channels of a block in the backward pass."""
E4M3 = jnp.dtype(jnp.float8_e4m3fn)


def supported(x: Any, smallest_amax: float, kept: Any = None) -> str | None:
    """Why the kernels cannot take x, gate_up or (with kept codes) dhidden, where the code runs; None if they can."""
    return not_hopper() or _unsupported(x, smallest_amax, kept)


def _unsupported(x, smallest_amax, kept=None) -> str | None:
    if x.dtype not in DTYPES or (kept is not None and kept.dtype != E4M3):
        given = x.dtype if kept is None else f"{x.dtype} and codes of {kept.dtype}"
        return f"it needs bfloat16 or float32, and codes of float8_e4m3fn, not {given}"
    channels = x.shape[1] // (2 if kept is None else 1)
    if channels % BLOCK:
        return f"it needs F in multiples of 128, so that no tile has channels of gate and up, not {channels}"
    if not LEAST_AMAX <= smallest_amax <= 1:
        return f"it needs smallest_amax between 2^-100 and 1, not {smallest_amax}"
    return None


def _check(op, *args):
    obstacle = _unsupported(*args)
    if obstacle is not None:
        raise ValueError(f"{op}: implementation 'mosaic_gpu' cannot run here: {obstacle}")


# --- forward ----------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("power_of_two", "smallest_amax", "interpret"))
def quantize_swiglu(
    gate_up: Array, weights: Array | None, power_of_two: bool, smallest_amax: float, *, interpret: Any = None
) -> tuple[Array, Array, Array, Array]:
    """Codes and scales of hidden `[T, F]`, then of gate_up `[T, 2F]`, in tiles of 1×128.

    Args:
      gate_up: bfloat16 or float32, F in multiples of 128.
      weights: `[T]`, or None.
      power_of_two: Rounds scales up to powers of two.
      smallest_amax: 2^-100 at least, and 1 at most.
      interpret: Pallas' `InterpretGPUParams`, to run on a CPU; None for the GPU.

    Raises:
      ValueError: if gate_up or smallest_amax are not of that kind.
    """
    _check("quantize_swiglu", gate_up, smallest_amax)
    rows, channels = gate_up.shape[0], gate_up.shape[1] // 2
    if 0 in gate_up.shape:
        codes = [jnp.zeros((rows, c), E4M3) for c in (channels, 2 * channels)]
        scales = [jnp.zeros((rows, c // BLOCK), jnp.float32) for c in (channels, 2 * channels)]
        return codes[0], scales[0], codes[1], scales[1]
    how = How(power_of_two, smallest_amax, interpret)
    unit = 8 if interpret is None else FEW  # The interpreter refuses to write beyond an array.
    tables = () if weights is None else (_padded(weights.astype(jnp.float32), unit),)
    results = _forward_kernel(_padded(gate_up, unit), bool(tables), how)(_padded(gate_up, unit), *tables)
    hidden, hidden_scales, kept, kept_scales = results
    return hidden[:rows], hidden_scales.T[:rows], kept[:rows], kept_scales.T[:rows]


def _forward_kernel(gate_up, weighted, how):
    """The kernel for gate_up `[T, 2F]` and perhaps weights: codes, and scales `[F / 128, T]`, of hidden and gate_up."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    rows, channels = gate_up.shape[0], gate_up.shape[1] // 2
    down, across = -(-rows // FEW), channels // BLOCK

    def quantize_swiglu(gate_up, *refs):  # What profiles call it.
        tables, (hidden, hidden_scales, kept, kept_scales, *shared) = refs[:weighted], refs[weighted:]
        gate, up, weights, codes, scales, full = shared
        row, column = lax.axis_index("row"), lax.axis_index("column")
        here = pl.ds(row * FEW, FEW)
        for i, tile in enumerate((gate, up)):
            plgpu.copy_gmem_to_smem(gate_up.at[here, pl.ds((i * across + column) * BLOCK, BLOCK)], tile, full)
        for table in tables:
            plgpu.copy_gmem_to_smem(table.at[here], weights, full)
        plgpu.barrier_wait(full)
        _quantize_three(gate, up, weights if weighted else None, codes, scales, how)
        places = ((hidden, hidden_scales, column), (kept, kept_scales, column), (kept, kept_scales, across + column))
        copies = []
        for i, (out, out_scales, place) in enumerate(places):
            copies += [(codes.at[i], out, (row, place)), (scales.at[i], out_scales, (place, row))]
        write_tiles(*copies)

    tile = plgpu.SMEM((FEW, BLOCK), gate_up.dtype, transforms=swizzled(128, gate_up.dtype))
    out = [
        array
        for blocks in (across, 2 * across)
        for array in (
            jax.ShapeDtypeStruct((rows, blocks * BLOCK), E4M3),
            jax.ShapeDtypeStruct((blocks, down * FEW), jnp.float32),
        )
    ]
    return in_mesh(
        plgpu.kernel(
            quantize_swiglu,
            out_type=tuple(out),
            scratch_types=(
                tile,
                tile,
                plgpu.SMEM((FEW,), jnp.float32),
                plgpu.SMEM((3, FEW, BLOCK), E4M3, transforms=swizzled(128, E4M3)),
                plgpu.SMEM((3, FEW), jnp.float32),
                plgpu.Barrier(num_arrivals=2 + weighted),
            ),
            grid=(down, across),
            grid_names=("row", "column"),
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
            interpret=how.interpret,
        )
    )


def _quantize_three(gate, up, weights, codes, scales, how):
    """Codes and scales of hidden, gate and up, tiles `[32, 128]`, a scale for each row."""
    from jax.experimental import pallas as pl

    layout = strips(gate.dtype)

    @pl.loop(0, FEW // STRIP)
    def _(i):
        rows = pl.ds(i * STRIP, STRIP)
        inputs = [load_rows(tile, rows, layout, how) for tile in (gate, up)]
        wide = [x.astype(jnp.float32) for x in inputs]
        hidden = wide[0] * _sigmoid(wide[0]) * wide[1]
        if weights is not None:
            weight = load_rows(weights, rows, layout.reduce(1), how)
            hidden = hidden * lax.broadcast_in_dim(weight, hidden.shape, (0,))
        for j, x in enumerate([hidden.astype(gate.dtype), *inputs]):
            scale = scale_of(magnitude(x).max(1), how)
            codes[j, rows] = codes_of(x, reciprocal_of(scale, layout.reduce(1), how), 0)
            scales[j, rows] = scale


def _sigmoid(x):
    return np.float32(1) / (np.float32(1) + jnp.exp(-x))


# --- backward ---------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("power_of_two", "smallest_amax", "interpret"))
def swiglu_backward(
    codes: Array,
    scales: Array,
    dhidden: Array,
    weights: Array | None,
    power_of_two: bool,
    smallest_amax: float,
    *,
    interpret: Any = None,
) -> tuple[Array, Array | None, Array, Array]:
    """dgate_up `[T, 2F]`, dweights `[T]` or None, and hidden in tiles of 128×1: codes `[F, T]`, scales `[⌈T/128⌉, F]`.

    Args:
      codes: Of gate_up, `[T, 2F]` float8_e4m3fn, F in multiples of 128.
      scales: Of their tiles of 1×128, `[T, 2F / 128]` float32.
      dhidden: `[T, F]`, bfloat16 or float32.
      weights: `[T]`, or None.
      power_of_two: Rounds hidden's scales up to powers of two.
      smallest_amax: 2^-100 at least, and 1 at most.
      interpret: Pallas' `InterpretGPUParams`, to run on a CPU; None for the GPU.

    Raises:
      ValueError: if codes, dhidden or smallest_amax are not of that kind.
    """
    _check("swiglu_backward", dhidden, smallest_amax, codes)
    rows, channels = dhidden.shape
    if 0 in dhidden.shape:
        dweights = None if weights is None else jnp.zeros(rows, jnp.float32)
        columns = jnp.zeros((-(-rows // BLOCK), channels), jnp.float32)
        return jnp.zeros(codes.shape, dhidden.dtype), dweights, jnp.zeros((channels, rows), E4M3), columns
    unit = SWIZZLE if interpret is None else BLOCK  # The interpreter refuses to write beyond an array.
    codes, dhidden = (_padded(x, unit) for x in (codes, dhidden))
    tables = [_padded(scales, unit).T]
    if weights is not None:
        tables.append(_padded(weights.astype(jnp.float32), unit))
    kernel = _backward_kernel(dhidden, weights is not None, How(power_of_two, smallest_amax, interpret))
    dgate_up, hidden, columns, *sums = kernel(codes, dhidden, *tables)
    return dgate_up[:rows], sums[0].sum(0)[:rows] if sums else None, hidden[:, :rows], columns


def _backward_kernel(dhidden, weighted, how):
    """The kernel for codes `[T, 2F]`, dhidden, scales `[2F / 128, T]` and perhaps weights.

    Its results are dgate_up, hidden's codes `[F, T]` and scales `[⌈T/128⌉, F]`, and with weights sums `[F / 64, T]`.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    (rows, channels), dtype = dhidden.shape, dhidden.dtype
    down, across = -(-rows // BLOCK), channels // NARROW
    out = [
        jax.ShapeDtypeStruct((rows, 2 * channels), dtype),
        jax.ShapeDtypeStruct((channels, rows), E4M3),
        jax.ShapeDtypeStruct((down, channels), jnp.float32),
    ]
    if weighted:
        out.append(jax.ShapeDtypeStruct((across, down * BLOCK), jnp.float32))
    tiles = functools.partial(plgpu.SMEM, (2, ROWS, NARROW))
    scratch: dict[str, Any] = {
        "gate": tiles(E4M3, transforms=swizzled(SWIZZLE, E4M3)),
        "up": tiles(E4M3, transforms=swizzled(SWIZZLE, E4M3)),
        "hidden": tiles(dtype, transforms=swizzled(128, dtype)),
        "dgate": tiles(dtype, transforms=swizzled(128, dtype)),
        "dup": tiles(dtype, transforms=swizzled(128, dtype)),
        "gate_scales": plgpu.SMEM((2, ROWS), jnp.float32),
        "up_scales": plgpu.SMEM((2, ROWS), jnp.float32),
        "weights": plgpu.SMEM((2, ROWS), jnp.float32),
        "sums": plgpu.SMEM((2, ROWS), jnp.float32),
        "largest": plgpu.SMEM((2, NARROW), jnp.int32),
        "columns": plgpu.SMEM((NARROW,), jnp.float32),
        "full": plgpu.Barrier(num_arrivals=5 + weighted, num_barriers=2),
        "met": plgpu.Barrier(num_arrivals=2),
    }

    def swiglu_backward(*refs, **shared):  # What profiles call it.
        _backward_body(refs[: 3 + weighted], refs[3 + weighted :], across, how, **shared)

    return in_mesh(
        plgpu.kernel(
            swiglu_backward,
            out_type=tuple(out),
            scratch_types=scratch,
            grid=(down, across),
            grid_names=("row", "column"),
            num_threads=2,
            thread_name="warpgroup",
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
            interpret=how.interpret,
        )
    )


def _backward_body(inputs, outs, across, how, *, full, met, columns, **shared):
    """What each of the two warpgroups does with its 64 rows."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    codes, dhidden, scales, *weights = inputs
    dgate_up, turned, new_scales, *sums = outs
    warpgroup, column = lax.axis_index("warpgroup"), lax.axis_index("column")
    largest, mine = shared["largest"], {name: ref.at[warpgroup] for name, ref in shared.items()}
    row = 2 * lax.axis_index("row") + warpgroup
    here, there = pl.ds(row * ROWS, ROWS), pl.ds(column * NARROW, NARROW)
    for i, name in enumerate(("gate", "up")):
        block = lax.div((i * across + column) * NARROW, np.int32(BLOCK))
        channels = pl.ds((i * across + column) * NARROW, NARROW)
        plgpu.copy_gmem_to_smem(codes.at[here, channels], mine[name], full.at[warpgroup])
        plgpu.copy_gmem_to_smem(scales.at[block, here], mine[f"{name}_scales"], full.at[warpgroup])
    plgpu.copy_gmem_to_smem(dhidden.at[here, there], mine["hidden"], full.at[warpgroup])
    for table in weights:
        plgpu.copy_gmem_to_smem(table.at[here], mine["weights"], full.at[warpgroup])
    plgpu.barrier_wait(full.at[warpgroup])
    mine["largest"][...] = _differentiate(mine, bool(weights), how)
    plgpu.commit_smem()
    plgpu.barrier_arrive(met)
    plgpu.barrier_wait(met)
    _quantize_hidden(mine, largest, how)

    @pl.when(warpgroup == 0)
    def _():
        columns[...] = scale_of(_of_both(largest, strips(jnp.dtype(jnp.float32)).reduce(0), how), how)
        write_tiles((columns, new_scales, (lax.axis_index("row"), column)))

    copies = [
        (mine["dgate"], dgate_up, (row, column)),
        (mine["dup"], dgate_up, (row, across + column)),
        (mine["gate"], turned, (column, row)),
    ]
    write_tiles(*copies, *[(mine["sums"], out, (column, row)) for out in sums])


def _differentiate(mine, weighted, how):
    """Writes dgate and dup, hidden in dhidden's place, and sums of rows; the largest magnitudes of hidden's columns."""
    from jax.experimental import pallas as pl

    layout = strips(jnp.dtype(jnp.float32))

    def strip(i):
        rows = pl.ds(i * STRIP, STRIP)

        def of_row(name):
            return lax.broadcast_in_dim(load_rows(mine[name], rows, layout.reduce(1), how), (STRIP, NARROW), (0,))

        gate, up, gradient = (
            load_rows(mine[name], rows, layout, how).astype(jnp.float32) for name in ("gate", "up", "hidden")
        )
        gate, up = gate * of_row("gate_scales"), up * of_row("up_scales")
        sigmoid = _sigmoid(gate)
        silu = gate * sigmoid
        hidden = silu * up
        if weighted:
            mine["sums"][rows] = (gradient * hidden).sum(1)
            weight = of_row("weights")
            hidden, gradient = hidden * weight, gradient * weight
        dtype = mine["hidden"].dtype
        mine["dup"][rows] = (gradient * silu).astype(dtype)
        mine["dgate"][rows] = (gradient * up * (sigmoid + silu * (np.float32(1) - sigmoid))).astype(dtype)
        rounded = hidden.astype(dtype)
        mine["hidden"][rows] = rounded
        return magnitude(rounded.astype(jnp.float32))

    return lax.fori_loop(1, ROWS // STRIP, lambda i, largest: lax.max(largest, strip(i)), strip(0)).max(0)


def _quantize_hidden(mine, largest, how):
    """Writes hidden's transposed codes, in the gate's place: two neighbouring rows of a column in one register."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    layout = plgpu.Layout.WGMMA_TRANSPOSED
    scale = scale_of(_of_both(largest, layout.reduce(0), how), how)
    reciprocal = reciprocal_of(scale, layout.reduce(0), how)
    hidden = load_rows(mine["hidden"], slice(None), plgpu.Layout.WGMMA, how)
    if how.interpret is not None:
        mine["gate"][...] = codes_of(hidden, reciprocal, 1).T
    else:
        codes = codes_of(plgpu.layout_cast(hidden, layout), reciprocal, 1)
        plgpu.transpose_ref(mine["gate"], (1, 0))[...] = codes


def _of_both(largest, layout, how):
    """The largest magnitudes of the columns of both warpgroups."""
    return lax.max(*(load_rows(largest.at[i], slice(None), layout, how) for i in range(2)))


def _padded(x, unit):
    """x with zeros after its rows, up to a multiple of `unit`."""
    extra = -x.shape[0] % unit
    return jnp.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1)) if extra else x
