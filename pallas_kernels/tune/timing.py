"""How long a function's kernels take on the GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

FEW = 5
"""Calls, at least, between two looks at a clock of the host."""


class Timing(NamedTuple):
    """Of repeated calls, in microseconds."""

    median: float
    spread: float
    """From the first to the third quartile."""


def time_kernels(function: Callable[..., Any], *arguments: Any, calls: int = 20) -> Timing:
    """The time of everything that one call runs on the GPU, XLA's copies included.

    The driver's own profiler (CUPTI) says when kernels began and ended. Where another tool holds it, the host's clock
    is read around several calls at a time: that is too long where the host is slower than the GPU.

    Args:
      function: Is jitted.
      arguments: On the device.
      calls: How many are timed, after one that compiles.
    """
    jitted = jax.jit(function)
    jax.block_until_ready(jitted(*arguments))
    measured = _by_cupti(jitted, arguments, calls)
    return _timing(_by_host(jitted, arguments, calls) if measured is None else measured)


def _timing(microseconds: list[float]) -> Timing:
    if len(microseconds) < 2:
        return Timing(microseconds[0], 0.0)
    first, median, third = statistics.quantiles(microseconds, n=4)
    return Timing(median, third - first)


def _by_cupti(jitted, arguments, calls) -> list[float] | None:
    """Microseconds of each call; None where the profiler cannot be had."""
    from jax.experimental.mosaic.gpu import profiler

    try:
        _, milliseconds = profiler.measure(jitted, iterations=calls)(*arguments)
    except RuntimeError:
        return None
    if milliseconds is None:
        return None
    return [1e3 * one for one in (milliseconds if isinstance(milliseconds, list) else [milliseconds])]


def _by_host(jitted, arguments, calls) -> list[float]:
    found = []
    for _ in range(max(2, calls // FEW)):
        begin = time.perf_counter()
        results = [jitted(*arguments) for _ in range(FEW)]
        jax.block_until_ready(results)
        found.append((time.perf_counter() - begin) / FEW * 1e6)
    return found
