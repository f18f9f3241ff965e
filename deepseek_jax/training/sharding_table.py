"""What a recipe puts on every device: shapes, shardings and bytes of each parameter, and the collectives of a step.

All of it comes from shapes on an abstract mesh. No array is made and no device is asked for, so the 671B model on 2048
devices takes seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.model.quantized import quantized_names
from deepseek_jax.model.targets import Microbatch
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.mesh import AXES, ParallelConfig
from deepseek_jax.parallel.pipeline.steady import known_ticks
from deepseek_jax.parallel.pipeline.tables import make_tables, work_shares
from deepseek_jax.parallel.placement import KINDS, ParameterLayout, place
from deepseek_jax.planning.collectives import Collective, collectives
from deepseek_jax.precision.fp8 import quantize_weight
from deepseek_jax.training.experiment import Experiment
from deepseek_jax.training.optimizer import map_moments
from deepseek_jax.training.step import Hyperparameters, Trainer, TrainState
from deepseek_jax.training.step_config import step_config
from deepseek_jax.tree import Tree, flatten


@dataclasses.dataclass(frozen=True)
class ParameterRow:
    """One array of a running step's parameters, or of its router biases. Bytes are those of one device."""

    name: str
    shape: tuple[int, ...]
    """Global; stacked kinds of layers are `[rank, slot, ...]`."""
    partition: tuple[tuple[str, ...], ...]
    """Of the master copy, its moments and its summed gradient: the mesh axes that split each dimension."""
    copy_dtype: str
    copy_partition: tuple[tuple[str, ...], ...]
    """Of the working copy and of the gradient that microbatches are added to."""
    elements: int
    """Of the model's layers together: `shape` without the slots that stay empty."""
    mtp_elements: int
    """Of these those of MTP modules, which published totals leave out."""
    master_bytes: int
    moment_bytes: int
    copy_bytes: int
    """Of the working copy, of its codes and scales in FP8; 0 where the master is used itself."""
    gradient_bytes: int
    """Of the sum over microbatches, float32; 0 for router biases."""

    @property
    def held_elements(self) -> int:
        """Elements of the whole array, empty slots included."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class ShardingTable:
    """The parameters and router biases of a recipe on a mesh, and what a step communicates."""

    mesh: Mapping[str, int]
    """Sizes of the axes, in their order."""
    parameters: tuple[ParameterRow, ...]
    biases: tuple[ParameterRow, ...]
    state_bytes_per_element: int
    """Of a master copy and its moments."""
    batch_rows: int
    """Sequences of a step, at the end of the batch's ramp."""
    sequence_length: int
    microbatches: int
    """Of one device."""
    collectives: tuple[Collective, ...]

    @property
    def devices(self) -> int:
        """Of the mesh."""
        return math.prod(self.mesh.values())

    @property
    def rows(self) -> tuple[ParameterRow, ...]:
        """Parameters, then router biases."""
        return self.parameters + self.biases

    def elements(self, *, mtp: bool) -> int:
        """Parameters and router biases of the main model, or of its MTP modules."""
        of_mtp = sum(row.mtp_elements for row in self.rows)
        return of_mtp if mtp else sum(row.elements for row in self.rows) - of_mtp

    @property
    def least_state_bytes(self) -> float:
        """Master copies and moments of one device, were they split evenly over all and no slot empty."""
        return self.state_bytes_per_element * sum(row.elements for row in self.parameters) / self.devices


