"""Grouped matmuls on any device, at a cost that follows the rows.

It walks the groups and, inside each, as many tiles of rows as the group really has (a loop with a dynamic bound is fine
here, because the derivative is written by hand); what is left of a group after its last whole tile goes in quarter
tiles. The last of these hangs over into the neighbour; the rows that are not the group's are left as they were, so any
alignment works, nothing is padded or gathered, and a group costs less than a quarter tile more than its rows.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.grouped_matmul.groups import group_starts
from pallas_kernels.implementation import accumulator

_MAX_TILE = 128
_MIN_TILE = 8
_QUARTERS = 4


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


def rows_by_matrices(
    x: Array, w: Array, group_sizes: Array, alignment: int, out_dtype: jnp.dtype, contract: int = 1
) -> Array:
    """Every group's rows times its matrix, over axis `contract` of w `[G, K, N]`: `[M, N]` for 1, `[M, K]` for 2."""
    acc = accumulator(x, w)
    rows = x.shape[0]
    out = jnp.zeros_like(x, out_dtype, (rows, w.shape[3 - contract]))
    if rows == 0:
        return out
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

    return lax.scan(group, out, (group_starts(group_sizes, alignment), group_sizes, w))[0]


def rows_by_rows(x: Array, dy: Array, group_sizes: Array, alignment: int, out_dtype: jnp.dtype | None = None) -> Array:
    """Every group's rows of x `[M, K]`, transposed, times its rows of dy `[M, N]`: `[G, K, N]`.

    It is of `out_dtype`; None for what sums are of, float32 or wider.
    """
    acc = accumulator(x, dy)
    out_dtype = acc if out_dtype is None else out_dtype
    if x.shape[0] == 0:
        return jnp.zeros_like(x, out_dtype, (group_sizes.shape[0], x.shape[1], dy.shape[1]))
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
        return None, lax.fori_loop(0, whole, lambda t, dw: dw + product(tile, t), rest).astype(out_dtype)

    return lax.scan(group, None, (group_starts(group_sizes, alignment), group_sizes))[1]


def _tile(wanted, end, length, rows):
    """First row of a tile of `length` rows, and which lie in `[wanted, end)`: int32 and bool `[length, 1]`."""
    first = jnp.minimum(wanted, rows - length)  # a tile that would pass the end starts earlier, on rows it leaves alone
    row = first + jnp.arange(length)
    return first, ((row >= wanted) & (row < end))[:, None]
