"""The train step: one jitted function around one `shard_map` over all mesh axes.

Weights gathered, forward and backward by the pipeline, gradients summed over data ranks and scattered, clipped, AdamW
on each rank's part, the router bias moved by the load of the whole global batch. Every collective of a step is in this
file or in `parallel/`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax import ops
from deepseek_jax.compat import to_varying, varying_axes
from deepseek_jax.model.parameters import RouterBias, parameter_specs
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
from deepseek_jax.parallel.pipeline.executor import Outputs, pipeline
from deepseek_jax.parallel.pipeline.protocol import LayerStats, LossScales, StagedModel
from deepseek_jax.parallel.placement import KINDS, ParameterLayout, Placement
from deepseek_jax.parallel.sharding import BATCH_SPEC, largest_over, mesh_axes_of, sum_over
from deepseek_jax.parallel.vocabulary import ShardedVocabulary, WholeVocabulary, check_vocabulary
from deepseek_jax.parallel.zero import gather, reduce_scatter
from deepseek_jax.training.balance import max_violation, update_bias
from deepseek_jax.training.room import RoomControl
from deepseek_jax.training.step_config import StepConfig
from deepseek_jax.tree import Tree, flatten, map_leaves, unflatten


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes. Parameters are float32 masters; stacked kinds are `[stage, slot, ...]`."""

    params: Tree
    router_bias: Tree
    """float32 `[stage, slot, E]` under the same names as the routers; not the optimizer's."""
    opt_state: Any
    step: Any
    """int32 scalar: optimizer steps taken."""


class Hyperparameters(NamedTuple):
    """The schedules' values for one step, float32 scalars."""

    learning_rate: jax.Array | np.float32
    mtp_weight: jax.Array | np.float32
    bias_rate: jax.Array | np.float32


