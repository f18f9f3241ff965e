"""What the Hopper matmuls of this package share: one producer and some consumers around a ring in shared memory.

One block of threads runs on each SM and stays there (a persistent grid). Its last warpgroup, the producer, fills the
stages of a ring by TMA; the others, the consumers, multiply 64 rows of a tile each, and write them out by TMA:

    producer      wait empty[stage] ──► load a step of a and b ──► full[stage]
    consumer w    wait full[stage]  ──► multiply rows 64 w : 64 w + 64 ──► empty[stage]
                  after a tile's last step ──► result in shared memory ──► TMA ──► out

The ring never drains between tiles: while consumers write one out, the producer already loads the next.

**Groups.** What a tile is the product of is a visit, or several of them:

- Without groups there is one visit, and it takes all of K.
- Groups of rows, each with a matrix of its own: a tile is visited once for every group that has rows in it. A visit
  multiplies the tile by the group's matrix and keeps the group's rows; a consumer without any lets the others go on.
  So a tile starts at a multiple of its height, wherever groups do; it is written once, whole, with zeros where no group
  is; nothing of one group can reach another's rows. (A tile cannot start where a group does: tiles of shared memory
  have 8 rows, and Mosaic refuses a first row whose divisibility by 8 it does not see.)
  G groups cost up to G - 1 visits more than there are tiles, and none where they start at multiples of the height.
  A tile with many small groups takes as much longer as it has groups, and its SM may be the last to end.
- Groups along K, each with a result of its own: one visit for each tile of each result, over the group's part of K.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels.block_scaled_matmul.config import ROWS, Groups, TileConfig

REGISTERS = {2: (40, 232), 3: (32, 160)}
"""By the number of consumers: registers of a thread of the producer and of a consumer; 512 for all warpgroups."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile of the result. All int32."""

    matrix: Any
    """Which result, where groups cut K; else 0."""
    row: Any
    """Counted in tiles, as is the column."""
    column: Any


@dataclasses.dataclass(frozen=True)
class Visit:
    """A product that gives a tile, or some of its rows."""

    matrix: Any
    """Which of b's matrices: int32, 0 where there is one."""
    first: Any
    """Where along K its first step starts: int32, or 0."""
    steps: Any
    """How many steps there are: int32, or an int where the compiler knows it."""
    begin: Any = None
    """The first row, along K if groups cut K, that belongs to the group: int32; None without groups."""
    end: Any = None
    """Where they end."""


class Whole:
    """A product without groups, of `steps` steps along K."""

    matrices = 1

    def __init__(self, steps: int):
        self.steps = steps

    def visits(self, tile: Tile) -> None:
        """A tile has one visit."""

    def visit(self, tile: Tile, index: Any) -> Visit:
        """A visit of a tile."""
        return Visit(np.int32(0), np.int32(0), self.steps)


class ByRows:
    """Groups of rows, each with its matrix of `steps` steps along K.

    Attributes:
      spans: `[row tiles, 2]` int32 in global memory: which visits a row of tiles has, from and up to.
      groups: `[visits, 3]` int32: of every group that has rows its index, its first row and its end.
    """

    matrices = 1

    def __init__(self, steps: int, spans: Any, groups: Any):
        self.steps, self.spans, self.groups = steps, spans, groups

    def visits(self, tile: Tile) -> tuple[Array, Array]:
        """The first and the end of the visits of a tile."""
        return self.spans[tile.row, 0], self.spans[tile.row, 1]

    def visit(self, tile: Tile, index: Any) -> Visit:
        """A visit of a tile."""
        group, begin, end = (self.groups[index, i] for i in range(3))
        return Visit(group, np.int32(0), self.steps, begin, end)


