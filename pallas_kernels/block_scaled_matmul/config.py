"""How the Hopper kernel cuts its work: tiles, stages, clusters, what fits in shared memory, and the choice by size."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp

from pallas_kernels.device_tables import Matmul, measured_config
from pallas_kernels.quantize.reference import Tile

BLOCK = 128
"""Along K: what shares its scales, and one step of the kernel."""
ROWS = 64
"""Rows of a consumer warpgroup: those of a wgmma."""
LEAST_SCALES = 32
"""Scales of b that a step reads at least: TMA writes to multiples of 128 bytes. Of a block's it needs the first."""
SHARED_MEMORY = 232_448
"""Bytes of shared memory that a block of threads may have on sm_90."""
BARRIERS = 2048
"""Bytes of it that are left for barriers, and for codes and results to start at multiples of 1024 behind scales."""
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
class Groups:
    """What is known of groups when a kernel is compiled."""

    along: Literal["rows", "depth"]
    """Of rows of a, each with a matrix b of its own; or of K, each with a result of its own."""
    count: int
    """How many there are, empty ones too."""
    alignment: int = 1
    """They start at multiples of this."""


def tiles_down(tile_m: int, m: int, groups: Groups | None) -> int:
    """Tiles of a column of results with m rows; visits of them, at most, where groups are of rows."""
    tiles = -(-m // tile_m)
    if groups is None:
        return tiles
    if groups.along == "depth":
        return tiles * groups.count
    return tiles if groups.alignment % tile_m == 0 else tiles + groups.count - 1


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How the work of a matmul is cut, whatever its operands are.

    Raises:
      ValueError: if a size cannot be had. Whether shared memory suffices depends on the result: `check_memory`.
    """

    tile_m: int = 192
    """Rows of a tile: 128 or 192, 64 for each consumer warpgroup."""
    tile_n: int = 128
    """Columns of a tile, one of `TILE_N`."""
    stages: int = 4
    """Steps along K that the ring in shared memory holds; at least 2."""
    cluster: int = 1
    """Blocks of threads, 1 or 2, that take neighbouring tiles of a row: each reads a part of a for both of them."""
    swath: int = 8
    """Rows of tiles that are worked on together, for the L2 cache."""

    TILE_N: ClassVar[tuple[int, ...]]

    def __post_init__(self):
        name = type(self).__name__
        allowed = {"tile_m": (128, 192), "tile_n": self.TILE_N, "cluster": (1, 2)}
        for field, values in allowed.items():
            if getattr(self, field) not in values:
                wanted = ", ".join(map(str, values))
                raise ValueError(f"{name}: {field} must be one of {wanted}, not {getattr(self, field)}")
        if self.stages < 2 or self.swath < 1:
            raise ValueError(
                f"{name}: stages must be at least 2 and swath at least 1, not {self.stages} and {self.swath}"
            )

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return self.tile_m // ROWS

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a stage."""
        raise NotImplementedError

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
                f"{self} needs {needed} bytes of shared memory for a result of {jnp.dtype(out_dtype)}, "
                f"of {SHARED_MEMORY}; {self.most_stages(out_dtype)} stages would fit"
            )

    def _fixed_bytes(self, out_dtype):
        return self.tile_m * self.tile_n * jnp.dtype(out_dtype).itemsize + BARRIERS


