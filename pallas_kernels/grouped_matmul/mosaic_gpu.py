"""Grouped matmuls for Hopper, in Pallas' Mosaic GPU: of FP8 rows with their scales, and of bfloat16 arrays.

Sizes of groups are known only when the program runs: XLA makes small tables of them (`tile_visits`: four kernels of its
own), which the kernels read; see `block_scaled_matmul/pipeline.py` on how tiles and groups meet. In FP8 the kernels are
those of `block_scaled_matmul`: Fprop and Dgrad with a matrix for each visit, Wgrad with a part of K for each result.

Groups that start at multiples of a tile's height (`alignment`) cost nothing besides their own rows; G groups that start
anywhere cost up to G - 1 tiles more.

**Layout.** As for `block_scaled_matmul`, FP8 codes must lie along what is summed over. Dgrad reads w as it is stored;
Fprop wants the codes of w transposed, which XLA copies unless they come from `quantize_weight`. Wgrad sums over rows,
so XLA copies both operands transposed, 1 byte read and written for each element, and in the same pass makes zeros of
the rows between groups. For bfloat16, `wgmma` reads either order, and nothing is copied.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels.block_scaled_matmul import mosaic_gpu as block_scaled
from pallas_kernels.block_scaled_matmul.config import BLOCK, Groups, MatmulConfig, TileConfig, config_for
from pallas_kernels.grouped_matmul import mosaic_arrays
from pallas_kernels.grouped_matmul.config import ArrayConfig, array_config_for
from pallas_kernels.grouped_matmul.groups import group_starts, rows_of_groups, tile_visits
from pallas_kernels.grouped_matmul.vjp import Products
from pallas_kernels.implementation import not_hopper
from pallas_kernels.quantize import Quantized
from pallas_kernels.target import target

DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))
"""Of results."""


def supported(x: Array | Quantized, other: Array | Quantized, out_dtype: jnp.dtype) -> str | None:
    """Why the kernels cannot multiply rows x by matrices, or by other rows, where the code runs; None if they can."""
    return not_hopper() or unsupported(x, other, out_dtype)


def unsupported(x: Array | Quantized, other: Array | Quantized, out_dtype: jnp.dtype) -> str | None:
    """Why the kernels cannot do that wherever they run; None if they can."""
    if jnp.dtype(out_dtype) not in DTYPES:
        return f"it makes results of bfloat16 or float32, not {jnp.dtype(out_dtype)}"
    if isinstance(x, Quantized):
        assert isinstance(other, Quantized)  # Both or neither are.
        return block_scaled.unsupported_operands(x if other.codes.ndim == 3 else x.T, other)
    assert not isinstance(other, Quantized)
    if {x.dtype, other.dtype} != {jnp.dtype(jnp.bfloat16)}:
        return f"it needs arrays of bfloat16, not {x.dtype} and {other.dtype}; or quantised ones"
    return None


def rows_by_matrices(
    x: Array | Quantized,
    w: Array | Quantized,
    group_sizes: Array,
    alignment: int,
    out_dtype: jnp.dtype,
    contract: int = 1,
    *,
    config: TileConfig | None = None,
    sms: int | None = None,
    interpret: Any = None,
) -> Array:
    """Every group's rows times its matrix, over axis `contract` of w `[G, K, N]`: `[M, N]` for 1, `[M, K]` for 2.

    Args:
      x: Rows: bfloat16, or E4M3 in tiles of 1×128.
      w: Matrices: bfloat16, or E4M3 in tiles of 128×128.
      group_sizes: `[G]` int32.
      alignment: Groups start at multiples of this.
      out_dtype: bfloat16 or float32.
      contract: Which axis of w is summed over.
      config: How the work is cut: a `MatmulConfig` for quantised operands, an `ArrayConfig` for arrays; None for
        what was measured on this device, or the default of this size.
      sms: Blocks of threads, one for each SM; None for as many as the device has.
      interpret: Pallas' `InterpretGPUParams`, to run on a CPU; None for the GPU.

    Raises:
      ValueError: if the operands are not of that kind, or the config is not for them or does not fit.
    """
    op = "grouped_matmul" if contract == 1 else "grouped_matmul_dx"
    _require(op, unsupported(x, w, out_dtype))
    m, count, n = x.shape[0], w.shape[0], w.shape[3 - contract]
    if 0 in (*x.shape, *w.shape):
        return jnp.zeros((m, n), out_dtype)
    groups, sms = Groups("rows", count, alignment), sms or target().sms
    config = _config(op, config, w, (m, n, w.shape[contract]), out_dtype, sms, groups, contract == 2, interpret)
    tables = tile_visits(group_sizes, alignment, m, config.tile_m)
    if isinstance(config, MatmulConfig):
        b = w if contract == 1 else w.T
        return block_scaled.scaled_product(x, b, out_dtype, config, groups, tables, sms, interpret)
    return mosaic_arrays.product(x, w, out_dtype, config, groups, contract == 2, tables, sms, interpret)


def rows_by_rows(
    x: Array | Quantized,
    dy: Array | Quantized,
    group_sizes: Array,
    alignment: int,
    out_dtype: jnp.dtype | None = None,
    *,
    config: TileConfig | None = None,
    sms: int | None = None,
    interpret: Any = None,
) -> Array:
    """Every group's rows of x `[M, K]`, transposed, times its rows of dy `[M, N]`: `[G, K, N]`, None for float32.

    x and dy are bfloat16, or E4M3 in tiles of 128×1 with `alignment` a multiple of 128; else arguments and errors are
    those of `rows_by_matrices`.
    """
    out_dtype = jnp.dtype(jnp.float32 if out_dtype is None else out_dtype)
    _require("grouped_matmul_dw", unsupported(x, dy, out_dtype))
    if isinstance(x, Quantized) and alignment % BLOCK:
        raise ValueError(f"grouped_matmul_dw: steps of {BLOCK} rows would straddle groups at multiples of {alignment}")
    (m, k), n, count = x.shape, dy.shape[1], group_sizes.shape[0]
    if 0 in (m, k, n, count):
        return jnp.zeros((count, k, n), out_dtype)
    groups, sms = Groups("depth", count, alignment), sms or target().sms
    config = _config("grouped_matmul_dw", config, dy, (k, n, m), out_dtype, sms, groups, False, interpret)
    starts = group_starts(group_sizes, alignment)
    tables = (jnp.stack([starts, starts + group_sizes], 1).astype(jnp.int32),)
    if not (isinstance(x, Quantized) and isinstance(dy, Quantized)):
        return mosaic_arrays.product(x, dy, out_dtype, config, groups, False, tables, sms, interpret)
    real = rows_of_groups(group_sizes, m, alignment).any(0)[:, None]
    a, b = _zero_unless(real, x).T, _zero_unless(real, dy)
    return block_scaled.scaled_product(a, b, out_dtype, config, groups, tables, sms, interpret)


def _zero_unless(real: Array, q: Quantized) -> Quantized:
    """q with codes of zero in rows that are not `real`; XLA does so while it transposes them."""
    return Quantized(jnp.where(real, q.codes, jnp.zeros_like(q.codes)), q.scales, q.tile)


@functools.cache
def products(config: TileConfig | None = None, sms: int | None = None, interpret: Any = None) -> Products:
    """The two products of arrays, for their derivative; its gradients are rounded to bfloat16 before they are read."""
    options = {"config": config, "sms": sms, "interpret": interpret}

    def by_matrices(x, w, group_sizes, alignment, out_dtype, contract=1):
        return rows_by_matrices(x.astype(w.dtype), w, group_sizes, alignment, out_dtype, contract, **options)

    def by_rows(x, dy, group_sizes, alignment, out_dtype):
        return rows_by_rows(x, dy.astype(x.dtype), group_sizes, alignment, out_dtype, **options)

    return Products(by_matrices, by_rows)


def _config(op, config, b, size: tuple[int, int, int], out_dtype, sms, groups, transposed, interpret):
    """The config for a product by b of `size` (m, n, k), given or chosen; ValueError if it does not fit."""
    if isinstance(b, Quantized):
        config = config or config_for(*size, out_dtype, sms, b_tile=b.tile, groups=groups)
    else:
        config = config or array_config_for(*size, out_dtype, sms, groups, transposed)
    wanted = MatmulConfig if isinstance(b, Quantized) else ArrayConfig
    if not isinstance(config, wanted):
        raise ValueError(f"{op} needs a config that is a {wanted.__name__} for these operands, not {config}")
    block_scaled.check_config(op, config, out_dtype, interpret)
    if isinstance(config, MatmulConfig):
        block_scaled.check_tile(op, config, b)
    return config


def _require(op, obstacle):
    if obstacle is not None:
        raise ValueError(f"{op}: implementation 'mosaic_gpu' cannot run here: {obstacle}")
