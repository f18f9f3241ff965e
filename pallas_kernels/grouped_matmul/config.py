"""How the Hopper kernels for bfloat16 cut their work, and the choice by size."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from pallas_kernels.block_scaled_matmul.config import (
    ISSUE_CYCLES,
    L2_BYTES,
    MOST_STAGES,
    ROWS,
    WAIT_CYCLES,
    Groups,
    TileConfig,
    rounds,
)
from pallas_kernels.device_tables import Matmul, measured_config

STEP = 64
"""Along K: 128 bytes of bfloat16."""
MULTIPLY_ADDS = 2048
"""Of bfloat16, per cycle and SM."""


@dataclasses.dataclass(frozen=True)
class ArrayConfig(TileConfig):
    """How the work of a matmul of bfloat16 is cut, in steps of 64 along K.

    Raises:
      ValueError: if a size cannot be had, as for every `TileConfig`, or registers would not suffice.
    """

    TILE_N: ClassVar[tuple[int, ...]] = (64, 128, 256)
    """Whole rows of swizzled shared memory, whichever way an operand lies."""

    def __post_init__(self):
        super().__post_init__()
        if (self.tile_m, self.tile_n) == (192, 256):
            raise ValueError("ArrayConfig: 192×256 needs more registers than there are; take 128×256 or 192×128")

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a stage."""
        return 2 * STEP * (self.tile_m + self.tile_n)


def array_step_cycles(config: ArrayConfig) -> dict[str, float]:
    """Cycles for 64 along K of a tile, by what could take that long; see `block_scaled_matmul.config.step_cycles`.

    A consumer issues a step while the tensor cores are at work on the last, so it only waits.
    """
    multiply = config.tile_m * config.tile_n * STEP / MULTIPLY_ADDS
    read = 2 * STEP * (config.tile_m / config.cluster + config.tile_n)
    consumer = max(multiply / config.consumers, WAIT_CYCLES)
    return {"multiply": multiply, "L2": read / L2_BYTES, "consumer": consumer, "producer": 2 * ISSUE_CYCLES}


def default_array_config(m: int, n: int, out_dtype: jnp.dtype, sms: int, groups: Groups) -> ArrayConfig:
    """The config for results `[m, n]` where none was measured: the fewest cycles; among equals the largest tile."""
    configs = []
    for cluster in (1, 2)[:sms]:  # No more blocks than SMs.
        for tile_m in (192, 128) if m > 2 * ROWS else (128,):
            for tile_n in (256, 128, 64) if tile_m == 128 else (128, 64):
                config = ArrayConfig(tile_m, tile_n, cluster=cluster)
                stages = min(config.most_stages(out_dtype), MOST_STAGES)
                if stages >= 3:
                    configs.append(dataclasses.replace(config, stages=stages))
    return min(configs, key=lambda config: rounds(config, m, n, sms, groups) * max(array_step_cycles(config).values()))


def array_config_for(
    m: int, n: int, k: int, out_dtype: jnp.dtype, sms: int, groups: Groups, transposed: bool
) -> ArrayConfig:
    """The config that was the fastest for results `[m, n]` of sums over k on the target device, or the default."""
    measured = measured_config(array_matmul(m, n, k, out_dtype, groups, transposed))
    return ArrayConfig(**measured) if measured else default_array_config(m, n, out_dtype, sms, groups)


def array_matmul(m: int, n: int, k: int, out_dtype: jnp.dtype, groups: Groups, transposed: bool) -> Matmul:
    """A product in bfloat16, as tables of devices name it; `transposed` matrices lie `[G, N, K]`."""
    of_groups, wgrad = dataclasses.astuple(groups), groups.along == "depth"
    tokens, width = (k, m) if wgrad else (m, k)
    result = jnp.dtype(out_dtype).name
    return Matmul(tokens, width, n, "bfloat16", result, transposed=transposed, sums_tokens=wgrad, groups=of_groups)
