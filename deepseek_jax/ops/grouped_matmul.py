"""Grouped matmul: rows sorted by group, each group with its own matrix; the cost follows the rows, not the groups.

Shape letters: M rows, G groups, K and N the two widths of a matrix.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.ops.implementation import accumulator, choose

_TILE = 128


def preferred_alignment():
    """Rows at whose multiples a dispatcher should start groups, for `grouped_matmul` to be fastest here."""
    return _TILE


def group_starts(group_sizes, alignment=1):
    """First row of each group, `[G]` int32: sizes rounded up to `alignment`, summed exclusively."""
    rounded = (group_sizes + alignment - 1) // alignment * alignment
    return jnp.cumsum(rounded) - rounded


def grouped_matmul(x, w, group_sizes, *, alignment=1, implementation=None):
    """`y[rows of group g] = x[rows of group g] @ w[g]`."""
    obstacles = {"blocked": None, "reference": None}
    name = choose("grouped_matmul", implementation, obstacles)
    if name == "reference":
        return _reference(x, w, group_sizes, alignment)
    return _blocked(x, w, group_sizes, alignment)


def _reference(x, w, group_sizes, alignment):
    acc = accumulator(x, w)
    rows = jnp.arange(x.shape[0])
    start = group_starts(group_sizes, alignment)
    inside = (rows[None] >= start[:, None]) & (rows[None] < (start + group_sizes)[:, None])
    return jnp.einsum("gm,mk,gkn->mn", inside.astype(acc), x.astype(acc), w.astype(acc)).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocked(x, w, group_sizes, alignment):
    return _by_rows(x, w, group_sizes, alignment, transpose=False)


def _blocked_forward(x, w, group_sizes, alignment):
    return _by_rows(x, w, group_sizes, alignment, transpose=False), (x, w, group_sizes)


def _blocked_backward(alignment, residuals, dy):
    x, w, group_sizes = residuals
    return (
        grouped_matmul_dx(dy, w, group_sizes, alignment=alignment).astype(x.dtype),
        grouped_matmul_dw(x, dy, group_sizes, alignment=alignment).astype(w.dtype),
        None,
    )


_blocked.defvjp(_blocked_forward, _blocked_backward)


def grouped_matmul_dx(dy, w, group_sizes, *, alignment=1):
    """Gradient for the rows, `[M, K]`: `dy[rows of g] @ w[g].T`."""
    return _by_rows(dy, w, group_sizes, alignment, transpose=True)


def grouped_matmul_dw(x, dy, group_sizes, *, alignment=1):
    """Gradient for the matrices, `[G, K, N]`: `x[rows of g].T @ dy[rows of g]`, zero for an empty group."""
    rows = x.shape[0]
    acc = accumulator(x, dy)
    x, dy = _pad(x), _pad(dy)
    start = group_starts(group_sizes, alignment)

    def group(_, inputs):
        start, size = inputs

        def tile(t, dw):
            first = start + t * _TILE
            keep = (jnp.arange(_TILE) < size - t * _TILE)[:, None]
            xt = jnp.where(keep, lax.dynamic_slice_in_dim(x, first, _TILE), 0)
            dyt = jnp.where(keep, lax.dynamic_slice_in_dim(dy, first, _TILE), 0)
            return dw + lax.dot_general(xt, dyt, (((0,), (0,)), ((), ())), preferred_element_type=acc)

        zero = jnp.zeros_like(x, acc, shape=(x.shape[1], dy.shape[1])) + jnp.zeros_like(start, acc)
        return None, lax.fori_loop(0, (size + _TILE - 1) // _TILE, tile, zero)

    del rows
    return lax.scan(group, None, (start, group_sizes))[1]


def _pad(x):
    return jnp.pad(x, ((0, _TILE), (0, 0)))


def _by_rows(x, w, group_sizes, alignment, transpose):
    """`[M, K] x [G, K, N] -> [M, N]`, or with `transpose` `[M, N] x [G, K, N] -> [M, K]`."""
    rows = x.shape[0]
    acc = accumulator(x, w)
    x = _pad(x)
    start = group_starts(group_sizes, alignment)
    contract = 1 if transpose else 0
    out = jnp.zeros_like(x, shape=(x.shape[0], w.shape[2 - contract])) + jnp.zeros_like(w, x.dtype, shape=())

    def group(out, inputs):
        start, size, wg = inputs

        def tile(t, out):
            first = start + t * _TILE
            keep = (jnp.arange(_TILE) < size - t * _TILE)[:, None]
            xt = jnp.where(keep, lax.dynamic_slice_in_dim(x, first, _TILE), 0)
            y = lax.dot_general(xt, wg, (((1,), (contract,)), ((), ())), preferred_element_type=acc)
            return lax.dynamic_update_slice_in_dim(out, y.astype(out.dtype), first, 0)

        return lax.fori_loop(0, (size + _TILE - 1) // _TILE, tile, out), None

    return lax.scan(group, out, (start, group_sizes, w))[0][:rows]
