"""How the Hopper kernel cuts its work: tiles, stages, clusters, what fits in shared memory, and the choice by size."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

BLOCK = 128
"""Along K: what shares its scales, and one step of the kernel."""
ROWS = 64
"""Rows of a consumer warpgroup: those of a wgmma."""
SCALES_READ = 32
"""Scales of b that a step reads, of which it needs the first: TMA writes to multiples of 128 bytes."""
SHARED_MEMORY = 232_448
"""Bytes of shared memory that a block of threads may have on sm_90."""
BARRIERS = 1024
"""Bytes of it that are left for barriers and alignment."""
PARTIAL_SUMS = {2: 128, 3: 64}
"""By the number of consumers: registers of a thread for sums of 128 along K that are not yet scaled."""
MOST_STAGES = 8
"""No more than this many by default: 1024 of K in flight."""
MULTIPLY_ADDS = 4096
"""Of E4M3, per cycle and SM."""
L2_BYTES = 48
"""Per cycle and SM from the L2 cache when all ask at once: our assumption, about 11 TB/s for 132 SMs at 1.75 GHz."""
WAIT_CYCLES = 240
"""Latencies of one turn of a consumer's loop, in which nothing else of its own happens: our assumption."""

ISSUE_CYCLES = 45
"""Of the producer for each of its 4 copies of a step, a barrier among its threads included: our assumption."""


@dataclasses.dataclass(frozen=True)
class MatmulConfig:
    """How the work is cut.

    Raises:
      ValueError: if a size cannot be had. Whether shared memory suffices depends on the result: `check_memory`.
    """

    tile_m: int = 192
    """Rows of a tile: 128 or 192, 64 for each consumer warpgroup."""
    tile_n: int = 128
    """Columns of a tile: 16, 32, 64 or 128, so that it lies in one column of blocks of b's scales."""
    stages: int = 4
    """Steps of 128 along K that the ring in shared memory holds; at least 2."""
    cluster: int = 1
    """Blocks of threads, 1 or 2, that take neighbouring tiles of a row: each reads a part of a for both of them."""
    swath: int = 8
    """Rows of tiles that are worked on together, for the L2 cache."""

    def __post_init__(self):
        allowed = {"tile_m": (128, 192), "tile_n": (16, 32, 64, 128), "cluster": (1, 2)}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                wanted = ", ".join(map(str, values))
                raise ValueError(f"MatmulConfig: {name} must be one of {wanted}, not {getattr(self, name)}")
        if self.stages < 2 or self.swath < 1:
            raise ValueError(
                f"MatmulConfig: stages must be at least 2 and swath at least 1, not {self.stages} and {self.swath}"
            )

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return self.tile_m // ROWS

    @property
    def steps_at_once(self) -> int:
        """Steps that a consumer multiplies before it scales the first of them, up to 4.

        As many as its registers hold partial sums of, and half the ring at most, so that the other half can fill. The
        64 x tile_n sums themselves take half as many registers of a thread as a tile has columns, and so do those of
        each step.
        """
        return max(1, min(4, PARTIAL_SUMS[self.consumers] // (self.tile_n // 2), self.stages // 2))

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a stage: codes of a and b, and their scales."""
        return (self.tile_m + self.tile_n) * BLOCK + 4 * self.tile_m + 4 * SCALES_READ

    def shared_memory(self, out_dtype: jnp.dtype) -> int:
        """Bytes of shared memory: the ring, a tile of the result, and barriers."""
        return self.stages * self.stage_bytes + self._fixed_bytes(out_dtype)

    def most_stages(self, out_dtype: jnp.dtype) -> int:
        """How many stages fit."""
        return (SHARED_MEMORY - self._fixed_bytes(out_dtype)) // self.stage_bytes

    def check_memory(self, out_dtype: jnp.dtype) -> None:
        """Raises ValueError if it does not fit in shared memory, and says what would."""
        needed = self.shared_memory(out_dtype)
        if needed > SHARED_MEMORY:
            raise ValueError(
                f"block_scaled_matmul: {self} needs {needed} bytes of shared memory for a result of "
                f"{jnp.dtype(out_dtype)}, of {SHARED_MEMORY}; {self.most_stages(out_dtype)} stages would fit"
            )

    def _fixed_bytes(self, out_dtype):
        return self.tile_m * self.tile_n * jnp.dtype(out_dtype).itemsize + BARRIERS


def rounds(config: MatmulConfig, m: int, n: int, sms: int) -> int:
    """How many tiles the busiest SM makes of a result `[m, n]`."""
    clusters = -(-m // config.tile_m) * -(-n // (config.tile_n * config.cluster))
    return -(-clusters // (sms // config.cluster))


def step_cycles(config: MatmulConfig, m: int) -> dict[str, float]:
    """Cycles for 128 along K of a tile, of a product with m rows, by what could take that long; the longest counts.

    "multiply": what the SM's tensor cores need. "L2": what reading the stage takes; rows beyond m are multiplied but
    not read, and of a shared a each block reads its part. "consumer": what one warpgroup takes for its own rows, at the
    end of whose turns it scales, one product per lane and cycle, and multiplies nothing. "producer": what asking for
    the copies takes.
    """
    multiply = config.tile_m * config.tile_n * BLOCK / MULTIPLY_ADDS
    rows = min(m, config.tile_m)
    read = rows * (BLOCK / config.cluster + 4) + config.tile_n * BLOCK + 4 * SCALES_READ
    consumer = multiply / config.consumers + (config.tile_n / 2 + WAIT_CYCLES) / config.steps_at_once
    return {"multiply": multiply, "L2": read / L2_BYTES, "consumer": consumer, "producer": 4 * ISSUE_CYCLES}


def default_config(m: int, n: int, out_dtype: jnp.dtype, sms: int) -> MatmulConfig:
    """The config for a result `[m, n]` where none was measured: the fewest cycles by `rounds` and `step_cycles`.

    Among equals the largest tile, without a cluster. Stages are as many as fit, up to `MOST_STAGES`.
    """
    configs = []
    for cluster in (1, 2):
        for tile_m in (192, 128) if m > 128 else (128,):
            for tile_n in (128, 64, 32, 16):
                config = MatmulConfig(tile_m, tile_n, cluster=cluster)
                stages = min(config.most_stages(out_dtype), MOST_STAGES)
                configs.append(dataclasses.replace(config, stages=stages))
    return min(configs, key=lambda config: rounds(config, m, n, sms) * max(step_cycles(config, m).values()))
