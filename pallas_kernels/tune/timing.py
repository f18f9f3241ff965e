"""How long a function's kernels take on the GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

FEW = 5
"""Calls between two looks at a clock of the host."""
MOST_BYTES = 4_000_000_000
"""Of results that are there at a time."""


class Timing(NamedTuple):
    """Of repeated calls, in microseconds."""

    median: float
    spread: float
    """From the first to the third quartile."""
    clock: str = "GPU"
    """Whose: the GPU's, or the host's where the driver's profiler cannot be had."""


def time_kernels(function: Callable[..., Any], *arguments: Any, calls: int = 20) -> Timing:
    """The time of everything that one call runs on the GPU, XLA's copies included.

    The driver's own profiler (CUPTI) says when kernels began and ended. Where it cannot be had, if another tool has it,
    the host's clock is read around several calls at a time: that is too long where the host is slower than the GPU.

    Args:
      function: Is jitted.
      arguments: On the device.
      calls: How many are timed, after one that compiles.
    """
    jitted = jax.jit(function)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(jax.block_until_ready(jitted(*arguments))))
    # The results of all that run in a row are kept.
    at_once = max(1, min(calls, MOST_BYTES // max(size, 1)))
    microseconds = _by_cupti(jitted, arguments, calls, at_once)
    if microseconds is not None:
        return _timing(microseconds, "GPU")
    return _timing(_by_host(jitted, arguments, calls, min(FEW, at_once)), "host")


def _timing(microseconds: list[float], clock: str) -> Timing:
    if len(microseconds) < 2:
        return Timing(microseconds[0], 0.0, clock)
    first, median, third = statistics.quantiles(microseconds, n=4)
    return Timing(median, third - first, clock)


def _by_cupti(jitted, arguments, calls, at_once) -> list[float] | None:
    """Microseconds of each call; None where the profiler cannot be had."""
    from jax.experimental.mosaic.gpu import profiler

    found: list[float] = []
    while len(found) < calls:
        try:
            _, milliseconds = profiler.measure(jitted, iterations=at_once)(*arguments)
        except RuntimeError as error:
            if "CUPTI" not in str(error).upper():
                raise
            return None
        if milliseconds is None:
            return None
        found += [1e3 * one for one in (milliseconds if isinstance(milliseconds, list) else [milliseconds])]
    return found


def _by_host(jitted, arguments, calls, at_once) -> list[float]:
    found = []
    for _ in range(max(2, calls // at_once)):
        begin = time.perf_counter()
        results = [jitted(*arguments) for _ in range(at_once)]
        jax.block_until_ready(results)
        found.append((time.perf_counter() - begin) / at_once * 1e6)
    return found