def abstract_mesh(parallel: ParallelConfig) -> AbstractMesh:
    """The mesh of a layout, without devices."""
    return AbstractMesh(parallel.shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_trainer(experiment: Experiment, mesh: Mesh | None = None) -> Trainer:
    """The trainer of an experiment on a mesh without devices, or on one whose devices exist in description only.

    Raises:
      ConfigError: the model does not fit the mesh.
    """
    return Trainer(
        Transformer(experiment.model, experiment.precision.fp8),
        place(
            experiment.model,
            experiment.parallel.layers_per_stage,
            stage_map=experiment.parallel.schedule_choice.stage_map,
        ),
        mesh or abstract_mesh(experiment.parallel),
        experiment.optimizer.make,
        step_config(experiment),
    )


def abstract_state(trainer: Trainer) -> TrainState:
    """Shapes, dtypes and shardings of a state."""
    params = trainer.params_layout.abstract()
    state = TrainState(
        params,
        trainer.bias_layout.abstract(),
        jax.eval_shape(trainer.optimizer.init, params),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    placed = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(placed, state, trainer.state_shardings())


def step_collectives(trainer: Trainer, shape: tuple[int, int]) -> tuple[Collective, ...]:
    """The collectives of one step of the first setting over a global batch of this shape, `[rows, S + 1]`."""
    batch = Microbatch(*(jax.ShapeDtypeStruct(shape, jnp.int32) for _ in Microbatch._fields))
    scalar: Any = jax.ShapeDtypeStruct((), jnp.float32)
    hyper = Hyperparameters(scalar, scalar, scalar)
    program = jax.make_jaxpr(trainer._sharded_step, static_argnums=3)(abstract_state(trainer), batch, hyper, 0)
    if trainer.schedule.ranks == 1:
        return collectives(program)
    tables = make_tables(trainer.schedule.make(trainer.microbatches(shape)))
    steady = trainer.overlap != "off" and bool(known_ticks(tables.steady, tables.schedule.stages.slots))
    return collectives(program, work_shares(tables, steady=steady))


def sharding_table(experiment: Experiment) -> ShardingTable:
    """The table of an experiment on the mesh that its `parallel` describes; the batch is the run's last.

    Raises:
      ConfigError: the model does not fit the mesh.
    """
    trainer = abstract_trainer(experiment)
    state = abstract_state(trainer)
    rows = experiment.schedule.rows(experiment.schedule.total_tokens - 1)
    padded = trainer.padded_rows(rows)
    length = experiment.data.sequence_length
    moments, per_element = _moments(state)
    return ShardingTable(
        mesh=dict(trainer.mesh.shape),
        parameters=_rows(trainer, trainer.params_layout, state.params, moments),
        biases=_rows(trainer, trainer.bias_layout, state.router_bias, None),
        state_bytes_per_element=4 + per_element,
        batch_rows=rows,
        sequence_length=length,
        microbatches=trainer.microbatches((padded, length + 1)),
        collectives=step_collectives(trainer, (padded, length + 1)),
    )


def _rows(
    trainer: Trainer, layout: ParameterLayout, values: Tree, moments: Mapping[str, int] | None
) -> tuple[ParameterRow, ...]:
    """A row for each array of a layout; `moments` are the bytes of each, None for arrays that are not trained."""
    specs, arrays = flatten(layout.specs), flatten(values)
    copies = flatten(dataclasses.replace(layout, zero=False).partition())
    rows = []
    in_fp8 = set(quantized_names(trainer.model))
    for name, array in arrays.items():
        spec, kind, sharding = specs[name], name.split(".")[0], array.sharding
        layers = [name]
        if kind in KINDS:
            layers = [layer for *_, layer in layout.placement.arrays(kind, [name.partition(".")[2]])]
        modules = sum(layer.startswith("mtp.") for layer in layers)
        dtype = array.dtype if spec.full_precision else jnp.dtype(trainer.config.compute_dtype)
        shape = NamedSharding(trainer.mesh, copies[name]).shard_shape(array.shape)
        whole = math.prod(shape)
        copy_bytes = whole * dtype.itemsize
        if name in in_fp8:
            assert trainer.model.fp8 is not None
            copy = jax.eval_shape(functools.partial(quantize_weight, config=trainer.model.fp8), _like(shape))
            dtype, copy_bytes = copy.codes.dtype, whole + copy.scales.size * copy.scales.dtype.itemsize
        is_copied = dtype != array.dtype or copies[name] != sharding.spec
        # Where two directions share the model, a device works with its own stage and with the mirrored one.
        mirrored = layout.placement.stage_map.copies - 1 if kind in KINDS else 0
        rows.append(
            ParameterRow(
                name=name,
                shape=array.shape,
                partition=_partition(sharding.spec, array.ndim),
                copy_dtype=str(dtype),
                copy_partition=_partition(copies[name], array.ndim),
                elements=len(layers) * math.prod(spec.shape),
                mtp_elements=modules * math.prod(spec.shape),
                master_bytes=_shard_bytes(array),
                moment_bytes=0 if moments is None else moments[name],
                copy_bytes=copy_bytes * (is_copied + mirrored),
                gradient_bytes=0 if moments is None else whole * 4 * (1 + mirrored),
            )
        )
    return tuple(rows)


def _like(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _moments(state: TrainState) -> tuple[dict[str, int], int]:
    """Bytes on one device of what the optimizer keeps of each parameter's shape, and bytes of it per element."""
    parts: list[dict[str, Any]] = []
    map_moments(lambda _, part: parts.append(flatten(part)), state.opt_state, state.params, other=lambda *_: None)
    per_element = sum(next(iter(part.values())).dtype.itemsize for part in parts)
    return {name: sum(_shard_bytes(part[name]) for part in parts) for name in flatten(state.params)}, per_element


def _shard_bytes(array: jax.ShapeDtypeStruct) -> int:
    """What one device holds of an array."""
    assert array.sharding is not None
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def _partition(spec: P, dimensions: int) -> tuple[tuple[str, ...], ...]:
    """The mesh axes of each dimension."""
    entries = (*spec, *(None,) * (dimensions - len(spec)))
    return tuple(() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in entries)
