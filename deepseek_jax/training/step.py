"""The train step: one jitted function around one `shard_map` over all mesh axes.

Weights gathered, forward and backward by the pipeline, gradients summed over data ranks and scattered, clipped, AdamW
on each rank's part, the router bias moved by the load of the whole global batch. Every collective of a step is in this
file or in `parallel/`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.compat import to_varying, varying_axes
from deepseek_jax.config import require
from deepseek_jax.model.parameters import RouterBias, parameter_specs
from deepseek_jax.model.quantized import quantize_weights
from deepseek_jax.model.staged import staged_model
from deepseek_jax.model.targets import Microbatch, targets
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.dispatch import (
    Dispatcher,
    ExpertMesh,
    LocalDispatcher,
    check_experts,
    choose_dispatcher,
    dispatchers,
)
from deepseek_jax.parallel.mesh import AXES, BATCH_AXES
from deepseek_jax.parallel.pipeline.choice import ScheduleChoice
from deepseek_jax.parallel.pipeline.executor import pipeline
from deepseek_jax.parallel.pipeline.protocol import LayerStats, LossScales, StagedModel
from deepseek_jax.parallel.pipeline.stage import merge
from deepseek_jax.parallel.pipeline.ticks import Overlap
from deepseek_jax.parallel.placement import KINDS, ParameterLayout, Placement
from deepseek_jax.parallel.sharding import BATCH_SPEC, largest_over, mesh_axes_of, sum_over
from deepseek_jax.parallel.vocabulary import ShardedVocabulary, WholeVocabulary, check_vocabulary
from deepseek_jax.parallel.zero import gather, reduce_scatter
from deepseek_jax.training.balance import update_bias
from deepseek_jax.training.room import RoomControl
from deepseek_jax.training.step_config import StepConfig
from deepseek_jax.training.step_metrics import LayerRows, StepMetrics, over_ranks
from deepseek_jax.tree import Tree, flatten, map_leaves, unflatten


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes. Parameters are float32 masters; stacked kinds are `[rank, slot, ...]`."""

    params: Tree
    router_bias: Tree
    """float32 `[rank, slot, E]` under the same names as the routers; not the optimizer's."""
    opt_state: Any
    step: Any
    """int32 scalar: optimizer steps taken."""


class Hyperparameters(NamedTuple):
    """The schedules' values for one step, float32 scalars."""

    learning_rate: jax.Array | np.float32
    mtp_weight: jax.Array | np.float32
    bias_rate: jax.Array | np.float32