class AlongDepth:
    """Groups along K, each with a result of its own, in steps of `step`.

    Attributes:
      groups: `[G, 2]` int32 in global memory: where along K each group begins and ends.
    """

    def __init__(self, step: int, groups: Any):
        self.step, self.groups, self.matrices = step, groups, groups.shape[0]

    def visits(self, tile: Tile) -> None:
        """A tile has one visit."""

    def visit(self, tile: Tile, index: Any) -> Visit:
        """A visit of a tile: its first step starts at a multiple of 8, as TMA's copies do."""
        begin, end = self.groups[tile.matrix, 0], self.groups[tile.matrix, 1]
        first = lax.div(begin, np.int32(8)) * np.int32(8)  # In this form, since Mosaic looks for the factor.
        steps = lax.div(end - first + (self.step - 1), np.int32(self.step))
        return Visit(np.int32(0), first, lax.select(end > begin, steps, np.int32(0)), begin, end)


def kind_of(groups: Groups | None, steps: int, step: int, tables: Sequence[Any]) -> Whole | ByRows | AlongDepth:
    """What groups there are of a product of `steps` steps of `step` along K, with the tables of them."""
    if groups is None:
        return Whole(steps)
    return ByRows(steps, *tables) if groups.along == "rows" else AlongDepth(step, *tables)


def tile_at(index: Array, m_tiles: int, n_tiles: int, swath: int) -> tuple[Array, Array]:
    """(row, column) of the index-th tile of `m_tiles` x `n_tiles`, all int32: down each column of a swath of rows."""
    group = lax.div(index, np.int32(swath * n_tiles))
    within = index - group * (swath * n_tiles)
    height = lax.min(m_tiles - group * swath, np.int32(swath))
    return group * swath + lax.rem(within, height), lax.div(within, height)


@dataclasses.dataclass(frozen=True)
class Work:
    """What the warpgroups of a block agree on."""

    config: TileConfig
    kind: Whole | ByRows | AlongDepth
    tiles: Any
    """How many tiles this block makes."""
    tile: Callable[[Any], Tile]
    """i -> the block's i-th tile."""

    def after(self, stage: Any) -> Any:
        """The stage that follows: a counter rather than a remainder, which costs registers."""
        return lax.select(stage == self.config.stages - 1, np.int32(0), stage + 1)


