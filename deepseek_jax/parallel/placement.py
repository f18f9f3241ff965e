"""Where every layer lives: the single source for canonical names and for run-time stacks.

A checkpoint knows canonical names, one array per layer and parameter with its global shape: `embedding.weight`,
`layers.3.attention.kv_a.weight`, `mtp.0.projection.weight`, `final_norm.scale`, `head.weight`. A running step knows
stacks `[stage, slot, ...]`, one per kind of layer, padded where stages are uneven. A `Placement` maps one to the
other, shard by shard, so nothing is ever gathered and any checkpoint restores onto any mesh.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import ModelConfig, require
from deepseek_jax.parallel.mesh import mesh_of
from deepseek_jax.parallel.sharding import partition_spec
from deepseek_jax.parallel.zero import Split, choose_split, split_partition
from deepseek_jax.tree import Tree, flatten, map_leaves, unflatten

KINDS = ("dense", "moe", "mtp")
"""Kinds of layers; each is one stack of the run-time parameters."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """For each kind, the layers of every stage: `stages[kind][stage]` lists indices within the kind."""

    stages: Mapping[str, tuple[tuple[int, ...], ...]]
    num_dense_layers: int

    @property
    def num_stages(self) -> int:
        """Pipeline stages."""
        return len(self.stages["dense"])

    def slots(self, kind: str) -> int:
        """Layers of this kind that every stage has room for: the most that any stage holds."""
        return max(len(layers) for layers in self.stages[kind])

    def name(self, kind: str, index: int) -> str:
        """The canonical name of a layer: `layers.3` counts dense and MoE layers together, `mtp.0` MTP modules."""
        return {"dense": f"layers.{index}", "moe": f"layers.{index + self.num_dense_layers}", "mtp": f"mtp.{index}"}[
            kind
        ]

    def layers(self, kind: str) -> Iterator[tuple[int, int, str]]:
        """(stage, slot, canonical name) of every layer of a kind."""
        for stage, indices in enumerate(self.stages[kind]):
            for slot, index in enumerate(indices):
                yield stage, slot, self.name(kind, index)


def place(config: ModelConfig, layers_per_stage: tuple[int, ...] | None = None, *, stages: int = 1) -> Placement:
    """Contiguous stages of main-model layers, MTP modules in the last one.

    Args:
      config: the model.
      layers_per_stage: main-model layers of each stage; default: as even as possible over `stages`.
      stages: how many stages, where `layers_per_stage` does not say.
    """
    if layers_per_stage is None:
        require(stages <= config.num_layers, f"{stages} stages are more than the model's {config.num_layers} layers")
        share, extra = divmod(config.num_layers, stages)
        layers_per_stage = tuple(share + (stage < extra) for stage in range(stages))
    require(
        sum(layers_per_stage) == config.num_layers,
        f"stages of {layers_per_stage} layers hold {sum(layers_per_stage)}, the model has {config.num_layers}",
    )
    ends = np.cumsum(layers_per_stage).tolist()
    spans = [range(end - count, end) for end, count in zip(ends, layers_per_stage, strict=True)]
    dense = config.num_dense_layers
    mtp = [()] * (len(spans) - 1) + [tuple(range(config.mtp_depth))]
    return Placement(
        stages={
            "dense": tuple(tuple(i for i in span if i < dense) for span in spans),
            "moe": tuple(tuple(i - dense for i in span if i >= dense) for span in spans),
            "mtp": tuple(mtp),
        },
        num_dense_layers=dense,
    )


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
        stages, ranks = self.placement.num_stages, self.mesh.shape["pipe"]
        require(stages == ranks, f"a placement of {stages} stages needs a mesh with pipe={stages}, not pipe={ranks}")

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
        """A `ShapeDtypeStruct` with sharding per run-time array; stacked kinds are `[stage, slot, ...]`."""

        def shape(kind, spec):
            return ((self.placement.num_stages, self.placement.slots(kind)) if kind else ()) + spec.shape

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
                layers = {(s, slot): arrays[f"{name}.{path}"] for s, slot, name in self.placement.layers(kind)}
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
                for stage, slot, name in self.placement.layers(kind):
                    local = [
                        s.data[0, slot] for s in shards if s.index[0].indices(self.placement.num_stages)[0] == stage
                    ]
                    arrays[f"{name}.{path}"] = jax.make_array_from_single_device_arrays(
                        spec.shape, self._sharding(stage, spec), local, dtype=flat[f"{kind}.{path}"].dtype
                    )
        return arrays

    def _stack_one(self, kind: str, spec, layers: dict[tuple[int, int], jax.Array]) -> jax.Array:
        stages, slots = self.placement.num_stages, self.placement.slots(kind)
        dtype = next(iter(layers.values())).dtype
        sharding = NamedSharding(self.mesh, self._stacked(self._layer_partition(spec)))
        shape = (stages, slots, *spec.shape)
        local_shape = sharding.shard_shape(shape)[2:]
        rows: dict[jax.Device, list] = {}
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            assert index is not None  # None would be a device without any part of it
            stage = index[0].indices(stages)[0]
            rows[device] = [layers.get((stage, slot)) for slot in range(slots)]
        shards = []
        for device, held in rows.items():
            pieces = [_shard_on(array, device, local_shape, dtype) for array in held]
            shards.append(jnp.stack(pieces)[None])
        return jax.make_array_from_single_device_arrays(shape, sharding, shards, dtype=dtype)

    def _sharding(self, stage: int | None, spec) -> NamedSharding:
        """Where a canonical array lives: on its stage's devices, or on all of them."""
        devices = self.mesh.devices if stage is None else self.mesh.devices[stage : stage + 1]
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
        """(canonical name, stage or None, declaration) of every array."""
        kinds, ends = self._split()
        for name, spec in ends.items():
            yield name, None, spec
        for kind, specs in kinds.items():
            for stage, _, layer in self.placement.layers(kind):
                for path, spec in specs.items():
                    yield f"{layer}.{path}", stage, spec

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
