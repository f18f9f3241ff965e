"""Statistics of what is quantised, where somebody asks for them: underflow, clipping and error of every tensor.

    with collecting() as readings:
        ...  # trace forward and backward passes of FP8 layers

While nobody collects, `report` does nothing at all, so a training step is the same program with this module as without.
What is collected are arrays of the trace at hand: return them from the function that is jitted, and collect around
layers that stand in it themselves, not in a scan or under `jax.checkpoint`, whose arrays do not leave these.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.quantize import Quantized
from pallas_kernels.quantize.e5m6 import LARGEST, PackedE5M6
from pallas_kernels.quantize.reference import Tile, spread

_SLACK = 2.0**-20
"""A value beyond the largest one by no more than this is there by the rounding of its scale, and not clipped."""


class Counts(NamedTuple):
    """Sums over a tensor that add up over parts of it; scalars."""

    nonzero: Any
    """int32: values that are not zero."""
    underflow: Any
    """int32: of these, those that became zero."""
    clipped: Any
    """int32: values beyond the largest that their tile can hold. Scales follow the values, so that there are none."""
    not_finite: Any
    """int32: NaN or infinite."""
    error: Any
    """float32: Σ (rounded − exact)² over the finite values."""
    power: Any
    """float32: Σ exact² over these."""

    @property
    def relative_error(self) -> float:
        """√(Σ (rounded − exact)² / Σ exact²); 0 of a tensor of zeros."""
        return float(np.sqrt(self.error / self.power)) if self.power else 0.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reading:
    """What was found of one tensor."""

    counts: Counts
    matrix: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    """Shape of the weight that the layer multiplies by, which tells layers of a block apart."""
    role: str = dataclasses.field(metadata={"static": True})
    """What the tensor is to its layer, such as "x for Fprop"."""
    tile: Tile = dataclasses.field(metadata={"static": True})
    """What shares a scale; None: the whole matrix."""
    format: str = dataclasses.field(metadata={"static": True})
    """E4M3, E5M2 or E5M6."""


_READINGS: contextvars.ContextVar[list[Reading] | None] = contextvars.ContextVar("readings", default=None)


@contextlib.contextmanager
def collecting() -> Iterator[list[Reading]]:
    """Within, every FP8 layer traced adds a reading of each of its tensors to the list, in the order of work."""
    readings: list[Reading] = []
    token = _READINGS.set(readings)
    try:
        yield readings
    finally:
        _READINGS.reset(token)


def report(
    role: str,
    matrix: tuple[int, ...],
    exact: Array | Quantized | Callable[[], Array],
    rounded: Quantized | PackedE5M6,
) -> None:
    """Adds a reading of a tensor `[..., M, N]`, if somebody collects.

    Args:
      role: see `Reading`.
      matrix: see `Reading`.
      exact: what was rounded, or a function that makes it, called only if somebody collects.
      rounded: what it became.
    """
    readings = _READINGS.get()
    if readings is None:
        return
    if isinstance(rounded, Quantized):
        tile, kind = rounded.tile, jnp.finfo(rounded.codes.dtype)
        largest, name = float(kind.max), "E5M2" if kind.nexp == 5 else "E4M3"
    else:
        tile, largest, name = (1, 128), LARGEST, "E5M6"
    exact = exact() if callable(exact) else exact
    values = exact.dequantize() if isinstance(exact, Quantized) else exact
    limits = spread(rounded.scales, tile, values.shape) * largest
    readings.append(Reading(_count(values, rounded.dequantize(), limits), matrix, role, tile, name))


@jax.jit
def _count(exact: Array, rounded: Array, limits: Array) -> Counts:
    """What was lost of `exact` `[..., M, N]`; limits broadcast to it."""
    exact = exact.astype(jnp.float32)
    finite = jnp.isfinite(exact)
    nonzero = exact != 0
    error = jnp.where(finite & jnp.isfinite(rounded), rounded - exact, 0)

    def number(where: Array) -> Array:
        return where.sum(dtype=jnp.int32)

    return Counts(
        nonzero=number(nonzero),
        underflow=number(nonzero & (rounded == 0)),
        clipped=number(finite & (jnp.abs(exact) > limits * (1 + _SLACK))),
        not_finite=number(~finite),
        error=jnp.square(error).sum(),
        power=jnp.square(jnp.where(finite, exact, 0)).sum(),
    )
