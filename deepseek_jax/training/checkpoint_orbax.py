"""How Orbax is set up for canonical entries: per-layer arrays that live on their pipeline stage's devices only."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

# Arrays are cut into chunks of at most this many bytes, so that restoring on a finer mesh does not read each whole.
_CHUNK_BYTES = 2**28
_IN_FLIGHT_BYTES = 2**28


class StagedArrayHandler(ocp.type_handlers.ArrayHandler):
    """Writes `jax.Array`s of which each process may hold all, some or no shards.

    Orbax assumes that every process holds some shards of every array and none holds all of one. A layer of a pipeline
    lives on one stage's devices, and with two hosts and two stages that is never so.
    """

    async def serialize(self, values, infos, args=None):
        """Serializes what this process holds, and leaves arrays that it holds nothing of to their owners."""
        args = args or [ocp.SaveArgs()] * len(values)
        mine = [i for i, value in enumerate(values) if value.addressable_shards]
        if not mine:
            return []
        arrays = [_spread(values[i]) for i in mine]
        return await super().serialize(arrays, [infos[i] for i in mine], [args[i] for i in mine])

    async def deserialize(self, infos, args=None):
        """Reads the arrays that land on this process, and names the others without reading anything."""
        shardings = [arg.sharding for arg in args]
        mine = [i for i, sharding in enumerate(shardings) if sharding.addressable_devices]
        read = await super().deserialize([infos[i] for i in mine], [args[i] for i in mine]) if mine else []
        arrays = dict(zip(mine, read, strict=True))
        return [
            arrays[i]
            if i in arrays
            else jax.make_array_from_single_device_arrays(arg.global_shape, arg.sharding, [], dtype=arg.dtype)
            for i, arg in enumerate(args)
        ]


Index = int | slice | tuple[slice, ...] | None
"""Part of an array; None is all of it."""


@dataclasses.dataclass(frozen=True)
class StreamedArray:
    """An array that is written piece by piece, and is never whole in memory."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterator[tuple[Index, np.ndarray]]]
    """The pieces in turn: where each lies, and what is there."""
    chunks: tuple[int, ...] | None = None
    """How the array is cut on the disk: as the pieces are, or a piece would write its neighbours again."""

    @property
    def size(self) -> int:
        """Numbers in it."""
        return int(np.prod(self.shape))


class StreamedArrayHandler(ocp.type_handlers.NumpyHandler):
    """Writes a `StreamedArray` as the entry that a `jax.Array` would be: what reads it knows no difference."""

    def typestr(self) -> str:
        """The name in the metadata, by which a reader chooses its handler."""
        return "jax.Array"

    async def serialize(self, values, infos, args=None):
        """Makes the writes, which wait for each other: few pieces are in memory at a time."""
        self._one_at_a_time, self._error = asyncio.Lock(), None
        return await super().serialize(values, infos, args)

    async def _background_serialize(self, values, infos, args=None) -> None:
        await super()._background_serialize(values, infos, args)
        if self._error is not None:
            raise self._error

    async def _open_and_write(self, value: StreamedArray, spec: dict[str, Any], context: ts.Context) -> None:
        """Keeps the first error for the end, and writes no more after it: nothing is left waiting when it is raised."""
        async with self._one_at_a_time:
            if self._error is None:
                try:
                    await _write(value, spec, context)
                except Exception as error:
                    self._error = error


async def _write(value: StreamedArray, spec: dict[str, Any], context: ts.Context) -> None:
    if value.chunks is not None:
        spec["metadata"]["chunks"] = list(value.chunks)
    array = await ts.open(ts.Spec(spec), create=True, open=True, context=context)
    pending: collections.deque[tuple[ts.WriteFutures, int]] = collections.deque()
    try:
        for index, piece in value.pieces():
            # Several small writes at a time: the store commits them together, and each commit takes a while.
            while pending and sum(size for _, size in pending) + piece.nbytes > _IN_FLIGHT_BYTES:
                await pending.popleft()[0]
            target = array if index is None else array[index]
            pending.append((target.write(piece, can_reference_source_data_indefinitely=True), piece.nbytes))
    finally:  # also where a piece could not be read: what still writes would get in the way of cleaning up
        for write, _ in pending:
            await write


def array_handler() -> ocp.PyTreeCheckpointHandler:
    """The handler of a flat dictionary of arrays, with our array type in place of Orbax's."""
    # One owner per shard: with replicas sharing the work, `_spread` would wait for parts that nobody writes. The
    # sharding file and the array metadata serve restores without templates, which we never do.
    arrays = StagedArrayHandler(
        primary_host=None, use_replica_parallel=False, enable_write_sharding_file=False, array_metadata_store=None
    )
    streamed = StreamedArrayHandler(deepcopy_host_arrays=False)
    registry = ocp.type_handlers.create_type_handler_registry((StreamedArray, streamed), (jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)


def open_array(folder: epath.Path, name: str) -> ts.TensorStore:
    """One entry of a saved dictionary of arrays, opened to be read piece by piece."""
    base = str(folder) if "://" in str(folder) else {"driver": "file", "path": str(folder)}
    store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    return ts.open({"driver": "zarr", "kvstore": store}, open=True, read=True).result()


def save_args(names: Iterable[str]) -> dict[str, ocp.SaveArgs]:
    """How each of the entries `names` is written."""
    return {name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in names}


def _spread(array: jax.Array) -> jax.Array:
    """The same shards, as an array that is nominally replicated on devices of other processes too.

    Only Orbax sees it, and only to write the first replica, which is the one that is here: nothing is moved.
    """
    if jax.process_count() == 1 or not array.is_fully_addressable:
        return array
    if isinstance(array.sharding, jax.sharding.NamedSharding):
        devices, names, spec = array.sharding.mesh.devices, array.sharding.mesh.axis_names, array.sharding.spec
    else:
        (device,) = array.sharding.device_set
        devices, names, spec = np.array([device]), ("device",), jax.P()
    here = jax.process_index()
    elsewhere = [device for device in jax.devices() if device.process_index != here][: devices.size]
    both = np.stack([devices, np.array(elsewhere).reshape(devices.shape)])
    mesh = jax.sharding.Mesh(both, ("replica", *names))
    shards = [shard.data for shard in array.addressable_shards]
    sharding = jax.NamedSharding(mesh, spec, memory_kind=array.sharding.memory_kind)
    return jax.make_array_from_single_device_arrays(array.shape, sharding, shards)
