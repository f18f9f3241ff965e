"""Work on the host's CPU, whatever device is the default: weights come from a disk, and may not fit an accelerator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import jax
import numpy as np

T = TypeVar("T")


def on_host(function: Callable, *arrays: np.ndarray, **options: Any) -> Any:
    """What a jax function makes of NumPy arrays, as NumPy arrays."""
    with jax.default_device(cpu()):
        return jax.tree.map(np.asarray, function(*arrays, **options))


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array in row-major order, itself where it is so already; several times faster than NumPy's own copy."""
    if array.flags.c_contiguous:
        return array
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:  # jax would narrow float64
        return np.ascontiguousarray(array)
    return np.asarray(jax.device_put(array, cpu()))


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each made in a thread while the one before it is at work: reading overlaps writing."""
    end = object()
    iterator = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="one ahead") as pool:
        coming = pool.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, iterator, end)
            yield cast(T, item)


def cpu() -> jax.Device:
    """This process's CPU; the default device where jax was told not to use it."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]
