"""Run-time stacks that are filled in place, piece by piece: a model is loaded without a second copy of any part."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.parallel.placement import KINDS, ParameterLayout
from deepseek_jax.tree import Tree, flatten, unflatten


class StackFiller:
    """Allocates the arrays of a layout on this process's devices, takes pieces of canonical arrays, gives them back.

    Beside the arrays there is never more than one piece, so a piece should be small: one expert, say.
    """

    def __init__(self, layout: ParameterLayout, dtypes: dict[str, jnp.dtype]):
        """`dtypes` by run-time name (`moe.ffn.experts.down`, `head.weight`)."""
        self._placement = layout.placement
        self._stacks = flatten(layout.abstract())
        self._shards: dict[str, dict[jax.Device, jax.Array]] = {}
        self._boxes: dict[str, dict[jax.Device, tuple[slice, ...]]] = {}
        for name, stack in self._stacks.items():
            stack = self._stacks[name] = jax.ShapeDtypeStruct(stack.shape, dtypes[name], sharding=stack.sharding)
            where = stack.sharding.addressable_devices_indices_map(stack.shape)
            self._boxes[name] = {device: _bounds(index, stack.shape) for device, index in where.items()}
            local = stack.sharding.shard_shape(stack.shape)
            self._shards[name] = {device: _zeros(local, stack.dtype, device) for device in where}
        self._homes: dict[str, tuple[str, tuple[int, ...]]] = {}
        for stack in self._stacks:
            kind, _, path = stack.partition(".")
            if kind in KINDS:
                for rank, slot, _, name in layout.placement.arrays(kind, [path]):
                    self._homes[name] = stack, (rank, slot)

    def wants(self, name: str, start: tuple[int, ...], shape: tuple[int, ...]) -> bool:
        """Whether a device of this process holds any of the piece of `shape` at `start` of a canonical array."""
        stack, lead = self._home(name)
        box = _box(lead + start, (1,) * len(lead) + shape)
        return any(_common(box, held) is not None for held in self._boxes[stack].values())

    def put(self, name: str, start: tuple[int, ...], piece: np.ndarray) -> None:
        """Writes a piece of the canonical array `name`, cast to the array's dtype, at `start`."""
        stack, lead = self._home(name)
        piece = piece.reshape((1,) * len(lead) + piece.shape)
        box = _box(lead + start, piece.shape)
        for device, held in self._boxes[stack].items():
            common = _common(box, held)
            if common is None:
                continue
            cut = tuple(slice(c.start - b.start, c.stop - b.start) for c, b in zip(common, box, strict=True))
            offset = tuple(np.int32(c.start - h.start) for c, h in zip(common, held, strict=True))
            shards = self._shards[stack]
            # Waited for, or pieces that nobody has written yet would pile up.
            shards[device] = _write(shards[device], jax.device_put(piece[cut], device), offset).block_until_ready()

    def finish(self, *, drop_stage: bool = False) -> Tree:
        """The arrays, as nested dicts. `drop_stage` leaves out the leading dimension of stacks of one stage."""
        arrays = {}
        for name, stack in self._stacks.items():
            shape, sharding, shards = stack.shape, stack.sharding, self._shards.pop(name)
            if drop_stage and name.split(".")[0] in KINDS:
                shape, sharding = shape[1:], NamedSharding(sharding.mesh, P(*sharding.spec[1:]))
                shards = {device: _without_stage(shard) for device, shard in shards.items()}
            arrays[name] = jax.make_array_from_single_device_arrays(
                shape, sharding, list(shards.values()), dtype=stack.dtype
            )
        return unflatten(arrays)

    def _home(self, name: str) -> tuple[str, tuple[int, ...]]:
        """The stack that holds a canonical array, and where in it: rank and slot, or nothing."""
        return self._homes.get(name, (name, ()))


def _zeros(shape: tuple[int, ...], dtype: jnp.dtype, device: jax.Device) -> jax.Array:
    """Made where they stay: `jnp.zeros(device=…)` makes them on the default device, and copies."""
    with jax.default_device(device):
        return jnp.zeros(shape, dtype).block_until_ready()


@functools.partial(jax.jit, donate_argnums=0)
def _write(shard: jax.Array, piece: jax.Array, offset: tuple) -> jax.Array:
    return lax.dynamic_update_slice(shard, piece.astype(shard.dtype), offset)


@functools.partial(jax.jit, donate_argnums=0)
def _without_stage(shard: jax.Array) -> jax.Array:
    return shard.reshape(shard.shape[1:])


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(*one.indices(size)[:2]) for one, size in zip(index, shape, strict=True))


def _box(start: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(begin, begin + size) for begin, size in zip(start, shape, strict=True))


def _common(one: tuple[slice, ...], other: tuple[slice, ...]) -> tuple[slice, ...] | None:
    """The part that two boxes share, or None."""
    both = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True))
    return both if all(s.start < s.stop for s in both) else None
