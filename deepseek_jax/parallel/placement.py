"""Where every layer lives: the single source for canonical names and for run-time stacks.

A checkpoint knows canonical names, one array per layer and parameter with its global shape: `embedding.weight`,
`layers.3.attention.kv_a.weight`, `mtp.0.projection.weight`, `final_norm.scale`, `head.weight`. A running step knows
stacks `[rank, slot, ...]`, one per kind of layer, padded where stages are uneven. A `Placement` maps one to the
other, shard by shard, so nothing is ever gathered and any checkpoint restores onto any mesh.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import ModelConfig, require
from deepseek_jax.parallel.mesh import mesh_of
from deepseek_jax.parallel.pipeline.schedule import StageMap
from deepseek_jax.parallel.sharding import partition_spec
from deepseek_jax.parallel.zero import Split, choose_split, split_partition
from deepseek_jax.tree import Tree, flatten, map_leaves, unflatten

KINDS = ("dense", "moe", "mtp")
"""Kinds of layers; each is one stack of the run-time parameters."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """For each kind, the slots of every stage, each with the canonical name of its layer, or None where it is empty.

    The stack of the kind `mtp` is every stage's tail: in the last stage MTP modules, in any other further MoE layers,
    whose parameters lie under `block`. So that a stage of MTP modules costs no other stage an empty layer.
    """

    slots: Mapping[str, tuple[tuple[str | None, ...], ...]]
    stage_map: StageMap = StageMap("straight", 1)
    """On which rank each stage lives."""

    @property
    def num_stages(self) -> int:
        """Pipeline stages."""
        return self.stage_map.stages

    @property
    def ranks(self) -> int:
        """Ranks of the mesh axis `pipe`, each with the stacks of one stage or of several."""
        return self.stage_map.ranks

    def size(self, kind: str) -> int:
        """Slots of this kind that every stage has."""
        return len(self.slots[kind][0])

    def stack_size(self, kind: str) -> int:
        """Slots of this kind that every rank has."""
        return self.size(kind) * self.num_stages // self.ranks

    def occupied(self) -> dict[str, np.ndarray]:
        """Per kind with any slots bool `[stages, slots]`: which hold a layer."""
        tables = {kind: np.array([[name is not None for name in s] for s in of]) for kind, of in self.slots.items()}
        return {kind: table for kind, table in tables.items() if table.size}

    def layers(self, kind: str) -> Iterator[tuple[int, int, str]]:
        """(rank, slot of the rank's stack, canonical name) of every layer of a kind: `layers.3`, `mtp.0`."""
        for rank, names in enumerate(self.stacks(kind)):
            for slot, name in enumerate(names):
                if name is not None:
                    yield rank, slot, name

    def stacks(self, kind: str) -> list[list[str | None]]:
        """Per rank the slots of its stack: those of its stages, one after the other."""
        stages, per_rank = self.stage_map, self.num_stages // self.ranks
        return [
            [name for slot in range(per_rank) for name in self.slots[kind][stages.stage(rank, slot)]]
            for rank in range(self.ranks)
        ]

    def arrays(self, kind: str, paths: Iterable[str]) -> Iterator[tuple[int, int, str, str]]:
        """(rank, slot, path, canonical name) of every array of a kind, whose layers have parameters at `paths`."""
        for rank, slot, layer in self.layers(kind):
            for path in paths:
                if kind != "mtp" or layer.startswith("mtp."):
                    yield rank, slot, path, f"{layer}.{path}"
                elif path.startswith("block."):
                    yield rank, slot, path, f"{layer}.{path.removeprefix('block.')}"


def place(
    config: ModelConfig, layers_per_stage: tuple[int, ...] | None = None, *, stage_map: StageMap | None = None
) -> Placement:
    """Contiguous stages of main-model layers, MTP modules in the last one.

    Args:
      config: the model.
      layers_per_stage: main-model layers of each stage; default: those that `balanced` finds.
      stage_map: how many stages there are, and where they live; default: one for each of `layers_per_stage`, or one.
    """
    if stage_map is None:
        stage_map = StageMap("straight", len(layers_per_stage or (0,)))
    if layers_per_stage is None:
        layers_per_stage = balanced(config, stage_map.stages)
    require(
        len(layers_per_stage) == stage_map.stages and sum(layers_per_stage) == config.num_layers,
        f"parallel.layers_per_stage={layers_per_stage} is for {len(layers_per_stage)} stages with "
        f"{sum(layers_per_stage)} layers; needed are {stage_map.stages} with the model's {config.num_layers}",
    )
    ends = np.cumsum(layers_per_stage).tolist()
    spans = [range(end - count, end) for end, count in zip(ends, layers_per_stage, strict=True)]
    dense = [[f"layers.{i}" for i in span if i < config.num_dense_layers] for span in spans]
    moe = [[f"layers.{i}" for i in span if i >= config.num_dense_layers] for span in spans]
    modules = [f"mtp.{k}" for k in range(config.mtp_depth)]
    # Before the tail there is room for the last stage's layers, and for what no other stage's tail takes.
    before = max([len(moe[-1]), *(len(of) - len(modules) for of in moe[:-1]), min(config.num_moe_layers, 1)])
    rows = [[*of[:before], *[None] * (before - len(of)), *of[before:]] for of in moe]
    rows[-1] += modules
    tail = [[*row[before:], *[None] * (before + len(modules) - len(row))] for row in rows]
    most = max(len(of) for of in dense)
    return Placement(
        slots={
            "dense": tuple((*of, *[None] * (most - len(of))) for of in dense),
            "moe": tuple(tuple(row[:before]) for row in rows),
            "mtp": tuple(map(tuple, tail)),
        },
        stage_map=stage_map,
    )


def balanced(config: ModelConfig, stages: int) -> tuple[int, ...]:
    """Layers per stage for the shortest tick, in which every stage runs its own dense layers and all slots for others.

    A dense layer costs as much as an MoE layer (in DeepSeek-V3 to 1%), an MTP module as one, and an empty slot for an
    MoE layer nearly as much, because all ranks take part in an exchange. Of the shortest it takes those with the least
    slots, then the most even.
    """
    layers, dense, tail = config.num_layers, config.num_dense_layers, config.mtp_depth
    require(
        stages <= layers,
        f"{stages} stages are more than the model's {layers} layers: lower parallel.pipe or parallel.chunks, or take a "
        "schedule with fewer stages on a rank",
    )
    if stages == 1:
        return (layers,)
    best: tuple | None = None
    for most_dense in range(dense + 1):
        for slots in range(1, layers + tail + 1):
            if best is not None and (most_dense + slots, slots) >= best[:2]:
                break
            found = _most_even(layers, dense, tail, stages, most_dense, slots)
            if found is not None:
                best = (most_dense + slots, slots, found)
                break
    assert best is not None  # all dense layers in one stage and as many slots as layers always do
    return best[2]


def _most_even(layers: int, dense: int, tail: int, stages: int, most_dense: int, slots: int) -> tuple[int, ...] | None:
    """The most even stages of at most so many dense layers and so many others; None where there are none."""

    @functools.cache
    def best(stage: int, start: int) -> tuple[int, tuple[int, ...]] | None:
        """(sum of squares, layers per stage) of the stages from this one on, for the layers from `start` on."""
        if stage == stages:
            return (0, ()) if start == layers else None
        found = None
        for end in range(start + 1, layers + 1):
            own_dense = max(0, min(end, dense) - start)
            others = end - start - own_dense + tail * (stage == stages - 1)
            if own_dense > most_dense or others > slots:
                break
            rest = best(stage + 1, end)
            if rest is not None:
                total = (own_dense + others) ** 2 + rest[0]
                if found is None or total < found[0]:
                    found = (total, (end - start, *rest[1]))
        return found

    found = best(0, 0)
    return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class ParameterLayout:
    """The run-time shapes, shardings and canonical names of one tree of parameters on one mesh.

    `specs` is a nested dict of declarations (`ParameterSpec`: shape, axes, initial value of one layer).
    """

    specs: Tree
    placement: Placement
    mesh: Mesh | AbstractMesh
    zero: bool = False
    """Split over the ranks that would else hold copies (ZeRO-1): see `parallel.zero`."""

    def __post_init__(self):
        ranks, pipe = self.placement.ranks, self.mesh.shape["pipe"]
        require(ranks == pipe, f"a placement on {ranks} ranks needs a mesh with pipe={ranks}, not pipe={pipe}")

    def partition(self) -> Tree:
        """A `PartitionSpec` per run-time array."""

        def of(kind, spec):
            return self._stacked(self._layer_partition(spec)) if kind else self._layer_partition(spec)

        return self._map(of)

    def splits(self) -> Tree:
        """Per parameter its `parallel.zero.Split`, of the dimensions of one layer, or None."""
        return self._map(lambda kind, spec: self._split_of(spec))

    def shardings(self) -> Tree:
        """A `NamedSharding` per run-time array."""
        return map_leaves(lambda spec: NamedSharding(self.mesh, spec), self.partition())

    def abstract(self, dtype=jnp.float32) -> Tree:
        """A `ShapeDtypeStruct` with sharding per run-time array; stacked kinds are `[rank, slot, ...]`."""

        def shape(kind, spec):
            return ((self.placement.ranks, self.placement.stack_size(kind)) if kind else ()) + spec.shape

        shapes = self._map(shape)
        return map_leaves(
            lambda s, sharding: jax.ShapeDtypeStruct(s, dtype, sharding=sharding), shapes, self.shardings()
        )

    def canonical(self, dtype=jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
        """Every canonical array: its global shape and the devices it lives on."""
        return {
            name: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=self._sharding(stage, spec))
            for name, stage, spec in self._entries()
        }

    def initial(self, seed: int, dtype=jnp.float32) -> Tree:
        """Initial values, each drawn from its canonical name and global shape: the same on every mesh."""
        key = jax.random.key(seed)
        arrays = {}
        for name, stage, spec in self._entries():
            draw = _initializer(spec, self._sharding(stage, spec), dtype)
            arrays[name] = draw(jax.random.fold_in(key, zlib.crc32(name.encode())))
        return self.stack(arrays)

    def stack(self, arrays: Mapping[str, jax.Array]) -> Tree:
        """Canonical arrays (on the devices that `canonical` names) to the run-time tree; empty slots hold zeros."""
        kinds, ends = self._split()
        tree = {name: arrays[name] for name in ends}
        for kind, specs in kinds.items():
            for path, spec in specs.items():
                layers = {(rank, slot): arrays[name] for rank, slot, _, name in self.placement.arrays(kind, [path])}
                tree[f"{kind}.{path}"] = self._stack_one(kind, spec, layers)
        return unflatten(tree)

    def unstack(self, tree: Tree) -> dict[str, jax.Array]:
        """The run-time tree to canonical arrays, each staying on the devices that hold it."""
        kinds, ends = self._split()
        flat = flatten(tree)
        arrays = {name: flat[name] for name in ends}
        for kind, specs in kinds.items():
            for path, spec in specs.items():
                shards = flat[f"{kind}.{path}"].addressable_shards
                for rank, slot, _, name in self.placement.arrays(kind, [path]):
                    local = [s.data[0, slot] for s in shards if s.index[0].indices(self.placement.ranks)[0] == rank]
                    arrays[name] = jax.make_array_from_single_device_arrays(
                        spec.shape, self._sharding(rank, spec), local, dtype=flat[f"{kind}.{path}"].dtype
                    )
        return arrays

    def _stack_one(self, kind: str, spec, layers: dict[tuple[int, int], jax.Array]) -> jax.Array:
        ranks, slots = self.placement.ranks, self.placement.stack_size(kind)
        dtype = next(iter(layers.values())).dtype
        sharding = NamedSharding(self.mesh, self._stacked(self._layer_partition(spec)))
        shape = (ranks, slots, *spec.shape)
        local_shape = sharding.shard_shape(shape)[2:]
        rows: dict[jax.Device, list] = {}
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            assert index is not None  # None would be a device without any part of it
            rank = index[0].indices(ranks)[0]
            rows[device] = [layers.get((rank, slot)) for slot in range(slots)]
        shards = []
        for device, held in rows.items():
            pieces = [_shard_on(array, device, local_shape, dtype) for array in held]
            shards.append(jnp.stack(pieces)[None])
        return jax.make_array_from_single_device_arrays(shape, sharding, shards, dtype=dtype)

    def _sharding(self, rank: int | None, spec) -> NamedSharding:
        """Where a canonical array lives: on its rank's devices, or on all of them."""
        devices = self.mesh.devices if rank is None else self.mesh.devices[rank : rank + 1]
        return NamedSharding(mesh_of(devices), self._layer_partition(spec))

    def _layer_partition(self, spec) -> P:
        """The partition of a parameter of one layer, or of an end."""
        return split_partition(partition_spec(spec.axes), self._split_of(spec), len(spec.shape))

    def _split_of(self, spec) -> Split | None:
        return choose_split(spec.shape, partition_spec(spec.axes), self.mesh.shape) if self.zero else None

    @staticmethod
    def _stacked(layer: P) -> P:
        return P(*partition_spec(("stage", "slot")), *layer)

    def _entries(self) -> Iterator[tuple[str, int | None, Any]]:
        """(canonical name, rank or None, declaration) of every array."""
        kinds, ends = self._split()
        for name, spec in ends.items():
            yield name, None, spec
        for kind, specs in kinds.items():
            for rank, _, path, name in self.placement.arrays(kind, specs):
                yield name, rank, specs[path]

    def _split(self) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """Declarations of the stacked kinds, and of everything else, flat."""
        kinds = {kind: flatten(self.specs[kind]) for kind in KINDS if kind in self.specs}
        return kinds, flatten({k: v for k, v in self.specs.items() if k not in KINDS})

    def _map(self, function: Callable) -> Tree:
        return {
            name: map_leaves(lambda spec, n=name: function(n if n in KINDS else None, spec), tree)
            for name, tree in self.specs.items()
        }


def _shard_on(array: jax.Array | None, device: jax.Device, shape, dtype) -> jax.Array:
    """The part of `array` that `device` holds; zeros for an empty slot."""
    if array is None:
        return jax.device_put(jnp.zeros(shape, dtype), device)
    return next(shard.data for shard in array.addressable_shards if shard.device == device)


_INITIALIZERS: dict[Any, Callable] = {}


def _initializer(spec, sharding: NamedSharding, dtype) -> Callable[[jax.Array], jax.Array]:
    """A compiled draw, shared by all parameters of one declaration on the same devices."""
    cache_key = (spec, sharding, jnp.dtype(dtype))
    if cache_key not in _INITIALIZERS:
        _INITIALIZERS[cache_key] = jax.jit(lambda key: spec.initial(key, dtype), out_shardings=sharding)
    return _INITIALIZERS[cache_key]