@dataclasses.dataclass(frozen=True)
class MatmulConfig(TileConfig):
    """How the work of an FP8 matmul is cut, in steps of 128 along K.

    Raises:
      ValueError: if a size cannot be had, as above, or registers would not suffice.
    """

    b_tile: Tile = (BLOCK, BLOCK)
    """b's tiles: (128, 128), or (128, 1) for Wgrad, where every column has a scale."""

    TILE_N: ClassVar[tuple[int, ...]] = (16, 32, 64, 128)
    """So that a tile lies in one column of blocks of b's scales."""

    def __post_init__(self):
        super().__post_init__()
        if self.b_tile not in ((BLOCK, BLOCK), (BLOCK, 1)):
            raise ValueError(f"MatmulConfig: b_tile must be (128, 128) or (128, 1), not {self.b_tile}")
        if self.column_scales and self.tile_m * self.tile_n > 128 * 128:
            raise ValueError(
                "MatmulConfig: with b in tiles of 128×1, 192×128 would spill registers; take 128×128 or 192×64"
            )

    @property
    def steps_at_once(self) -> int:
        """Steps that a consumer multiplies before it scales the first of them, up to 4.

        As many as its registers hold partial sums of, and half the ring at most, so that the other half can fill. The
        64 x tile_n sums themselves take half as many registers of a thread as a tile has columns, and so do those of
        each step. Scales of columns take up to half as many again.
        """
        sums = PARTIAL_SUMS[self.consumers] // (2 if self.column_scales else 1)
        return max(1, min(4, sums // (self.tile_n // 2), self.stages // 2))

    @property
    def column_scales(self) -> bool:
        """Every column of b has a scale of its own, not every block."""
        return self.b_tile == (BLOCK, 1)

    @property
    def b_scales(self) -> int:
        """Scales of b that a step reads."""
        return max(LEAST_SCALES, self.tile_n) if self.column_scales else LEAST_SCALES

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a stage: codes of a and b, and their scales."""
        return (self.tile_m + self.tile_n) * BLOCK + 4 * self.tile_m + 4 * self.b_scales


def rounds(config: TileConfig, m: int, n: int, sms: int, groups: Groups | None = None) -> int:
    """How many tiles the busiest SM makes of a result `[m, n]`, counting visits of tiles where groups are of rows."""
    clusters = tiles_down(config.tile_m, m, groups) * -(-n // (config.tile_n * config.cluster))
    return -(-clusters // (sms // config.cluster))


def step_cycles(config: MatmulConfig, m: int) -> dict[str, float]:
    """Cycles for 128 along K of a tile, of a product with m rows, by what could take that long; the longest counts.

    "multiply": what the SM's tensor cores need. "L2": what reading the stage takes; rows beyond m are multiplied but
    not read, and of a shared a each block reads its part. "consumer": what one warpgroup takes for its own rows, at the
    end of whose turns it scales, one product per lane and cycle (two with scales of columns), and multiplies nothing.
    "producer": what asking for the copies takes.
    """
    multiply = config.tile_m * config.tile_n * BLOCK / MULTIPLY_ADDS
    rows = min(m, config.tile_m)
    read = rows * (BLOCK / config.cluster + 4) + config.tile_n * BLOCK + 4 * config.b_scales
    scale = config.tile_n / 2 * (2 if config.column_scales else 1)
    consumer = multiply / config.consumers + (scale + WAIT_CYCLES) / config.steps_at_once
    return {"multiply": multiply, "L2": read / L2_BYTES, "consumer": consumer, "producer": 4 * ISSUE_CYCLES}


def default_config(
    m: int,
    n: int,
    out_dtype: jnp.dtype,
    sms: int,
    *,
    b_tile: Tile = (BLOCK, BLOCK),
    groups: Groups | None = None,
) -> MatmulConfig:
    """The config for a result `[m, n]` where none was measured: the fewest cycles by `rounds` and `step_cycles`.

    Among equals the largest tile, without a cluster. Stages are as many as fit, up to `MOST_STAGES`.
    """
    configs = []
    for cluster in (1, 2)[:sms]:  # No more blocks than SMs.
        for tile_m in (192, 128) if m > 128 else (128,):
            for tile_n in (128, 64, 32, 16):
                if b_tile == (BLOCK, 1) and (tile_m, tile_n) == (192, 128):
                    continue  # It would spill.
                config = MatmulConfig(tile_m, tile_n, cluster=cluster, b_tile=b_tile)
                stages = min(config.most_stages(out_dtype), MOST_STAGES)
                configs.append(dataclasses.replace(config, stages=stages))
    return min(configs, key=lambda config: rounds(config, m, n, sms, groups) * max(step_cycles(config, m).values()))


def config_for(
    m: int,
    n: int,
    k: int,
    out_dtype: jnp.dtype,
    sms: int,
    *,
    b_tile: Tile = (BLOCK, BLOCK),
    groups: Groups | None = None,
) -> MatmulConfig:
    """The config that was the fastest for a result `[m, n]` of sums over k on the target device, or the default."""
    measured = measured_config(matmul(m, n, k, out_dtype, b_tile=b_tile, groups=groups))
    if measured:
        return MatmulConfig(**measured, b_tile=b_tile)
    return default_config(m, n, out_dtype, sms, b_tile=b_tile, groups=groups)


def matmul(
    m: int, n: int, k: int, out_dtype: jnp.dtype, *, b_tile: Tile = (BLOCK, BLOCK), groups: Groups | None = None
) -> Matmul:
    """A product in E4M3, as tables of devices name it."""
    wgrad, along = b_tile == (BLOCK, 1), None if groups is None else dataclasses.astuple(groups)
    tokens, width = (k, m) if wgrad else (m, k)
    result = jnp.dtype(out_dtype).name
    return Matmul(tokens, width, n, "float8_e4m3fn", result, sums_tokens=wgrad, groups=along)