class Trainer:
    """Binds a model to a mesh and an optimizer: makes the state, steps it, evaluates it."""

    def __init__(
        self,
        model: Transformer,
        placement: Placement,
        mesh: Mesh | AbstractMesh,
        optimizer: Callable[[Tree], optax.GradientTransformation],
        config: StepConfig,
    ):
        require(
            tuple(mesh.axis_names) == AXES,
            f"the mesh has the axes {', '.join(mesh.axis_names)}, a trainer needs {', '.join(AXES)}: make it with "
            "make_mesh",
        )
        self.model, self.placement, self.mesh, self.config = model, placement, mesh, config
        self.schedule = ScheduleChoice(config.schedule, mesh.shape["pipe"], config.chunks, config.put_off)
        # A mesh without devices stands for GPUs; steady ticks send what braided ones do, and say more of what for.
        platform = mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else None
        best: Overlap = "steady" if platform is None else "off" if platform == "cpu" else "braid"
        self.overlap: Overlap = config.overlap or best
        self._experts = ExpertMesh(mesh.shape["node"], mesh.shape["expert"])
        check_vocabulary(model.config.vocab_size, mesh.shape["pipe"])
        check_experts(model.config.moe, self._experts, choose_dispatcher(config.dispatcher, self._experts))
        self.params_layout = ParameterLayout(parameter_specs(model), placement, mesh, zero=config.zero)
        self.bias_layout = ParameterLayout(parameter_specs(model, RouterBias), placement, mesh)
        stages, wanted = placement.stage_map, self.schedule.stage_map
        require(
            stages.stages == wanted.stages
            and all(
                stages.stage(rank, slot) == wanted.stage(rank, slot)
                for rank in range(stages.ranks)
                for slot in range(stages.stages // stages.ranks)
            ),
            f"layers are placed in {stages.kind} stages, schedule {config.schedule} runs {wanted.kind} ones: place "
            "them with its stage_map",
        )
        self.optimizer = optimizer(self.params_layout.specs)
        self.layers = LayerRows(placement, mesh)
        self.room, self._evaluation_room = RoomControl(), RoomControl()
        self.compiling: Callable[[], AbstractContextManager] = contextlib.nullcontext
        """Entered around a step that is compiled first: for what measures time."""
        self._compiled: set[tuple[tuple[int, ...], int]] = set()
        self._step = jax.jit(self._sharded_step, donate_argnums=0, static_argnums=3)
        self._evaluate = jax.jit(self._sharded_evaluate, static_argnums=2)

    # --- state ---

    def initial_state(self, seed: int) -> TrainState:
        """Weights drawn from `seed`, zero moments and biases, step 0."""
        return self.fresh_state(self.params_layout.initial(seed), self.bias_layout.initial(seed))

    def fresh_state(self, params: Tree, router_bias: Tree) -> TrainState:
        """The state that starts a run from given weights."""
        shardings = self.state_shardings()
        opt_state = jax.jit(self.optimizer.init, out_shardings=shardings.opt_state)(params)
        step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)
        return TrainState(params, router_bias, opt_state, step)

    def state_specs(self) -> TrainState:
        """A `PartitionSpec` for each array of the state."""
        params = self.params_layout.partition()
        opt_state = jax.eval_shape(self.optimizer.init, self.params_layout.abstract())
        opt_specs = optax.tree.map_params(
            self.optimizer, lambda _, spec: spec, opt_state, params, transform_non_params=lambda _: P()
        )
        return TrainState(params, self.bias_layout.partition(), opt_specs, P())

    def state_shardings(self) -> TrainState:
        """A `NamedSharding` for each array of the state."""
        is_spec = lambda leaf: isinstance(leaf, P)  # noqa: E731
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self.state_specs(), is_leaf=is_spec)

    # --- running ---

    def step(self, state: TrainState, batch: Microbatch, hyper: Hyperparameters) -> tuple[TrainState, StepMetrics]:
        """One optimizer step over a global batch of rows `[rows, S + 1]`; `state` is donated.

        Where experts are spread over devices this waits for the step, which may have to run again with more room.
        """
        self._check_rows(batch.tokens.shape[0])
        ladder = self.dispatchers(batch.tokens.shape)
        if len(ladder) == 1:
            self.room.used = 0
            return self._run(state, batch, hyper, 0)
        while True:
            state, metrics = self._run(state, batch, hyper, self.room.setting(ladder))
            lost, demand = jax.device_get((metrics.lost, metrics.demand))
            if not lost:
                self.room.fitted(ladder, demand, self._microbatch_tokens(batch.tokens.shape))
                return state, metrics
            self.room.overflowed(ladder)

    def _run(self, state: TrainState, batch: Microbatch, hyper: Hyperparameters, setting: int):
        shape = batch.tokens.shape
        if (shape, setting) in self._compiled:
            return self._step(state, batch, hyper, setting)
        self._compiled.add((shape, setting))
        jax.block_until_ready(state)  # the steps that still run are not part of it
        with self.compiling():
            return self._step(state, batch, hyper, setting)

    def evaluate(self, state: TrainState, batch: Microbatch) -> tuple[jax.Array, jax.Array]:
        """Sum of the main model's cross entropies (nats) over a batch, and the number of labels."""
        self._check_rows(batch.tokens.shape[0])
        ladder = self.dispatchers(batch.tokens.shape)
        while True:
            loss, labels, lost = self._evaluate(state, batch, self._evaluation_room.setting(ladder))
            if len(ladder) == 1 or not int(lost):
                return loss, labels
            self._evaluation_room.overflowed(ladder)

    def lower(self, state, batch, hyper, setting: int = 0):
        """The step, lowered for abstract or real arguments, to compile or inspect."""
        self._check_rows(batch.tokens.shape[0])
        return self._step.lower(state, batch, hyper, setting)

    def dispatchers(self, shape: tuple[int, ...]) -> tuple[Dispatcher, ...]:
        """The ladder of settings for a global batch of this shape, `[rows, S + 1]`."""
        config = self.model.config
        if not config.num_moe_layers and not config.mtp_depth:
            return (LocalDispatcher(config.moe.num_experts),)  # nothing is ever sent
        return dispatchers(
            self.config.dispatcher,
            self.model.config.moe,
            self._experts,
            tokens=self._microbatch_tokens(shape),
            slack=self.config.capacity,
            alignment=self.model.alignment,
            wire=self.config.dispatch_dtype,
        )

    # --- per-device code ---

    def staged(self, dispatcher: Dispatcher) -> StagedModel:
        """The model's functions, with tokens reaching their experts through `dispatcher`."""
        return staged_model(
            self.model,
            compute_dtype=self.config.compute_dtype,
            mask_documents=self.config.mask_documents,
            balance_from_routed=self.config.balance_from_routed,
            force_balance=self.config.force_balance,
            dispatcher=dispatcher,
            vocabulary=ShardedVocabulary() if self.mesh.shape["pipe"] > 1 else WholeVocabulary(),
        )

    def _sharded_step(self, state, batch, hyper, setting: int = 0):
        specs, dispatcher = self.state_specs(), self.dispatchers(batch.tokens.shape)[setting]
        return jax.shard_map(
            functools.partial(self._device_step, dispatcher),
            mesh=self.mesh,
            in_specs=(specs, BATCH_SPEC, P()),
            out_specs=(specs, P()),
        )(state, batch, hyper)

    def _sharded_evaluate(self, state, batch, setting: int = 0):
        specs, dispatcher = self.state_specs(), self.dispatchers(batch.tokens.shape)[setting]
        return jax.shard_map(
            functools.partial(self._device_evaluate, dispatcher),
            mesh=self.mesh,
            in_specs=(specs, BATCH_SPEC),
            out_specs=(P(), P(), P()),
        )(state, batch)

    def _device_step(self, dispatcher: Dispatcher, state: TrainState, batch: Microbatch, hyper: Hyperparameters):
        microbatches, run = self._microbatches(batch, dispatcher)
        counts = self._counts(batch)
        scales = LossScales(
            main=1 / counts["labels"],
            mtp=hyper.mtp_weight / max(self.model.config.mtp_depth, 1) / counts["labels"],
            balance=self.config.balance_weight / counts["sequences"],
        )
        outputs, gradients = run.value_and_grad(*self._local_weights(state), microbatches, scales)
        with jax.named_scope("sum_outputs"):
            received = self.layers.on_all_devices(outputs.stats)
            outputs = outputs._replace(
                loss=sum_over(outputs.loss),
                sums=jax.tree.map(sum_over, outputs.sums),
                stats={kind: over_ranks(stats) for kind, stats in outputs.stats.items()},
            )
        gradients = self._reduce(self._restack(gradients))
        grad_norm = self._global_norm(gradients)
        clip = jnp.minimum(1, self.config.clip_norm / grad_norm)
        gradients = map_leaves(lambda g: g * clip, gradients)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        learning_rate = hyper.learning_rate
        params = map_leaves(lambda p, u: p - learning_rate.astype(p.dtype) * u, state.params, updates)
        bias = self._update_bias(state.router_bias, outputs.stats, hyper.bias_rate)
        metrics = self.layers.metrics(outputs, counts, grad_norm, received)
        after = TrainState(params, bias, opt_state, state.step + 1)
        if not isinstance(dispatcher, LocalDispatcher):
            after = jax.tree.map(lambda new, old: jnp.where(metrics.lost == 0, new, old), after, state)
        return after, metrics

    def _device_evaluate(self, dispatcher: Dispatcher, state: TrainState, batch: Microbatch):
        microbatches, run = self._microbatches(batch, dispatcher)
        zero = jnp.zeros((), jnp.float32)
        outputs = run.evaluate(*self._local_weights(state), microbatches, LossScales(zero, zero, zero))
        lost = largest_over(self.layers.of(outputs.stats, lambda stats: stats.traffic.lost).max(initial=0))
        return sum_over(outputs.sums["loss_main"]), self._counts(batch)["labels"], lost

    def _microbatch_tokens(self, shape: tuple[int, ...]) -> int:
        """Tokens of a microbatch on a device, of a global batch `[rows, S + 1]`."""
        rows = shape[0] // math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)
        return self._microbatch_rows(rows) * (shape[1] - 1)

    def padded_rows(self, rows: int) -> int:
        """How many rows a global batch of so many is to have, with empty ones, for this mesh and schedule.

        Raises:
          ConfigError: there is no schedule for so many.
        """
        shards = math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)
        share = -(-rows // shards)
        size = self._microbatch_rows(share)
        return shards * size * self.schedule.fitting(-(-share // size))

    def _check_rows(self, rows: int) -> None:
        """Raises `ConfigError` where a batch does not split into the microbatches of a schedule."""
        padded = self.padded_rows(rows)
        shards = math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)
        require(
            padded == rows,
            f"a batch of {rows} rows does not split over {shards} devices into microbatches that there is a schedule "
            f"for: pad it to {padded} rows (Trainer.padded_rows)",
        )

    def microbatches(self, shape: tuple[int, ...]) -> int:
        """Microbatches of a global batch `[rows, S + 1]`."""
        rows = shape[0] // math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)
        return rows // self._microbatch_rows(rows)

    def _microbatch_rows(self, rows: int) -> int:
        """Rows of a microbatch, where a device has `rows`: in a pipeline one unless it is said."""
        if self.schedule.ranks > 1:
            return self.config.microbatch_rows or 1
        return min(self.config.microbatch_rows or rows, rows)

    def _microbatches(self, batch: Microbatch, dispatcher: Dispatcher):
        rows = batch.tokens.shape[0]
        size = self._microbatch_rows(rows)
        split = jax.tree.map(lambda leaf: leaf.reshape(rows // size, size, *leaf.shape[1:]), batch)
        return split, pipeline(
            self.staged(dispatcher),
            self.schedule.make(rows // size),
            occupied=self.placement.occupied(),
            recompute=self.config.recompute,
            unroll_layers=self.config.unroll_layers,
            overlap=self.overlap,
        )

    @jax.named_scope("count_labels")
    def _counts(self, batch: Microbatch) -> dict[str, jax.Array]:
        """Labels and non-empty sequences of the whole global batch, at least 1 each."""
        labels = targets(batch, within_documents=self.config.mask_documents).weights.sum()
        sequences = (batch.segment_ids > 0).any(axis=1).sum().astype(jnp.float32)
        return {
            "labels": jnp.maximum(sum_over(labels, BATCH_AXES), 1),
            "sequences": jnp.maximum(sum_over(sequences, BATCH_AXES), 1),
        }

    @jax.named_scope("gather_weights")
    def _local_weights(self, state: TrainState) -> tuple[Tree, Tree]:
        """This device's whole weights in the compute dtype, varying over every axis, stacks as `[slot, ...]`; and the
        router biases, with the quantised copies of weights."""

        def local(stacked, spec, split, value):
            if not spec.full_precision and self.config.compute_dtype != jnp.float32:
                value = value.astype(self.config.compute_dtype)
            # Cast first, so that masters of four bytes travel as two.
            return to_varying(gather(value[0] if stacked else value, split, lead=int(stacked)), AXES)

        def tree(layout: ParameterLayout, values):
            splits = layout.splits()
            return {
                name: map_leaves(
                    functools.partial(local, name in KINDS), layout.specs[name], splits[name], values[name]
                )
                for name in values
            }

        params, fixed = tree(self.params_layout, state.params), tree(self.bias_layout, state.router_bias)
        if self.model.fp8 is None:
            return params, fixed
        copies, params = quantize_weights(self.model, params, self.model.fp8)
        return params, merge(fixed, copies)

    def _restack(self, gradients: Tree) -> Tree:
        return {k: map_leaves(lambda g: g[None], tree) if k in KINDS else tree for k, tree in gradients.items()}

    @jax.named_scope("reduce_gradients")
    def _reduce(self, gradients: Tree) -> Tree:
        """Sums each gradient over the axes along which its parameter has copies; a rank keeps what it is to update."""
        partition, splits = self.params_layout.partition(), self.params_layout.splits()

        def reduce(stacked: bool, spec: P, split, g: jax.Array) -> jax.Array:
            g = reduce_scatter(g, split, lead=2 * stacked)
            return sum_over(g, tuple(axis for axis in AXES if axis not in mesh_axes_of(spec)))

        return {
            name: map_leaves(functools.partial(reduce, name in KINDS), partition[name], splits[name], gradients[name])
            for name in gradients
        }

    @jax.named_scope("grad_norm")
    def _global_norm(self, gradients: Tree) -> jax.Array:
        """The norm of all gradients together: every number counts once, wherever its one copy is."""
        by_axes: dict[frozenset[str], list[jax.Array]] = {}
        for gradient in flatten(gradients).values():
            square = jnp.sum(jnp.square(gradient))
            by_axes.setdefault(varying_axes(square), []).append(square)
        # One sum over devices for all that are split alike.
        return jnp.sqrt(sum(sum_over(jnp.stack(squares).sum()) for squares in by_axes.values()))

    def _update_bias(self, bias: Tree, stats: dict[str, LayerStats], rate: jax.Array | np.float32) -> Tree:
        """Moves every router's bias `[1, slot, E]` by its kind's loads `[slot, E]`."""

        def moved(name: str, value: jax.Array) -> jax.Array:
            return update_bias(value, stats[name.split(".")[0]].load[None], rate)

        return unflatten({name: moved(name, value) for name, value in flatten(bias).items()})