def work_of(config: TileConfig, kind: Whole | ByRows | AlongDepth, m: int, n: int) -> Work:
    """The work of this block of the grid "sms" for a result `[m, n]`, or as many as there are groups along K."""
    this, count = lax.axis_index("sms"), lax.axis_size("sms")
    m_tiles, n_tiles = -(-m // config.tile_m), -(-n // (config.tile_n * config.cluster))
    each = m_tiles * n_tiles

    def tile(i):
        index = this + i * count
        matrix = lax.div(index, np.int32(each)) if kind.matrices > 1 else np.int32(0)
        row, column = tile_at(index - matrix * each, m_tiles, n_tiles, config.swath)
        if config.cluster > 1:
            column = column * config.cluster + lax.axis_index("cluster")
        return Tile(matrix, row, column)

    mine = lax.div(kind.matrices * each - this + count - 1, np.int32(count))  # this, this + count, this + 2 count, …
    return Work(config, kind, mine, tile)


def run(work: Work, load: Callable, multiply: Callable, ring: dict[str, Any], out: Any) -> None:
    """What every warpgroup of every block does: the last one loads, the others multiply.

    Args:
      work: What there is to do.
      load: (tile, visit, step, stage): starts the copies of a step that end at `ring["full"]`.
      multiply: (visit, stage, warpgroup) -> the stage after it, and 64 rows of its product, `[64, tile_n]` float32;
        it waits for `full` and arrives at `empty`.
      ring: Shared memory: barriers `full` and `empty`, `result` `[consumers, 64, tile_n]`.
      out: The result, `[M, N]`, or `[G, M, N]` with groups along K.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    warpgroup, consumers = lax.axis_index("warpgroup"), work.config.consumers
    for_producer, for_consumer = REGISTERS[consumers]

    @pl.when(warpgroup == consumers)
    def _():
        plgpu.set_max_registers(for_producer, action="decrease")
        _produce(work, load, ring["empty"])

    @pl.when(warpgroup != consumers)
    def _():
        plgpu.set_max_registers(for_consumer, action="increase")
        _consume(work, multiply, warpgroup, ring, out)


def _produce(work, load, empty):
    """Fills one stage after another, each when all consumers are done with what it held."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def load_tile(i, stage):
        tile = work.tile(i)

        def load_visit(index, stage):
            visit = work.kind.visit(tile, index)

            def load_step(k, stage):
                plgpu.barrier_wait(empty.at[stage])
                load(tile, visit, k, stage)
                return work.after(stage)

            return lax.fori_loop(np.int32(0), _int32(visit.steps), load_step, stage)

        return _for_each(work.kind.visits(tile), load_visit, stage)

    last = lax.fori_loop(np.int32(0), work.tiles, load_tile, np.int32(0))

    def wait(_, stage):
        plgpu.barrier_wait(empty.at[stage])
        return work.after(stage)

    # Every arrival is waited for, that of the last steps too: the other block of a cluster may not have ended before.
    lax.fori_loop(np.int32(0), np.int32(work.config.stages), wait, last)


def _consume(work, multiply, warpgroup, ring, out):
    """Multiplies 64 rows of each tile, visit by visit, and writes them out."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    config = work.config
    result = ring["result"].at[warpgroup]
    for stage in range(config.stages):  # They are empty at first.
        plgpu.barrier_arrive(ring["empty"].at[stage])

    def make_tile(i, stage):
        tile = work.tile(i)
        first_row = tile.row * config.tile_m + warpgroup * ROWS

        def keep_rows(index, stage):
            visit = work.kind.visit(tile, index)

            def multiply_and_keep(stage):
                stage, total = multiply(visit, stage, warpgroup)
                group = work.kind.visit(tile, index)  # Read once more, rather than kept in registers meanwhile.
                row = lax.broadcasted_iota(jnp.int32, total.shape, 0) + first_row
                mine = (row >= group.begin) & (row < group.end)
                result[...] = jnp.where(mine, total.astype(out.dtype), result[...])
                return stage

            some = (visit.begin < first_row + ROWS) & (visit.end > first_row)
            return lax.cond(some, multiply_and_keep, functools.partial(_skip, work, visit, ring), stage)

        def wait_for_the_last():  # It has been read, and may be overwritten.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        if isinstance(work.kind, ByRows):
            wait_for_the_last()
            result[...] = jnp.zeros(result.shape, out.dtype)
            stage = _for_each(work.kind.visits(tile), keep_rows, stage)
        else:
            stage, total = multiply(work.kind.visit(tile, 0), stage, warpgroup)
            wait_for_the_last()
            result[...] = total.astype(out.dtype)
        plgpu.commit_smem()
        where = pl.ds(first_row, ROWS), pl.ds(tile.column * config.tile_n, config.tile_n)
        plgpu.copy_smem_to_gmem(result, out.at[where if len(out.shape) == 2 else (tile.matrix, *where)])
        return stage

    lax.fori_loop(np.int32(0), work.tiles, make_tile, np.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _skip(work, visit, ring, stage):
    """Passes over a visit in which a warpgroup has no rows: the tensor cores are the others' meanwhile."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def step(_, stage):
        plgpu.barrier_wait(ring["full"].at[stage])
        plgpu.barrier_arrive(ring["empty"].at[stage])
        return work.after(stage)

    # From 0, in words that hide the number of turns from the compiler: unrolled, the loop would spill registers.
    start = lax.min(visit.begin, np.int32(0))
    return lax.fori_loop(start, _int32(visit.steps), step, stage)


def _for_each(span, body, carry):
    """The loop over visits from and up to `span`; None is one visit."""
    if span is None:
        return body(np.int32(0), carry)
    first, end = span
    # A sum, which jax does not take to vary over a mesh around the kernel, as it does what is read from an array: the
    # loop's counter may not change between the two.
    first = first + np.int32(0)
    return lax.fori_loop(first, end, body, carry)


def _int32(value):
    return np.int32(value) if isinstance(value, int) else value
