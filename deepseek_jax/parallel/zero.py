"""ZeRO-1: master weights and optimizer state exist once across data ranks (section 3.2; arXiv 1910.02054).

A parameter is replicated over some of the axes that split a batch: all of them for a dense matrix, `data` alone for an
expert. Its master copy, moments and summed gradient are split over those, along one dimension that divides; a step
begins by gathering weights in the compute dtype, and sums gradients by scattering them. Vectors stay replicated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax import lax
from jax.sharding import PartitionSpec as P

from deepseek_jax.parallel.mesh import BATCH_AXES
from deepseek_jax.parallel.sharding import mesh_axes_of


class Split(NamedTuple):
    """A dimension of a parameter that is split over mesh axes beyond its own, outermost axis first."""

    dimension: int
    axes: tuple[str, ...]


def choose_split(shape: tuple[int, ...], spec: P, mesh_shape: Mapping[str, int]) -> Split | None:
    """How a parameter of one layer is split over the ranks that would hold copies of it; None: not at all.

    Takes as many ranks as some dimension divides by, and of such dimensions the largest.
    """
    copies = [axis for axis in BATCH_AXES if mesh_shape[axis] > 1 and axis not in mesh_axes_of(spec)]
    entries = (*spec, *(None,) * (len(shape) - len(spec)))
    free = [dimension for dimension, entry in enumerate(entries) if entry is None]
    if len(shape) < 2 or not copies:
        return None
    choices = [c for n in range(len(copies), 0, -1) for c in itertools.combinations(copies, n)]
    for axes in sorted(choices, key=lambda axes: -math.prod(mesh_shape[axis] for axis in axes)):
        ranks = math.prod(mesh_shape[axis] for axis in axes)
        fitting = [dimension for dimension in free if shape[dimension] % ranks == 0]
        if fitting:
            return Split(max(fitting, key=lambda dimension: shape[dimension]), axes)
    return None


def split_partition(spec: P, split: Split | None, dimensions: int) -> P:
    """The partition of the master copy of a parameter with partition `spec`."""
    if split is None:
        return spec
    entries: list = [*spec, *(None,) * (dimensions - len(spec))]
    entries[split.dimension] = split.axes
    return P(*entries)


def gather(x: jax.Array, split: Split | None, lead: int) -> jax.Array:
    """The whole parameter from every rank's part, inside `shard_map`; `lead` dimensions are the stack's."""
    if split is None:
        return x
    return lax.all_gather(x, split.axes, axis=lead + split.dimension, tiled=True)


def reduce_scatter(gradient: jax.Array, split: Split | None, lead: int) -> jax.Array:
    """This rank's part of the sum of all ranks' gradients over the axes of the split."""
    if split is None:
        return gradient
    return lax.psum_scatter(gradient, split.axes, scatter_dimension=lead + split.dimension, tiled=True)
