"""Which rows of a batch a process reads, and how they reach its devices.

The rows are split over `BATCH_AXES` into as many *shards* as there are devices along these axes. Processes whose
devices have the same shards, as those of different pipeline stages do, read the same rows: together they are a reader.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from deepseek_jax.config import require
from deepseek_jax.parallel.sharding import BATCH_SPEC
from deepseek_jax.wording import first_few


@dataclasses.dataclass(frozen=True)
class Reader:
    """What one process reads of every batch."""

    index: int
    """Its place among the readers of a run, from 0."""
    count: int
    """Readers of the run, of equal shares."""
    shards: tuple[int, ...]
    """Of a batch, those whose rows it reads: the first of its rows are those of the first of these."""
    first: bool
    """Whether no process before this one reads the same rows."""

    mesh: Mesh

    def place(self, rows: np.ndarray) -> jax.Array:
        """The whole batch `[count * n, ...]` on its devices; this reader brings rows `[n, ...]`."""
        size = rows.shape[0] // len(self.shards)

        def of_device(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # None would be a device without any rows
            start = self.shards.index((index[0].start or 0) // size) * size
            return rows[start : start + size]

        shape = (self.count * rows.shape[0], *rows.shape[1:])
        return jax.make_array_from_callback(shape, NamedSharding(self.mesh, BATCH_SPEC), of_device)


def reader_of(mesh: Mesh, process: int | None = None) -> Reader:
    """What a process reads; by default this one.

    Args:
      mesh: of the four axes, over the devices of all processes.
      process: its number.

    Raises:
      ConfigError: two processes have some shards in common and others not, or one has more than another.
    """
    process = jax.process_index() if process is None else process
    shards: dict[int, set[int]] = {}
    for stage in mesh.devices:
        for shard, device in enumerate(stage.flat):
            shards.setdefault(device.process_index, set()).add(shard)
    readers = sorted({tuple(sorted(of)) for of in shards.values()})
    spans = first_few(map(_span, readers))
    total, biggest = mesh.devices[0].size, max(map(len, readers))
    require(
        sum(map(len, readers)) == total and all(len(of) == biggest for of in readers),
        f"processes cannot share the rows of a batch: of its {total} parts they have {spans}, and two must have the "
        "same parts or none in common, and as many: let parallel.data x node x expert be a multiple or a divisor of "
        "each process's devices",
    )
    mine = tuple(sorted(shards[process]))
    first = process == min(other for other, of in shards.items() if of == set(mine))
    return Reader(readers.index(mine), len(readers), mine, first, mesh)


def _span(shards: tuple[int, ...]) -> str:
    """`0-3`, or `0,1,4`."""
    together = shards == tuple(range(shards[0], shards[-1] + 1)) and len(shards) > 1
    return f"{shards[0]}-{shards[-1]}" if together else ",".join(map(str, shards))