class StepMetrics(NamedTuple):
    """What a step reports; losses are means over the global batch, in nats."""

    loss: jax.Array
    loss_main: jax.Array
    loss_mtp: jax.Array
    """Mean over depths, without λ."""
    loss_balance: jax.Array
    """Mean over sequences of Σ f_i P_i over layers, without α."""
    grad_norm: jax.Array
    load: jax.Array
    """int32 `[MoE layers and MTP modules, E]`."""
    max_vio: jax.Array
    """float32, one per row of `load`."""
    received: jax.Array
    """int32 `[MoE layers and MTP modules, devices that share a batch]`: rows that each device's experts computed."""
    crossed: jax.Array
    """int32 `[MoE layers and MTP modules, hops]`: rows that devices sent to others, all together."""
    demand: jax.Array
    """int32 `[hops + 1]`: the most that any layer needed room for anywhere; see `Traffic`."""
    lost: jax.Array
    """int32 scalar: the most rows of one layer on one device without room. Unless it is 0, the step changed nothing and
    is to be run again with more."""


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
        self.model, self.placement, self.mesh, self.config = model, placement, mesh, config
        self.schedule = ScheduleChoice(config.schedule, mesh.shape["pipe"], config.chunks)
        self._experts = ExpertMesh(mesh.shape["node"], mesh.shape["expert"])
        check_vocabulary(model.config.vocab_size, mesh.shape["pipe"])
        check_experts(model.config.moe, self._experts, choose_dispatcher(config.dispatcher, self._experts))
        self.params_layout = ParameterLayout(parameter_specs(model), placement, mesh, zero=config.zero)
        self.bias_layout = ParameterLayout(parameter_specs(model, RouterBias), placement, mesh)
        self.optimizer = optimizer(self.params_layout.specs)
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
        ladder = self.dispatchers(batch.tokens.shape)
        while True:
            loss, labels, lost = self._evaluate(state, batch, self._evaluation_room.setting(ladder))
            if len(ladder) == 1 or not int(lost):
                return loss, labels
            self._evaluation_room.overflowed(ladder)

    def lower(self, state, batch, hyper, setting: int = 0):
        """The step, lowered for abstract or real arguments, to compile or inspect."""
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
            alignment=ops.preferred_alignment(),
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
            received = self._on_all_devices(self._by_layer(outputs, lambda stats: stats.traffic.received))
            outputs = outputs._replace(
                loss=sum_over(outputs.loss),
                sums=jax.tree.map(sum_over, outputs.sums),
                stats={kind: _over_ranks(stats) for kind, stats in outputs.stats.items()},
            )
        gradients = self._reduce(self._restack(gradients))
        grad_norm = self._global_norm(gradients)
        clip = jnp.minimum(1, self.config.clip_norm / grad_norm)
        gradients = map_leaves(lambda g: g * clip, gradients)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        learning_rate = hyper.learning_rate
        params = map_leaves(lambda p, u: p - learning_rate.astype(p.dtype) * u, state.params, updates)
        bias = self._update_bias(state.router_bias, outputs.stats, hyper.bias_rate)
        metrics = self._metrics(outputs, counts, grad_norm, received)
        after = TrainState(params, bias, opt_state, state.step + 1)
        if not isinstance(dispatcher, LocalDispatcher):
            after = jax.tree.map(lambda new, old: jnp.where(metrics.lost == 0, new, old), after, state)
        return after, metrics

    def _device_evaluate(self, dispatcher: Dispatcher, state: TrainState, batch: Microbatch):
        microbatches, run = self._microbatches(batch, dispatcher)
        zero = jnp.zeros((), jnp.float32)
        outputs = run.evaluate(*self._local_weights(state), microbatches, LossScales(zero, zero, zero))
        lost = largest_over(self._by_layer(outputs, lambda stats: stats.traffic.lost).max(initial=0))
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

    def microbatches(self, shape: tuple[int, ...]) -> int:
        """Microbatches of a global batch `[rows, S + 1]`."""
        rows = shape[0] // math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)
        return rows // self._microbatch_rows(rows)

    def _microbatch_rows(self, rows: int) -> int:
        """Rows of a microbatch, where a device has `rows`: in a pipeline one unless it is said."""
        return min(self.config.microbatch_rows or (1 if self.schedule.ranks > 1 else rows), rows)

    def _microbatches(self, batch: Microbatch, dispatcher: Dispatcher):
        rows = batch.tokens.shape[0]
        size = self._microbatch_rows(rows)
        if rows % size:
            raise ValueError(f"{rows} rows per device do not split into microbatches of {size}; pad the batch first")
        split = jax.tree.map(lambda leaf: leaf.reshape(rows // size, size, *leaf.shape[1:]), batch)
        return split, pipeline(
            self.staged(dispatcher),
            self.schedule.make(rows // size),
            occupied=self.placement.occupied(),
            recompute=self.config.recompute,
            unroll_layers=self.config.unroll_layers,
            overlap=self.config.overlap or ("none" if jax.default_backend() == "cpu" else "braid"),
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
        """This device's whole weights in the compute dtype, varying over every axis, stacks as `[slot, ...]`."""

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

        return tree(self.params_layout, state.params), tree(self.bias_layout, state.router_bias)

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

    def _by_layer(self, outputs: Outputs, leaf: Callable[[LayerStats], jax.Array]) -> jax.Array:
        """One leaf of the stats of all layers with experts, MTP modules last: `[layers, ...]`."""
        kinds = [kind for kind in KINDS if kind in outputs.stats]
        if not kinds:
            return jnp.zeros((0, 1), jnp.int32)
        mine = jnp.concatenate([leaf(outputs.stats[kind]) for kind in kinds])
        rows, count = self._rows_of_layers(tuple(kinds))
        row = jnp.asarray(rows)[lax.axis_index("pipe")]
        # An empty slot has no row; each row is one rank's.
        return sum_over(jnp.zeros((count, *mine.shape[1:]), mine.dtype).at[row].set(mine, mode="drop"), ("pipe",))

    def _rows_of_layers(self, kinds: tuple[str, ...]) -> tuple[np.ndarray, int]:
        """For each slot of a rank's stacks the place of its layer among all with experts, int32 `[P, slots]`, or the
        number of these for an empty one; and that number."""
        by_rank = zip(*(self.placement.stacks(kind) for kind in kinds), strict=True)
        stacks = [list(itertools.chain(*of_kinds)) for of_kinds in by_rank]
        names = sorted(filter(None, itertools.chain(*stacks)), key=lambda name: (name[0], int(name.split(".")[1])))
        place = {name: row for row, name in enumerate(names)} | {None: len(names)}
        return np.array([[place[name] for name in stack] for stack in stacks], np.int32), len(names)

    def _on_all_devices(self, counts: jax.Array) -> jax.Array:
        """Every device's counts int32 `[layers]`, on all devices: `[layers, devices that share a batch]`."""
        devices = math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)
        mine = jnp.arange(devices) == lax.axis_index(BATCH_AXES)
        return sum_over(jnp.where(mine, counts.reshape(-1, 1), 0))

    def _metrics(
        self, outputs: Outputs, counts: dict[str, jax.Array], grad_norm: jax.Array, received: jax.Array
    ) -> StepMetrics:
        load = self._by_layer(outputs, lambda stats: stats.load)
        depth = max(self.model.config.mtp_depth, 1)
        return StepMetrics(
            loss=outputs.loss,
            loss_main=outputs.sums["loss_main"] / counts["labels"],
            loss_mtp=outputs.sums["loss_mtp"] / depth / counts["labels"],
            loss_balance=outputs.sums["loss_balance"] / counts["sequences"],
            grad_norm=grad_norm,
            load=load,
            max_vio=max_violation(load),
            received=received,
            crossed=self._by_layer(outputs, lambda stats: stats.traffic.crossed),
            demand=self._by_layer(outputs, lambda stats: stats.traffic.demand).max(axis=0, initial=0),
            lost=self._by_layer(outputs, lambda stats: stats.traffic.lost).max(initial=0),
        )


def _over_ranks(stats: LayerStats) -> LayerStats:
    """A rank's stats of all devices that share a batch: sums, and the largest of what any demands, and of what it loses.

    A sum of what all devices lose in a whole batch would overflow, and might come out as zero.
    """
    total = jax.tree.map(functools.partial(sum_over, axes=BATCH_AXES), stats)
    worst = {name: largest_over(getattr(stats.traffic, name), BATCH_AXES) for name in ("demand", "lost")}
    return total._replace(traffic=total.traffic._replace(**worst))
