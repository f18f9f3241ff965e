"""Grouped matmul: rows sorted by group, one matrix per group; the cost follows the rows, not the number of groups.

Shape letters: M rows, G groups, K and N the two widths of a matrix. Group g holds the rows `[start_g, start_g +
size_g)`; the starts are the sizes rounded up to `alignment` and summed. Rows outside every group, between groups or
after the last, are padding: they give zero rows and zero gradients whatever they hold.

The blocked implementation walks the groups and, inside each, as many tiles of rows as the group really has (a loop
with a dynamic bound is fine here, because the derivative is written by hand); what is left of a group after its last
whole tile goes in quarter tiles. The last of these hangs over into the neighbour; the rows that are not the group's are
left as they were, so any alignment works, nothing is padded or gathered, and a group costs less than a quarter tile
more than its rows.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from deepseek_jax.ops.implementation import accumulator, choose

_MAX_TILE = 128
_MIN_TILE = 8
_QUARTERS = 4


def preferred_alignment() -> int:
    """Rows at whose multiples a dispatcher should start groups, for `grouped_matmul` to be fastest here.

    The blocked implementation gains nothing from padding, and every gather and activation around it would pay for it.
    """
    return 1


def group_starts(group_sizes: Array, alignment: int = 1) -> Array:
    """First row of each group, `[G]` int32: sizes rounded up to `alignment`, then an exclusive sum."""
    rounded = (group_sizes + alignment - 1) // alignment * alignment
    return jnp.cumsum(rounded) - rounded


def grouped_matmul(
    x: Array, w: Array, group_sizes: Array, *, alignment: int = 1, implementation: str | None = None
) -> Array:
    """Multiplies each group of rows by the group's own matrix: `y[rows of g] = x[rows of g] @ w[g]`.

    Args:
      x: Rows sorted by group, `[M, K]`, any float dtype.
      w: Matrices, `[G, K, N]`.
      group_sizes: Rows of each group, `[G]` int32; the groups, each rounded up to `alignment`, must fit in M.
      alignment: Groups start at multiples of this many rows; 1 means that they are contiguous.
      implementation: "reference" (dense in G: an oracle for small sizes), "blocked" (portable), or None for the best
        that is supported here.

    Returns:
      `[M, N]` of x's dtype, accumulated in float32 or wider; zero in padding rows. An empty group's matrix gets an
      exactly zero gradient.

    Raises:
      ValueError: if shapes or alignment make no sense, or the implementation is unknown or not supported here.
    """
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1] or group_sizes.shape != w.shape[:1]:
        raise ValueError(
            "grouped_matmul needs x [M, K], w [G, K, N] and group_sizes [G], "
            f"not {x.shape}, {w.shape} and {group_sizes.shape}"
        )
    _check_alignment(alignment)
    if choose("grouped_matmul", implementation, {"blocked": None, "reference": None}) == "reference":
        return _reference(x, w, group_sizes, alignment)
    return _blocked(x, w, group_sizes, alignment)


def grouped_matmul_dx(dy: Array, w: Array, group_sizes: Array, *, alignment: int = 1) -> Array:
    """Gradient for the rows: dy `[M, N]`, w `[G, K, N]` -> `dy[rows of g] @ w[g].T`, `[M, K]` of dy's dtype."""
    _check_alignment(alignment)
    return _tiled_rows(dy, w, group_sizes, alignment, contract=2)


def grouped_matmul_dw(x: Array, dy: Array, group_sizes: Array, *, alignment: int = 1) -> Array:
    """Gradient for the matrices: x `[M, K]`, dy `[M, N]` -> `x[rows of g].T @ dy[rows of g]`, `[G, K, N]`.

    float32 or wider; exactly zero for an empty group.
    """
    _check_alignment(alignment)
    acc = accumulator(x, dy)
    tile = tile_rows(x.shape[0], group_sizes.shape[0])
    quarter = quarter_rows(tile)

    def group(_, inputs):
        start, size = inputs
        whole, quarters = tile_counts(size, tile)

        def product(length, t):
            first, mine = _tile(start + t * tile, start + size, length, x.shape[0])
            xt = jnp.where(mine, lax.dynamic_slice_in_dim(x, first, length), 0)
            dyt = jnp.where(mine, lax.dynamic_slice_in_dim(dy, first, length), 0)
            # XLA's CPU backend is slow where the first operand is transposed; the barrier makes it a plain product.
            return jnp.dot(lax.optimization_barrier(xt.T), dyt, preferred_element_type=acc)

        # With few rows per group, adding matrices would cost more than multiplying, so all quarters are one product,
        # and the sum starts with it.
        nothing = functools.partial(jnp.zeros_like, x, acc, (x.shape[1], dy.shape[1]))
        lengths = [min(count * quarter, tile) for count in range(1, _QUARTERS + 1)]
        rest = lax.switch(quarters, [nothing, *(functools.partial(product, length, whole) for length in lengths)])
        return None, lax.fori_loop(0, whole, lambda t, dw: dw + product(tile, t), rest)

    return lax.scan(group, None, (group_starts(group_sizes, alignment), group_sizes))[1]


