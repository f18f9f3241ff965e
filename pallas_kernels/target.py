"""The device that programs are traced for: the one at hand, or one that they are only compiled for."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax


class Target(NamedTuple):
    """What the choice of an implementation depends on."""

    backend: str
    """"gpu", "cpu" or "tpu"."""
    kind: str
    """As jax names the kind of device."""
    capability: str
    """Compute capability of a GPU."""
    sms: int
    """How many streaming multiprocessors a GPU has; 0 of others."""
    trusted: bool = False
    """Kernels are chosen by themselves, whether or not a table says that they passed their checks there."""


H200 = Target("gpu", "NVIDIA H200", "9.0", 132)
"""For `compiling_for` where there is none."""

_TARGET: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


def target() -> Target:
    """That of `compiling_for`, of `jax.default_device`, or jax's first device."""
    chosen = _TARGET.get()
    default: Any = getattr(jax.config, "jax_default_device", None)
    if default is None and chosen is not None:
        return chosen
    if default is None:
        device, backend = jax.devices()[0], jax.default_backend()
    else:
        device = jax.devices(default)[0] if isinstance(default, str) else default
        backend = device.platform
    capability, sms = getattr(device, "compute_capability", "unknown"), getattr(device, "core_count", None)
    return Target(backend, getattr(device, "device_kind", "unknown"), str(capability), sms or 0)


@contextlib.contextmanager
def compiling_for(device: Target) -> Iterator[None]:
    """What is traced within is traced for another device, on which it need not be able to run here.

    jax keeps what it traced: a function that was jitted and called before keeps what was chosen then.
    """
    token = _TARGET.set(device)
    try:
        yield
    finally:
        _TARGET.reset(token)
