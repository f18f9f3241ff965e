"""Grouped matmul: rows sorted by group, one matrix per group; the cost follows the rows, not the number of groups.

Shape letters: M rows, G groups, K and N the two widths of a matrix. Group g holds the rows `[start_g, start_g +
size_g)`; the starts are the sizes rounded up to `alignment` and summed. Rows outside every group, between groups or
after the last, are padding: they give zero rows and zero gradients whatever they hold.

Operands are both arrays of any float dtype, or both `Quantized`: then the three functions are Fprop, Dgrad and Wgrad of
`block_scaled_matmul`, group by group. The sizes are taken on trust, since a compiled program cannot refuse them:
`check_group_sizes` does, on the host.

The blocked implementation dequantises both operands whole before it starts: on a CPU that takes an eighth to a fifth
less time than dequantising each group's matrix when its turn comes, and a float32 copy of the operands.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels.block_scaled_matmul.api import check_operands, check_out_dtype, check_tile
from pallas_kernels.grouped_matmul import blocked, mosaic_gpu, reference, vjp
from pallas_kernels.implementation import choose
from pallas_kernels.quantize import Quantized

_ROW_TILES = ((1, 128), (128, 128), None)
_MATRIX_TILES = ((128, 128), None)
_COLUMN_TILES = ((128, 1), (128, 128), None)
_BLOCKED = vjp.Products(blocked.rows_by_matrices, blocked.rows_by_rows)


def grouped_matmul(
    x: Array | Quantized,
    w: Array | Quantized,
    group_sizes: Array,
    *,
    alignment: int = 1,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Array:
    """Multiplies each group of rows by the group's own matrix: `y[rows of g] = x[rows of g] @ w[g]`.

    Args:
      x: Rows sorted by group, `[M, K]`, of any float dtype; or Quantized in 1×128 tiles (128×128 or one scale for
        comparisons).
      w: Matrices, `[G, K, N]`; Quantized in 128×128 blocks (or one scale each) where x is.
      group_sizes: Rows of each group, `[G]` int32; the groups, each rounded up to `alignment`, must fit in M.
      alignment: Groups start at multiples of this many rows; 1 means that they are contiguous.
      out_dtype: None for x's dtype, or for bfloat16 where x is Quantized (else it is that or float32).
      implementation: "reference" (dense in G: an oracle for small sizes), "blocked" (portable), "mosaic_gpu" (kernels
        for Hopper: arrays of bfloat16, or E4M3 in tiles of 1×128 and 128×128), or None for the best that is supported
        here, see `pallas_kernels.implementation`.

    Returns:
      `[M, N]` of `out_dtype`, accumulated in float32 or wider; zero in padding rows. An empty group's matrix gets an
      exactly zero gradient. It can be differentiated for arrays; for quantised operands the gradients are the two
      functions below.

    Raises:
      ValueError: if shapes, tiles, dtypes or alignment make no sense, or the implementation is unknown or not supported
        here.
    """
    fits = len(x.shape) == 2 and len(w.shape) == 3 and x.shape[1] == w.shape[1] and group_sizes.shape == w.shape[:1]
    _require_shapes(fits, "grouped_matmul", "x [M, K], w [G, K, N]", x, w, group_sizes)
    _check("grouped_matmul", {"x": (x, _ROW_TILES), "w": (w, _MATRIX_TILES)}, alignment)
    dtype = _out_dtype("grouped_matmul", x, out_dtype)
    gradients = () if isinstance(x, Quantized) else ("grouped_matmul_dx", "grouped_matmul_dw")
    name = _choose("grouped_matmul", implementation, x, w, dtype, gradients)
    if name == "reference":
        return reference.rows_by_matrices(x, w, group_sizes, alignment, dtype)
    if name == "mosaic_gpu" and isinstance(x, Quantized):
        return mosaic_gpu.rows_by_matrices(x, w, group_sizes, alignment, dtype)
    rows, matrices = _arrays(x, w)
    products = mosaic_gpu.products() if name == "mosaic_gpu" else _BLOCKED
    return vjp.grouped_matmul(rows, matrices, group_sizes, alignment, dtype, products)


def grouped_matmul_dx(
    dy: Array | Quantized,
    w: Array | Quantized,
    group_sizes: Array,
    *,
    alignment: int = 1,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Array:
    """Gradient for the rows: dy `[M, N]`, w `[G, K, N]` -> `dy[rows of g] @ w[g].T`, `[M, K]`.

    Tiles, dtypes, implementations and errors are those of `grouped_matmul`, with dy as the rows.
    """
    fits = len(dy.shape) == 2 and len(w.shape) == 3 and dy.shape[1] == w.shape[2] and group_sizes.shape == w.shape[:1]
    _require_shapes(fits, "grouped_matmul_dx", "dy [M, N], w [G, K, N]", dy, w, group_sizes)
    _check("grouped_matmul_dx", {"dy": (dy, _ROW_TILES), "w": (w, _MATRIX_TILES)}, alignment)
    dtype = _out_dtype("grouped_matmul_dx", dy, out_dtype)
    name = _choose("grouped_matmul_dx", implementation, dy, w, dtype)
    if name == "reference":
        return reference.rows_by_matrices(dy, w, group_sizes, alignment, dtype, contract=2)
    if name == "mosaic_gpu":
        return mosaic_gpu.rows_by_matrices(dy, w, group_sizes, alignment, dtype, contract=2)
    rows, matrices = _arrays(dy, w)
    return blocked.rows_by_matrices(rows, matrices, group_sizes, alignment, dtype, contract=2)


def grouped_matmul_dw(
    x: Array | Quantized,
    dy: Array | Quantized,
    group_sizes: Array,
    *,
    alignment: int = 1,
    implementation: str | None = None,
) -> Array:
    """Gradient for the matrices: x `[M, K]`, dy `[M, N]` -> `x[rows of g].T @ dy[rows of g]`, `[G, K, N]`.

    float32 or wider; exactly zero for an empty group. Quantised, both have tiles of 128×1 (128×128 or one scale for
    comparisons) and `alignment` is a multiple of 128, lest a tile straddle groups; a padding row shares its scales with
    the rows before it, so zeros belong there when they are quantised. Implementations are those of `grouped_matmul`.

    Raises:
      ValueError: as `grouped_matmul`, and if a tile could straddle groups.
    """
    fits = len(x.shape) == len(dy.shape) == 2 and x.shape[0] == dy.shape[0] and len(group_sizes.shape) == 1
    _require_shapes(fits, "grouped_matmul_dw", "x [M, K], dy [M, N]", x, dy, group_sizes)
    _check("grouped_matmul_dw", {"x": (x, _COLUMN_TILES), "dy": (dy, _COLUMN_TILES)}, alignment)
    for q in (x, dy):
        if isinstance(q, Quantized) and q.tile is not None and alignment % q.tile[0]:
            raise ValueError(
                f"grouped_matmul_dw: tiles of {q.tile[0]} rows could straddle groups that start at multiples of "
                f"{alignment}; start them at multiples of {q.tile[0]} and say so by `alignment`"
            )
    name = _choose("grouped_matmul_dw", implementation, x, dy, jnp.dtype(jnp.float32))
    if name == "reference":
        return reference.rows_by_rows(x, dy, group_sizes, alignment)
    if name == "mosaic_gpu":
        return mosaic_gpu.rows_by_rows(x, dy, group_sizes, alignment)
    inputs, gradients = _arrays(x, dy)
    return blocked.rows_by_rows(inputs, gradients, group_sizes, alignment)


def _require_shapes(fits, op, wanted, first, second, group_sizes):
    if not fits:
        shapes = f"{first.shape}, {second.shape} and {group_sizes.shape}"
        raise ValueError(f"{op} needs {wanted} and group_sizes [G], not {shapes}")


def _check(op, operands, alignment):
    """Raises ValueError for a bad alignment, and for quantised operands, `{name: (operand, tiles allowed)}`."""
    if alignment < 1:
        raise ValueError(f"{op}: alignment must be at least 1, not {alignment}")
    if any(isinstance(operand, Quantized) for operand, _ in operands.values()):
        check_operands(op, *(operand for operand, _ in operands.values()))
        for name, (operand, tiles) in operands.items():
            check_tile(op, name, operand, tiles)


def _choose(op, implementation, x, other, out_dtype, rests_on=()):
    obstacles = {"mosaic_gpu": mosaic_gpu.supported(x, other, out_dtype), "blocked": None, "reference": None}
    return choose(op, implementation, obstacles, rests_on=rests_on)


def _arrays(*operands):
    return tuple(operand.dequantize() if isinstance(operand, Quantized) else operand for operand in operands)


def _out_dtype(op, x, out_dtype):
    if not isinstance(x, Quantized):
        return x.dtype if out_dtype is None else jnp.dtype(out_dtype)
    dtype = jnp.dtype(jnp.bfloat16 if out_dtype is None else out_dtype)
    check_out_dtype(op, dtype)
    return dtype