def tile_rows(rows: int, groups: int) -> int:
    """Rows per tile: about half of an even group, so that the last tile of each wastes little; at most 128."""
    tile = _MAX_TILE
    while tile > _MIN_TILE and tile * 2 * groups > rows:
        tile //= 2
    return min(tile, rows)


def quarter_rows(tile: int) -> int:
    """Rows of a quarter tile."""
    return -(-tile // _QUARTERS)


def tile_counts(size: Array, tile: int) -> tuple[Array, Array]:
    """Whole tiles and quarter tiles that a group of `size` rows costs; an empty group costs none."""
    quarter = quarter_rows(tile)
    return size // tile, (size % tile + quarter - 1) // quarter


def _check_alignment(alignment):
    if alignment < 1:
        raise ValueError(f"grouped_matmul: alignment must be at least 1, not {alignment}")


def _reference(x, w, group_sizes, alignment):
    """What grouped_matmul means: every group's matrix on every row, masked."""
    acc = accumulator(x, w)
    rows = jnp.arange(x.shape[0])
    start = group_starts(group_sizes, alignment)[:, None]
    mine = (rows >= start) & (rows < start + group_sizes[:, None])
    inputs = jnp.where(mine[:, :, None], x.astype(acc), 0)
    return jnp.einsum("gmk,gkn->mn", inputs, w.astype(acc)).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocked(x, w, group_sizes, alignment):
    return _tiled_rows(x, w, group_sizes, alignment, contract=1)


def _blocked_forward(x, w, group_sizes, alignment):
    return _blocked(x, w, group_sizes, alignment), (x, w, group_sizes)


def _blocked_backward(alignment, residuals, dy):
    x, w, group_sizes = residuals
    dx = grouped_matmul_dx(dy, w, group_sizes, alignment=alignment)
    dw = grouped_matmul_dw(x, dy, group_sizes, alignment=alignment)
    return dx.astype(x.dtype), dw.astype(w.dtype), None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _tile(wanted, end, length, rows):
    """First row of a tile of `length` rows, and which lie in `[wanted, end)`: int32 and bool `[length, 1]`."""
    first = jnp.minimum(wanted, rows - length)  # a tile that would pass the end starts earlier, on rows it leaves alone
    row = first + jnp.arange(length)
    return first, ((row >= wanted) & (row < end))[:, None]


def _tiled_rows(x, w, group_sizes, alignment, contract):
    """Every group's rows times its matrix, over axis `contract` of w `[G, K, N]`: `[M, N]` for 1, `[M, K]` for 2."""
    acc = accumulator(x, w)
    rows = x.shape[0]
    tile = tile_rows(rows, w.shape[0])

    def group(out, inputs):
        start, size, matrix = inputs
        whole, quarters = tile_counts(size, tile)

        def put(length, begin, t, out):
            first, mine = _tile(begin + t * length, start + size, length, rows)
            xt = lax.dynamic_slice_in_dim(x, first, length)
            dimensions = (((1,), (contract - 1,)), ((), ()))
            y = lax.dot_general(xt, matrix, dimensions, preferred_element_type=acc).astype(out.dtype)
            y = jnp.where(mine, y, lax.dynamic_slice_in_dim(out, first, length))
            return lax.dynamic_update_slice_in_dim(out, y, first, 0)

        out = lax.fori_loop(0, whole, functools.partial(put, tile, start), out)
        put_quarter = functools.partial(put, quarter_rows(tile), start + whole * tile)
        return lax.fori_loop(0, quarters, put_quarter, out), None

    out = jnp.zeros_like(x, shape=(rows, w.shape[3 - contract]))
    return lax.scan(group, out, (group_starts(group_sizes, alignment), group_sizes, w))[0]
