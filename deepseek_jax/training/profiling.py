"""XProf traces of chosen steps, and the matmul rate that MFU is measured against."""

from __future__ import annotations

import contextlib
import os
import re
import statistics
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from deepseek_jax.config import ConfigError, require

_LARGEST_MATMUL = 8192
_LONG_ENOUGH_SECONDS = 0.02
"""Above this a matmul's time is its arithmetic, not its launch."""


def parse_steps(text: str) -> tuple[int, int]:
    """`"10:15"` as `(10, 15)`: the first and the last step to trace."""
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if match is None:
        raise ConfigError(f"profile={text} must be first:last, two step numbers such as 10:15")
    first, last = int(match[1]), int(match[2])
    require(first <= last, f"profile={text} ends before it begins")
    return first, last


class StepTrace:
    """Traces the steps `first` to `last` into `directory`; with `steps=None` it does nothing. A context manager.

    with StepTrace(workdir / "profile", (10, 15)) as trace:
        for step in range(...):
            with trace.step(step):
                state, metrics = train_step(state, batch)
    """

    def __init__(self, directory: str | os.PathLike, steps: tuple[int, int] | None):
        self._directory = os.fspath(directory)
        self._steps = steps
        self._active = False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Everything inside belongs to step `number`."""
        if self._steps is None or number > self._steps[1] or number < self._steps[0]:
            yield
            return
        if not self._active:
            _wait_for_devices()  # what was dispatched before is not of the traced steps
            jax.profiler.start_trace(self._directory)
            self._active = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        if number == self._steps[1]:
            self.close()

    def close(self) -> None:
        """Ends a trace that is still running: a run may stop before the last step to trace."""
        if self._active:
            _wait_for_devices()
            jax.profiler.stop_trace()
            self._active = False

    def __enter__(self) -> StepTrace:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def measure_matmul_peak(dtype: jnp.dtype | str = jnp.float32, *, repeats: int = 5) -> float:
    """FLOP/s of square matmuls of `dtype` on all devices of this process at once: the median of `repeats`.

    The size grows until one matmul takes long enough to time, so a laptop's core and a GPU each take well under a
    second. It is what these devices do here and now, with their precision setting and their neighbours' load; virtual
    devices share the host's cores, which is why they are measured together.
    """
    devices = jax.local_devices()

    @jax.jit
    def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
        return a @ b

    def seconds(arrays: list[jax.Array]) -> float:
        start = time.perf_counter()
        jax.block_until_ready([matmul(a, a) for a in arrays])
        return time.perf_counter() - start

    size = 512
    while True:
        # Uneven values: zeros would let a GPU save power and run faster than it can.
        a = (jnp.arange(size * size, dtype=jnp.float32).reshape(size, size) % 251 / 251).astype(dtype)
        arrays = [jax.device_put(a, device) for device in devices]
        seconds(arrays)  # compiles
        if seconds(arrays) >= _LONG_ENOUGH_SECONDS or size >= _LARGEST_MATMUL:
            break
        size *= 2
    return 2 * size**3 * len(devices) / statistics.median(seconds(arrays) for _ in range(repeats))


def _wait_for_devices() -> None:
    """Blocks until the devices have computed everything that was dispatched."""
    for array in jax.live_arrays():
        if not array.is_deleted():
            array.block_until_ready()
