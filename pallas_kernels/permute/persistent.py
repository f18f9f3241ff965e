"""Persistent kernels of `permute`: items of work, and the loop in which a block of threads takes one after another."""

from __future__ import annotations

import dataclasses

import numpy as np
from jax import lax

from pallas_kernels.implementation import in_mesh
from pallas_kernels.permute.config import PermuteConfig


@dataclasses.dataclass(frozen=True)
class Items:
    """What the blocks of threads take in turns: some rows of a chunk; chunk after chunk."""

    config: PermuteConfig
    rows: int
    """Rows or tokens, a multiple of `config.rows`."""
    lines: int
    """Of a row."""

    @property
    def groups(self):
        """Items of a chunk."""
        return self.rows // self.config.rows

    @property
    def chunks(self):
        """Of a row."""
        return -(-self.lines // self.config.lines)

    def chunk(self, item):
        """The chunk of an item."""
        return lax.div(item, np.int32(self.groups))

    def first(self, item):
        """The first row of an item."""
        return lax.rem(item, np.int32(self.groups)) * self.config.rows

    def rows_of(self, item):
        """The rows of an item."""
        from jax.experimental import pallas as pl

        return pl.ds(self.first(item), self.config.rows)

    def lines_of(self, item):
        """The lines of an item."""
        from jax.experimental import pallas as pl

        return pl.ds(self.chunk(item) * self.config.lines, self.config.lines)

    def store(self, source, out, item):
        """Begins to copy what was made of an item `[rows, lines, 128]` to its place.

        A last chunk that is shorter is cut off here, since Mosaic copies what is contiguous by its length alone, into
        the next row; and row by row, for what TMA takes must be contiguous in shared memory.
        """
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        whole, rest = divmod(self.lines, self.config.lines)
        first, begin = self.first(item), self.chunk(item) * self.config.lines

        def copy():
            plgpu.copy_smem_to_gmem(source, out.at[self.rows_of(item), self.lines_of(item)])

        def copy_rest():
            for row in range(self.config.rows):
                there = out.at[first + row, pl.ds(begin, rest)]
                last = row == self.config.rows - 1
                plgpu.copy_smem_to_gmem(source.at[row, pl.ds(0, rest)], there, commit_group=last)

        if not rest:
            copy()
        elif not whole:
            copy_rest()
        else:
            pl.when(self.chunk(item) < whole)(copy)
            pl.when(self.chunk(item) == whole)(copy_rest)

    def entries(self, table, item):
        """What a table `[rows]` has for each row of an item, scalars."""
        return tuple(table[self.first(item) + row] for row in range(self.config.rows))


def run_items(items, load, turn, ahead, now, stores):
    """What a block of threads does: it loads `stages` items ahead, and takes one after another.

    Args:
      items: All there are; of these this block takes one out of as many as there are blocks.
      load: (item, stage, entries) begins to fill a stage.
      turn: (item, stage, odd, entries) waits until it is full, and does the work; odd is 1 every other time.
      ahead: Of an item, the entries that `load` wants.
      now: Of an item, those that `turn` wants.
      stores: How many turns later what is in a stage has been read: 0, or 1 where the turn only begins to store it.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    stages, this, count = items.config.stages, lax.axis_index("block"), lax.axis_size("block")
    mine = lax.div(items.groups * items.chunks - this + count - 1, np.int32(count))

    def item(i):  # Of what is beyond the last one, entries are read and not used.
        return this + lax.min(i, mine - 1) * count

    for stage in range(stages):

        @pl.when(stage < mine)
        def _(stage=stage):
            load(item(np.int32(stage)), stage, ahead(item(np.int32(stage))))

    def one(i, carry):
        stage, for_load, for_turn = carry
        turn(item(i), stage, lax.rem(i, np.int32(2)), for_turn)
        for_turn = now(item(i + 1))
        read = i - stores
        free = lax.select(stage < stores, stage + np.int32(stages - stores), stage - np.int32(stores))

        @pl.when((read >= 0) & (read + stages < mine))
        def _():
            if stores:
                plgpu.wait_smem_to_gmem(stores, wait_read_only=True)
            load(item(read + stages), free, for_load)

        for_load = ahead(item(read + stages + 1))
        return lax.select(stage == stages - 1, np.int32(0), stage + 1), for_load, for_turn

    first = ahead(item(np.int32(stages - stores))), now(item(np.int32(0)))
    lax.fori_loop(np.int32(0), mine, one, (np.int32(0), *first))
    plgpu.wait_smem_to_gmem(0)


def persistent_kernel(body, out, scratch, items, sms, interpret):
    """The kernel: blocks of one warpgroup, no more than there are items."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return in_mesh(
        plgpu.kernel(
            body,
            out_type=out,
            scratch_types=scratch,
            grid=(min(items.groups * items.chunks, sms * items.config.blocks),),
            grid_names=("block",),
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
            interpret=interpret,
        )
    )
