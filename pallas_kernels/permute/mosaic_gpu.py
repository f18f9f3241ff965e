"""Gathering and combining rows for Hopper, in Pallas' Mosaic GPU: every row is moved by TMA, once.

    gather_rows            rows[r] = x[index[r]]                                       nothing is computed
    combine_rows           y[t] = Σ_k weights[t, k] · rows[slots[t, k]]                float32 registers
    gather_rows_and_dots   drows[r] = weights[r] · dy[index[r]],  dots[r] = Σ dy[index[r]] · rows[r]

A row is cut into chunks of a few KB. Blocks of threads, several on an SM, stay there (a persistent grid), and each
takes one item after another: a chunk of some rows to be gathered, or of a token to be summed.

    tables ──► registers, for the item after the next
    TMA ──► ring of `stages` in shared memory ──►  (16-byte loads, sums in float32, one tile of results)  ──► TMA

- A row that is not there costs nothing: its index lies beyond the array, where TMA reads zeros and no memory.
- Chunks are the slow index of the items. A token is gathered by as many rows as it has experts, all over the buffer;
  the chunk of all tokens is small enough to stay in the L2 cache (14.7 MB for 4096 of V3), so x is read once.
- Loads run `stages` items ahead. The table's entries are read one item before they are needed, by each thread for
  itself: a load of shared memory or a barrier less.
- So all is moved once: (R + T) · D elements, 528 MB for 4096 tokens of V3 and their 8 experts each.

TMA takes at most 256 elements along a dimension, so an array `[N, D]` is seen as `[N, D / 128, 128]`. D that is no
multiple of 128 is padded first, and results whose rows are no multiple of an item's are cut out of longer ones: copies.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.implementation import not_hopper
from pallas_kernels.permute.config import LINE, PermuteConfig, backward_config, combine_config, gather_config
from pallas_kernels.permute.persistent import Items, persistent_kernel, run_items
from pallas_kernels.permute.tables import past_the_end
from pallas_kernels.target import target

MOST_CHOICES = 16
"""The most rows of a token: each holds two registers, and a stage of shared memory has them all."""
FLOATS = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))
CODES = (jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2))


def supported(x: Any, choices: int = 0) -> str | None:
    """Why the kernels cannot move rows `[N, D]` like x, or sum `choices` of them, where the code runs, or None."""
    return not_hopper() or _unsupported(x, choices)


def _unsupported(x, choices=0) -> str | None:
    if x.dtype not in (FLOATS if choices else FLOATS + CODES):
        return f"it moves rows of bfloat16, float32 or (to gather them) FP8, not {x.dtype}"
    if choices > MOST_CHOICES:
        return f"it sums at most {MOST_CHOICES} rows of a token, not {choices}"
    return None


def _check(op, x, choices=0):
    obstacle = _unsupported(x, choices)
    if obstacle is not None:
        raise ValueError(f"{op}: implementation 'mosaic_gpu' cannot run here: {obstacle}")


def gather_rows(
    x: Array, index: Array, *, config: PermuteConfig | None = None, sms: int | None = None, interpret: Any = None
) -> Array:
    """Rows of x `[T, D]` by index `[R]`, zeros where it names none: `[R, D]`.

    Args:
      x: bfloat16, float32 or FP8 codes.
      index: Integers.
      config: How the work is cut; None for the default of this size.
      sms: SMs of the device; None for those of the one that is there.
      interpret: Pallas' `InterpretGPUParams`, to run on a CPU; None for the GPU.

    Raises:
      ValueError: if x is of another dtype, or the config cannot be had.
    """
    _check("gather_rows", x)
    if 0 in (*x.shape, index.shape[0]):
        return jnp.zeros((index.shape[0], x.shape[1]), x.dtype)
    config = config or gather_config(x.shape[1], x.dtype)
    config.check("gather_rows", x.dtype, chunks=config.rows, results=0)
    return _gather(x, past_the_end(index, x.shape[0]), config, sms or target().sms, interpret)


def combine_rows(
    rows: Array,
    slots: Array,
    weights: Array | None,
    *,
    config: PermuteConfig | None = None,
    sms: int | None = None,
    interpret: Any = None,
) -> Array:
    """The sum over k of rows `[R, D]`, bfloat16 or float32, that slots `[T, K]` name, each times its weight: `[T, D]`.

    `config`, `sms` and `interpret` are those of `gather_rows`.

    Raises:
      ValueError: if rows are of another dtype, K is beyond `MOST_CHOICES`, or the config cannot be had.
    """
    choices = slots.shape[1]
    _check("combine_rows", rows, choices)
    if 0 in (*rows.shape, *slots.shape):
        return jnp.zeros((slots.shape[0], rows.shape[1]), rows.dtype)
    config = config or combine_config(choices, rows.dtype)
    config.check("combine_rows", rows.dtype, chunks=choices, results=2)
    if config.rows != 1:
        raise ValueError(f"combine_rows: an item is one token, so config.rows is 1, not {config.rows}")
    slots = past_the_end(slots, rows.shape[0])
    if weights is not None:  # What is not there is zeros, and times NaN it would not be.
        weights = jnp.where(slots < rows.shape[0], weights, 0).astype(jnp.float32)
    return _combine(rows, slots, weights, config, sms or target().sms, interpret)


def gather_rows_and_dots(
    dy: Array,
    index: Array,
    weights: Array,
    rows: Array,
    *,
    config: PermuteConfig | None = None,
    sms: int | None = None,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """The backward pass of a weighted sum, as `portable.gather_rows_and_dots` has it.

    `config`, `sms` and `interpret` are those of `gather_rows`.

    Raises:
      ValueError: if dy is neither bfloat16 nor float32, or the config cannot be had.
    """
    _check("combine_rows", dy, 1)
    if 0 in (*dy.shape, rows.shape[0]):
        return jnp.zeros(rows.shape, dy.dtype), jnp.zeros(rows.shape[0], jnp.float32)
    config = config or backward_config(dy.dtype)
    config.check("combine_rows", dy.dtype, chunks=2 * config.rows, results=2 * config.rows)
    index = past_the_end(index, dy.shape[0])
    there = index < dy.shape[0]
    weights = jnp.where(there, weights, 0).astype(jnp.float32)
    drows, dots = _gather_and_dot(dy, index, weights, rows, config, sms or target().sms, interpret)
    return drows, jnp.where(there, dots, 0)


# --- the kernels ------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("config", "sms", "interpret"))
def _gather(x, index, config, sms, interpret):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    lined, count = _lined(x), index.shape[0]
    index = _padded(index, config, x.shape[0])
    items = Items(config, index.shape[0], lined.shape[1])
    out = jax.ShapeDtypeStruct((items.rows, *lined.shape[1:]), x.dtype)

    def gather_rows(x, index, out, ring, full):  # What profiles call it.
        def load(item, stage, tokens):
            for row, token in enumerate(tokens):
                plgpu.copy_gmem_to_smem(x.at[token, items.lines_of(item)], ring.at[stage, row], full.at[stage])

        def turn(item, stage, odd, _):
            plgpu.barrier_wait(full.at[stage])
            items.store(ring.at[stage], out, item)

        run_items(items, load, turn, lambda item: items.entries(index, item), lambda item: (), stores=1)

    shared = plgpu.SMEM((config.stages, config.rows, config.lines, LINE), x.dtype)
    barrier = plgpu.Barrier(num_arrivals=config.rows, num_barriers=config.stages)
    rows = persistent_kernel(gather_rows, out, (shared, barrier), items, sms, interpret)(lined, index)
    return _unlined(rows, count, x.shape[1])


@functools.partial(jax.jit, static_argnames=("config", "sms", "interpret"))
def _combine(rows, slots, weights, config, sms, interpret):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    lined, (tokens, choices) = _lined(rows), slots.shape
    items = Items(config, tokens, lined.shape[1])
    out = jax.ShapeDtypeStruct((tokens, *lined.shape[1:]), rows.dtype)
    tables = (slots,) if weights is None else (slots, weights)

    def combine_rows(rows, *refs):  # What profiles call it.
        (slots, *weights), (out, ring, results, full) = refs[: len(tables)], refs[len(tables) :]

        def load(item, stage, chosen):
            for k, row in enumerate(chosen):
                plgpu.copy_gmem_to_smem(rows.at[row, items.lines_of(item)], ring.at[stage, k], full.at[stage])

        def turn(item, stage, odd, weights):
            plgpu.barrier_wait(full.at[stage])
            terms = [_load(ring.at[stage, k], interpret) for k in range(choices)]
            if weights:
                terms = [term * weight for term, weight in zip(terms, weights, strict=True)]
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # The result before the last one has left.
            results[odd, 0] = functools.reduce(lax.add, terms).astype(results.dtype)
            plgpu.commit_smem()
            items.store(results.at[odd], out, item)

        def of_token(tables, item):
            return tuple(table[items.first(item), k] for table in tables for k in range(choices))

        run_items(
            items, load, turn, lambda item: of_token((slots,), item), lambda item: of_token(weights, item), stores=0
        )

    shared = plgpu.SMEM((config.stages, choices, config.lines, LINE), rows.dtype)
    results = plgpu.SMEM((2, 1, config.lines, LINE), rows.dtype)
    barrier = plgpu.Barrier(num_arrivals=choices, num_barriers=config.stages)
    y = persistent_kernel(combine_rows, out, (shared, results, barrier), items, sms, interpret)(lined, *tables)
    return _unlined(y, tokens, rows.shape[1])


@functools.partial(jax.jit, static_argnames=("config", "sms", "interpret"))
def _gather_and_dot(dy, index, weights, rows, config, sms, interpret):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    lined, count = _lined(dy), rows.shape[0]
    index, weights = _padded(index, config, dy.shape[0]), _padded(weights, config, 0)
    items = Items(config, index.shape[0], lined.shape[1])
    out = (
        jax.ShapeDtypeStruct((items.rows, *lined.shape[1:]), dy.dtype),
        jax.ShapeDtypeStruct((items.chunks, items.rows), jnp.float32),
    )

    def gather_rows_and_dots(dy, index, weights, rows, drows, dots, gathered, ring, results, full):
        def load(item, stage, tokens):
            for row, token in enumerate(tokens):
                plgpu.copy_gmem_to_smem(dy.at[token, items.lines_of(item)], gathered.at[stage, row], full.at[stage])
            source = rows.at[items.rows_of(item), items.lines_of(item)]
            plgpu.copy_gmem_to_smem(source, ring.at[stage], full.at[stage])

        def turn(item, stage, odd, weights):
            plgpu.barrier_wait(full.at[stage])
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # The results before the last ones have left.
            for row, weight in enumerate(weights):
                gradient = _load(gathered.at[stage, row], interpret)
                dot = (gradient * _load(ring.at[stage, row], interpret)).sum()
                dots[items.chunk(item), pl.ds(items.first(item) + row, 1)] = lax.broadcast(dot, (1,))
                results[odd, row] = (gradient * weight).astype(results.dtype)
            plgpu.commit_smem()
            items.store(results.at[odd], drows, item)

        run_items(
            items,
            load,
            turn,
            lambda item: items.entries(index, item),
            lambda item: items.entries(weights, item),
            stores=0,
        )

    chunk = (config.rows, config.lines, LINE)
    shared = [plgpu.SMEM((buffers, *chunk), dy.dtype) for buffers in (config.stages, config.stages, 2)]
    barrier = plgpu.Barrier(num_arrivals=config.rows + 1, num_barriers=config.stages)
    kernel = persistent_kernel(gather_rows_and_dots, out, (*shared, barrier), items, sms, interpret)
    drows, dots = kernel(lined, index, weights, _lined(rows))
    return _unlined(drows, count, dy.shape[1]), dots.sum(0)[:count]


def _load(chunk, interpret):
    """A chunk of shared memory in registers, as float32: every thread reads 16 neighbouring bytes at a time."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if interpret is not None:  # It has no layouts.
        return chunk[...].astype(jnp.float32)
    layout = plgpu.Layout.WG_STRIDED(chunk.shape, vec_size=16 // chunk.dtype.itemsize)
    return plgpu.load(chunk, (), layout=layout).astype(jnp.float32)


def _lined(x):
    """x `[N, D]` as `[N, ⌈D / 128⌉, 128]`, padded with zeros."""
    extra = -x.shape[1] % LINE
    return (jnp.pad(x, ((0, 0), (0, extra))) if extra else x).reshape(x.shape[0], -1, LINE)


def _unlined(x, rows, width):
    """The first rows and columns of x `[M, L, 128]`, `[N, D]`."""
    return x.reshape(x.shape[0], -1)[:rows, :width]


def _padded(table, config, fill):
    """A table `[R]`, with `fill` for rows of the last item that are not there."""
    extra = -table.shape[0] % config.rows
    return jnp.pad(table, (0, extra), constant_values=fill) if extra else table
