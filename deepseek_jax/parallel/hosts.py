"""What the processes of a run agree on between steps. A process that is alone sends nothing and waits for nothing.

All processes call the same function at the same point of the run; each call of several waits for the device.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def highest(value: int) -> int:
    """The highest `value` of any process."""
    if jax.process_count() == 1:
        return value
    return int(_gather(np.int32(value)).max())


def gather(value: Any) -> list[Any]:
    """The `value` of every process, in their order. What is sent is JSON, so tuples come back as lists."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = _gather(np.int32(data.size))
    # Each length compiles a program of its own, and a state is hardly ever as long as the one before.
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
    padded[: data.size] = data
    rows = _gather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def _gather(array: np.ndarray | np.generic) -> np.ndarray:
    """`[processes, ...]`: the array of every process, of the same shape on all."""
    return np.asarray(multihost_utils.process_allgather(array))
