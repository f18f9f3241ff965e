"""How an op chooses among its implementations, and the error for one that cannot run here.

Every op of this package takes `implementation=None | name`. None picks the best that is supported where the code runs,
a kernel only if a table says that it passed its checks on such a device (`device_tables`); on Hopper the log says what
was picked, and why. A name that is not supported is an error that says why, never a silent fallback.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import device_tables
from pallas_kernels.target import target

KERNEL = "mosaic_gpu"
"""The implementation that is a kernel of ours, and stands first among an op's."""
_LOG = logging.getLogger("pallas_kernels")


def choose(
    op: str, implementation: str | None, obstacles: Mapping[str, str | None], *, rests_on: Sequence[str] = ()
) -> str:
    """The implementation of `op` to run.

    Args:
      op: Name of the op, for the error.
      implementation: What the caller asked for; None leaves the choice to us.
      obstacles: Every implementation by name, best first, with the reason why it cannot run here, or None if it can.
      rests_on: Other ops whose kernels the kernel's derivative uses; it is chosen by itself only if they passed too.

    Returns:
      The name of an implementation whose obstacle is None.

    Raises:
      ValueError: if the name is unknown, or known and not supported here.
    """
    if implementation is None:
        return _best(op, obstacles, rests_on)
    if implementation not in obstacles:
        raise ValueError(f"{op} has no implementation {implementation!r}; it has {', '.join(obstacles)}")
    if obstacles[implementation] is not None:
        raise ValueError(f"{op}: implementation {implementation!r} cannot run here: {obstacles[implementation]}")
    return implementation


def _best(op: str, obstacles: Mapping[str, str | None], rests_on: Sequence[str]) -> str:
    """The first that can run, and that may be chosen by itself."""
    against = obstacles.get(KERNEL, "there is none")
    unproven = None
    if against is None:
        unproven = next(filter(None, (device_tables.unproven(one) for one in (op, *rests_on))), None)
    name = next(name for name, obstacle in obstacles.items() if obstacle is None and not (name == KERNEL and unproven))
    if KERNEL in obstacles and not_hopper() is None:
        _say(op, name, unproven or against, logging.WARNING if unproven else logging.INFO)
    return name


@functools.cache  # Once for each.
def _say(op: str, name: str, reason: str | None, level: int) -> None:
    _LOG.log(level, "%s runs as %s%s", op, name, f": {reason}" if reason else "")


def not_hopper() -> str | None:
    """Why kernels for GPUs of compute capability 9.0 cannot run where the code runs; None if they can."""
    device = target()
    if device.backend != "gpu":
        return f"it is for GPUs of compute capability 9.0 (Hopper), and jax runs on {device.backend}"
    if device.capability != "9.0":
        return f"it is for GPUs of compute capability 9.0 (Hopper), not {device.capability}"
    return None


def in_mesh(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel of arrays whose results vary over the axes that an operand varies over, inside `shard_map`.

    jax does not say so of what a Mosaic kernel makes: it would take a result for equal on all devices, and sum the
    gradients of it over them.
    """

    def call(*arrays):
        axes = frozenset().union(*(_varying(leaf) for leaf in jax.tree.leaves(arrays)))
        return jax.tree.map(lambda leaf: _varied(leaf, axes), kernel(*arrays))

    return call


def _varying(x: Array) -> frozenset[str]:
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def _varied(x: Array, axes: frozenset[str]) -> Array:
    missing = tuple(sorted(axes - _varying(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def one_at_a_time(kernel: Callable[..., Array], name: str) -> Callable[..., Array]:
    """A kernel of arrays that `vmap` calls once for each element, and whose derivative is an error that says why."""

    @jax.custom_jvp
    def call(*arrays):
        return jax.custom_batching.sequential_vmap(in_mesh(kernel))(*arrays)

    @call.defjvp
    def _(primals, tangents):
        raise TypeError(
            f"{name}: the kernel cannot be differentiated; the gradients of quantised operands are products of their "
            "own (Dgrad, Wgrad), to be called from a custom_vjp"
        )

    return call


def accumulator(*arrays: Array) -> jnp.dtype:
    """The dtype to accumulate in: float32 or wider, so that float64 parity tests stay in float64."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
