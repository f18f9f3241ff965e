"""How the Hopper kernels of `permute` cut their work, what fits in shared memory, and the choice by size."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

LINE = 128
"""Elements of a row that are the last dimension of what TMA copies."""
COPY_BYTES = 4096
"""The most bytes of a chunk that is only copied, by default."""
SHARED_MEMORY = 232_448
"""Bytes of shared memory that a block of threads may have on sm_90."""
BARRIERS = 1024
"""Bytes of it that are left for barriers and alignment."""


@dataclasses.dataclass(frozen=True)
class PermuteConfig:
    """How the work is cut into items: some rows, a chunk of each.

    Raises:
      ValueError: if a size is below one.
    """

    rows: int
    """Rows of an item; 1 where a token's rows are summed."""
    lines: int
    """Lines of 128 elements of a chunk; multiples of 8 where bfloat16 is computed on, of 4 for float32."""
    stages: int
    """Items that a block of threads has in flight."""
    blocks: int
    """Blocks of threads on an SM."""

    def __post_init__(self):
        if min(dataclasses.astuple(self)) < 1:
            raise ValueError(f"PermuteConfig: every size is at least 1, not {self}")

    def chunk_bytes(self, dtype: jnp.dtype) -> int:
        """Of one row of an item."""
        return self.lines * LINE * dtype.itemsize

    def check(self, op: str, dtype: jnp.dtype, chunks: int, results: int) -> None:
        """Checks that a block's shared memory suffices, and that chunks that are computed on fill all threads.

        Args:
          op: Name of the op, for the error.
          dtype: Of the rows.
          chunks: Chunks in a stage.
          results: Chunks of results that wait to be written; 0 where nothing is computed.

        Raises:
          ValueError: if that is not so; it says what would fit.
        """
        unit = 16 // dtype.itemsize
        if results and self.lines % unit:
            raise ValueError(f"{op}: chunks of {dtype} need lines in multiples of {unit}, not {self.lines}")
        free = SHARED_MEMORY - BARRIERS - results * self.chunk_bytes(dtype)
        stage = chunks * self.chunk_bytes(dtype)
        if self.stages * stage > free:
            raise ValueError(
                f"{op}: {self} needs {self.stages * stage + SHARED_MEMORY - free} bytes of shared memory, and a block "
                f"has {SHARED_MEMORY}: {max(free // stage, 0)} stages would fit"
            )


def gather_config(width: int, dtype: jnp.dtype) -> PermuteConfig:
    """For gathering rows of `width` elements: chunks of up to `COPY_BYTES`, even ones where that is not far less."""
    lines, most = -(-width // LINE), COPY_BYTES // (LINE * dtype.itemsize)
    even = max(n for n in range(1, most + 1) if lines % n == 0)
    return PermuteConfig(rows=4, lines=even if 2 * even > min(most, lines) else most, stages=4, blocks=3)


def combine_config(choices: int, dtype: jnp.dtype) -> PermuteConfig:
    """For summing `choices` rows of a token: 1024 elements of each at a time, about 48 KB in flight in a block."""
    stage = choices * 8 * LINE * dtype.itemsize
    return PermuteConfig(rows=1, lines=8, stages=max(2, min(4, 48 * 1024 // stage)), blocks=4)


def backward_config(dtype: jnp.dtype) -> PermuteConfig:
    """For the backward pass of a weighted sum."""
    return PermuteConfig(rows=8 // dtype.itemsize, lines=8, stages=2, blocks=4)
