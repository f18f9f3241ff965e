"""The program that runs a schedule's tables: every rank in lock step, tick by tick, in at most three scans.

In a tick a rank writes what the last tick received into its rings, works on the ends that the table calls all ranks to,
does its B, its W and its F, and sends. Work that the table may leave out is a loop of one turn or none, whose carry is
what it adds to: XLA updates that in place, where it would copy what goes through a conditional. The steady ticks, in
which every rank does F and a full backward, have neither: their pattern of slots, ends and messages is known
beforehand, and repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.compat import to_varying
from deepseek_jax.parallel.mesh import AXES
from deepseek_jax.parallel.pipeline import arrays
from deepseek_jax.parallel.pipeline.arrays import add, after, joined, parted, put, take, where, wide_zeros, zeros
from deepseek_jax.parallel.pipeline.braid import braid
from deepseek_jax.parallel.pipeline.evaluate import Row, as_array, rows_of
from deepseek_jax.parallel.pipeline.left_out import adding, when
from deepseek_jax.parallel.pipeline.phases import Phase, Phases
from deepseek_jax.parallel.pipeline.protocol import LossScales, Streams
from deepseek_jax.parallel.pipeline.rings import Made, Post, Rings, StageShapes
from deepseek_jax.parallel.pipeline.schedule import Schedule
from deepseek_jax.parallel.pipeline.split_vjp import SplitVjp, split_vjp
from deepseek_jax.parallel.pipeline.stage import STACKS, Occupied, Stage, StageOutputs
from deepseek_jax.parallel.pipeline.steady import Tick, known_ticks
from deepseek_jax.parallel.pipeline.tables import END_COLUMNS, TickTables, make_tables
from deepseek_jax.parallel.pipeline.totals import Totals, joined_stats
from deepseek_jax.tree import Tree

Overlap = Literal["off", "steady", "braid"]
"""Whether steady ticks are run by a body of their own, in which nothing keeps a forward's exchanges from running beside
a backward's compute; and whether the equations of both are interleaved in it."""


class Machine:
    """A model and a schedule, ready to be run by every rank."""

    def __init__(
        self, stage: Stage, schedule: Schedule, occupied: Mapping[str, np.ndarray], *, overlap: Overlap = "off"
    ):
        """`occupied`: per stack bool `[stages, slots]`, which of a stage's slots hold a layer."""
        self.stage, self.schedule, self.overlap = stage, schedule, overlap
        stages = schedule.stages
        where_is = np.array([[stages.stage(r, s) for s in range(stages.slots)] for r in range(schedule.ranks)])
        self.occupied = {kind: np.asarray(of_stages)[where_is] for kind, of_stages in occupied.items()}
        """Per stack bool `[ranks, slots, layers]`."""
        self.first, self.last = where_is == 0, where_is == stages.stages - 1
        """bool `[ranks, slots]`."""

    def value_and_grad(self, params: Tree, state: Tree, batch: Any, scales: LossScales):
        """((loss, sums, stats), gradients)."""
        return _Run(self, make_tables(self.schedule), params, state, batch, scales).train()

    def evaluate(self, params: Tree, state: Tree, batch: Any, scales: LossScales):
        """(loss, sums, stats), by the schedule's forwards alone."""
        return _Run(self, make_tables(self.schedule, forward_only=True), params, state, batch, scales).evaluate()


class _Run:
    """One tracing of the program, inside `shard_map`."""

    def __init__(self, machine: Machine, tables: TickTables, params: Tree, state: Tree, batch: Any, scales: LossScales):
        self.machine, self.tables, self.stages = machine, tables, machine.schedule.stages
        self.model = machine.stage.model
        self.trains = bool((tables.b_slot >= 0).any())
        self.pattern = () if machine.overlap == "off" else known_ticks(tables.steady, self.stages.slots)
        self.rank = to_varying(lax.axis_index("pipe"), AXES)
        self.scales = to_varying(scales, AXES)
        # One microbatch more, without a token, for an end that is called for one direction alone.
        with_empty = lambda leaf: jnp.concatenate([leaf, jnp.zeros_like(leaf[:1])])  # noqa: E731
        self.batch = to_varying(jax.tree.map(with_empty, batch), AXES)
        steady = tables.steady if self.pattern else None
        self.phases = Phases(self.stages, self._mine(steady.f_slot[0]) if steady and self.stages.slots == 2 else None)
        # Where no phase is known beforehand, one of several is read faster from a stack than chosen.
        readable = lambda copies: copies if self.pattern or len(copies) == 1 else arrays.stacked(copies)  # noqa: E731
        self.stacks = {kind: params[kind] for kind in STACKS if kind in params}
        self.weights = readable(self.phases.copies(arrays.only_arrays(self.stacks)))
        self.state = readable(self.phases.copies(state))
        self.ends = {name: tree for name, tree in params.items() if name not in STACKS}
        self.shared = {name: self.ends[name] for name in (self.model.shared_ends if "mtp" in params else ())}
        x = zeros(jax.eval_shape(self.model.embed, self.ends, self._microbatch(0)))
        example = jax.tree.map(as_array, (self._weights(0), x, self._fixed(jnp.zeros_like(self.rank), 0, 0)))
        self.split: SplitVjp | None = split_vjp(self._stage, *example) if self.trains else None
        self.shapes: StageShapes = jax.eval_shape(self._shapes, *example)
        self.columns = {name: self._column(name) for name in tables.columns}
        arrivals = {} if steady is None else {"x_row": steady.x_row, "dx_row": steady.dx_row}
        columns = self.columns | {name: self._mine(rows, axis=1) for name, rows in arrivals.items()}
        self.post = Post(tables, columns, self.shapes, trains=self.trains)

    # --- the program ---

    def train(self):
        totals = self._ticks()
        own = self.model.split_ends
        ends = {name: tree if name in own else self._once(tree) for name, tree in totals.ends.items()}
        ends |= {name: add(ends[name], tree) for name, tree in totals.shared.items()}
        return self._outputs(totals), {**self.phases.sums_home(totals.stacks), **ends}

    def evaluate(self):
        return self._outputs(self._ticks())

    def _ticks(self) -> Totals:
        rings, totals, count = self.post.empty(), self._no_totals(), self.tables.ticks
        steady = self.tables.steady if self.pattern else None
        start, end = (count, count) if steady is None else (steady.start, steady.end)
        for begin, stop, pattern in ((0, start, ()), (start, end, self.pattern), (end, count, ())):
            if stop > begin:
                rings, totals = self._scan(rings, totals, begin, stop, pattern)
        return totals

    def _scan(self, rings: Rings, totals: Totals, start: int, end: int, pattern: tuple[Tick, ...]):
        """Ticks from `start` to before `end`; with a pattern, as many of them in a turn as it has."""
        period = len(pattern) or 1
        rows = self.post.rows(start, end, steady=bool(pattern))
        now = {name: column[start:end] for name, column in self.columns.items()}
        by_turn = lambda leaf: leaf.reshape((end - start) // period, period, *leaf.shape[1:])  # noqa: E731

        def turn(carry: Any, xs: Any):
            for place, tick in enumerate(pattern or (None,)):
                at, before = jax.tree.map(lambda leaf, p=place: leaf[p], xs)
                rings, made, totals = carry
                carry = self._tick(rings, made, totals, at, before, tick)
            return to_varying(carry, AXES), None

        carry = to_varying((rings, self.post.nothing(steady=bool(pattern)), totals), AXES)
        (rings, made, totals), _ = lax.scan(turn, carry, jax.tree.map(by_turn, (now, self.post.before(rows))))
        return self.post.write(rings, made, {name: of[-1] for name, of in rows.items()}), totals

    def _tick(self, rings: Rings, made: Made, totals: Totals, at: dict, before: dict, known: Tick | None):
        rings = self.post.write(rings, made, before)
        embedded = self._embed(at, known)
        cotangents, totals = self._head(rings, totals, at, known)
        of_f = lambda at: self._of_forward(rings, embedded, at, known)  # noqa: E731
        of_b = lambda at: self._of_backward(rings, cotangents, at, known)  # noqa: E731
        if known and self.machine.overlap == "braid":
            assert self.split is not None
            (out, stats, residual), (dx, weights) = braid(self.split.forward, self.split.gradients)(of_f(at), of_b(at))
            stacks, shared = self._added(totals.shared, self._written(totals.stacks, known.phase_b, weights))
            totals = totals._replace(stacks=stacks, shared=shared)
            rings = self._kept(rings, residual, at, (dx, stacks, shared))
        else:
            dx, rings, totals = self._backward(rings, of_b, totals, at, known) if self.trains else (None, rings, totals)
            out, stats, rings = self._forward(rings, of_f, at, known, (dx, totals.stacks, totals.shared))
        phase = known.phase_f if known else self.phases.of(at["f_slot"])
        stats = self.phases.added(totals.stats, phase, stats, joined_stats)
        totals = totals._replace(aux=totals.aux + out.aux, stats=stats)
        x = self.post.send("x", out.x, known and known.x_sends)
        if not self.trains:
            return rings, Made(out.hidden, x, ()), totals
        totals = self._embed_gradient(totals, dx, at, known)
        return rings, Made(out.hidden, x, self.post.send("dx", dx, known and known.dx_sends)), totals

    # --- F, B, W ---

    def _stage(self, params: Tree, x: Streams, fixed: dict):
        return self.machine.stage(params, fixed["state"], x, fixed["batch"], fixed["occupied"])

    def _shapes(self, params: Tree, x: Streams, fixed: dict) -> StageShapes:
        if self.split is None:
            out, stats = self._stage(params, x, fixed)
            return StageShapes(out, stats, [], [])
        out, stats, residual = self.split.forward(params, x, fixed)
        return StageShapes(out, stats, residual, self.split.input_gradient(params, fixed, residual, out)[1])

    def _forward(self, rings: Rings, of_f: Callable[[dict], tuple], at: dict, known: Tick | None, before: Any):
        """(outputs, stats, rings with the residuals), after what makes `before` has read its own residuals."""
        split, predicate = self.split, at["f_slot"] >= 0
        if split is None:
            run = lambda at: self._stage(*jax.tree.map(as_array, of_f(at)))  # noqa: E731
            return *when("F", predicate, known, at, run), rings
        if known:
            out, stats, residual = split.forward(*of_f(at))
            return out, stats, self._kept(rings, residual, at, before)

        def forward(at: dict, ring: list):
            out, stats, ring = split.forward(*of_f(at), into=rows_of(ring, at["f_residual"]))
            return (out, stats), (ring,)

        (out, stats), (ring,) = adding("F", predicate & after(before), None, at, forward, (rings.residual,))
        return out, stats, rings._replace(residual=ring)

    def _kept(self, rings: Rings, residual: list, at: dict, before: Any) -> Rings:
        """The rings with a forward's residuals, in a row that may have been read until `before` was made."""
        row = jnp.where(after(before), at["f_residual"], self.tables.rings.residual)
        return rings._replace(residual=put(rings.residual, row, residual))

    def _of_forward(self, rings: Rings, embedded: tuple[Streams, ...], at: dict, known: Tick | None):
        """What an F reads: weights, its input from the stage before or from the embedding, fixed inputs."""
        slot = at["f_slot"]
        phase = known.phase_f if known else self.phases.of(slot)
        x = where(
            self._table(self.machine.first, slot), self._of(embedded, slot), take(rings.activation, at["f_input"])
        )
        return self._weights(phase), x, self._fixed(slot, at["f_microbatch"], phase)

    def _backward(self, rings: Rings, of_b: Callable[[dict], tuple], totals: Totals, at: dict, known: Tick | None):
        """(dx, rings with the stash, totals with weights' gradients): of a B, and of its W or an earlier one's."""
        split, sums = self.split, (totals.stacks, totals.shared)
        assert split is not None

        def both(at: dict, stacks: Tree, shared: Tree):
            phase = known.phase_b if known else self.phases.of(at["b_slot"])
            dx, weights = split.gradients(*of_b(at), into=self._sums(stacks, phase))
            return dx, self._added(shared, weights)

        def input_gradient(at: dict, ring: list):
            dx, ring = split.input_gradient(*of_b(at), into=rows_of(ring, at["b_stash"]))
            return dx, (ring,)

        def weight_gradient(at: dict, stacks: Tree, shared: Tree):
            phase = self.phases.of(at["w_slot"])
            fixed = self._fixed(at["w_slot"], at["w_microbatch"], phase)
            residual, stash = rows_of(rings.residual, at["w_residual"]), rows_of(ring, at["w_stash"])
            into = self._sums(stacks, phase)
            return (), self._added(shared, split.weight_gradient(self._weights(phase), fixed, residual, stash, into))

        own, ring = at["w_own"] > 0, rings.stash
        dx, sums = adding("BW", own, known, at, both, sums)
        if not known and self.tables.rings.stash:
            dx, (ring,) = adding("B", (at["b_slot"] >= 0) & ~own, None, at, input_gradient, (ring,), dx)
            _, sums = adding("W", (at["w_slot"] >= 0) & ~own, None, at, weight_gradient, sums)
        return dx, rings._replace(stash=ring), totals._replace(stacks=sums[0], shared=sums[1])

    def _sums(self, stacks: Tree, phase: Phase) -> Tree:
        """Where a phase's weight gradients are added: to the sums of its stacks; those of shared weights come alone."""
        return {**rows_of(stacks, phase, adds=True), **jax.tree.map(lambda _: None, self.shared)}

    def _written(self, stacks: Tree, phase: Phase, weights: Tree) -> Tree:
        """A phase's gradients of weights, with the sums of stacks in the place of what was added to them."""
        rows = self._sums(stacks, phase)
        return {
            n: tree if n in self.shared else jax.tree.map(Row.written, rows[n], tree) for n, tree in weights.items()
        }

    def _added(self, shared: Tree, weights: Tree) -> tuple[Tree, Tree]:
        """The sums of stacks, and those of shared weights with their gradients."""
        stacks = {name: tree for name, tree in weights.items() if name not in self.shared}
        return stacks, add(shared, {name: weights[name] for name in shared})

    def _of_backward(self, rings: Rings, cotangents: tuple, at: dict, known: Tick | None):
        """What a B reads: weights, fixed inputs, residuals, and cotangents from the next stage or from the loss."""
        slot = at["b_slot"]
        phase = known.phase_b if known else self.phases.of(slot)
        last = self._table(self.machine.last, slot)
        cotangent = StageOutputs(
            x=where(~last, take(rings.gradient, at["b_cotangent"])),
            hidden=where(last, self._of(cotangents, slot)),
            aux=self.scales.balance.astype(self.shapes.out.aux.dtype),
        )
        fixed = self._fixed(slot, at["b_microbatch"], phase)
        return self._weights(phase), fixed, rows_of(rings.residual, at["b_residual"]), cotangent

    # --- the ends: all ranks together, for both directions at once ---

    def _embed(self, at: dict, known: Tick | None) -> tuple[Streams, ...]:
        """Per direction what its first stage reads in this tick."""

        def run(at: dict) -> tuple[Streams, ...]:
            return parted(self.model.embed(self.ends, self._microbatches(at["embed"])), self.stages.directions)

        return when("embed", (at["embed"] >= 0).any(), known and known.embed, at, run)

    def _head(self, rings: Rings, totals: Totals, at: dict, known: Tick | None) -> tuple[tuple, Totals]:
        """Per direction the cotangents of its last stage's hidden states, and totals with the loss."""

        def run(at: dict, total: jax.Array, sums: dict, of_ends: Tree):
            hidden = self._from_stage(self.stages.stages - 1, take(rings.output, at["b_output"]), at["head"])
            batch = self._microbatches(at["head"])
            loss = lambda ends, hidden: self.model.finish(ends, hidden, batch, self.scales)  # noqa: E731
            if self.trains:
                gradient = jax.value_and_grad(loss, (0, 1), has_aux=True)
                (value, more), (ends, cotangents) = gradient(self.ends, hidden)
                of_ends = add(of_ends, ends)
            else:
                (value, more), cotangents = loss(self.ends, hidden), ()
            return parted(cotangents, self.stages.directions), (total + value, add(sums, more), of_ends)

        sums = (totals.loss, totals.sums, totals.ends)
        cotangents, sums = adding("head", (at["head"] >= 0).any(), known and known.head, at, run, sums)
        return cotangents, totals._replace(**dict(zip(("loss", "sums", "ends"), sums, strict=True)))

    def _embed_gradient(self, totals: Totals, dx: Streams, at: dict, known: Tick | None) -> Totals:
        def run(at: dict, ends: Tree):
            cotangents = self._from_stage(0, dx, at["embed_gradient"])
            batch = self._microbatches(at["embed_gradient"])
            (gradient,) = jax.vjp(lambda ends: self.model.embed(ends, batch), self.ends)[1](cotangents)
            return (), (add(ends, gradient),)

        wanted = (at["embed_gradient"] >= 0).any()
        _, (ends,) = adding("embed_gradient", wanted, known and known.embed_gradient, at, run, (totals.ends,))
        return totals._replace(ends=ends)

    def _from_stage(self, stage: int, mine: Any, microbatches: jax.Array) -> Any:
        """What the ranks have that hold a stage of each direction, on all ranks, one direction after the other; zeros
        for a direction without a microbatch."""
        found = []
        for direction in range(self.stages.directions):
            is_home = self.rank == self.stages.home(direction, stage)[0]
            of_home = where(is_home & (microbatches[direction] >= 0), mine)
            found.append(jax.tree.map(lambda leaf: lax.psum(leaf, "pipe"), of_home))
        return to_varying(joined(found), AXES)

    def _microbatches(self, numbers: jax.Array) -> Any:
        """Of each direction, one after the other along their rows."""
        return joined([self._microbatch(numbers[direction]) for direction in range(self.stages.directions)])

    # --- totals ---

    def _no_totals(self) -> Totals:
        hidden = joined([zeros(self.shapes.out.hidden)] * self.stages.directions)
        batch = self._microbatches(jnp.full(self.stages.directions, -1))
        loss, sums = jax.eval_shape(lambda: self.model.finish(self.ends, hidden, batch, self.scales))
        of_phase = lambda: jax.tree.map(as_array, self._stacks(0))  # noqa: E731
        of_phases = jax.eval_shape(lambda: arrays.stacked([of_phase()] * self.stages.slots))
        return Totals(
            stacks=wide_zeros(of_phases) if self.trains else {},
            shared=wide_zeros(self.shared) if self.trains else {},
            ends=wide_zeros(self.ends) if self.trains else {},
            loss=zeros(loss),
            sums=zeros(sums),
            aux=zeros(self.shapes.out.aux),
            stats=tuple(zeros(self.shapes.stats) for _ in range(self.stages.slots)),
        )

    def _outputs(self, totals: Totals) -> tuple:
        loss = self._once(totals.loss) + self.scales.balance * totals.aux
        sums = {**self._once(totals.sums), "loss_balance": totals.aux}
        return loss, sums, self.phases.home(totals.stats, joined_stats)

    def _once(self, tree: Any) -> Any:
        """What is equal on all ranks, on one of them; zero on the others."""
        return where(self.rank == 0, tree)

    # --- what this rank reads ---

    def _weights(self, phase: Phase) -> Tree:
        return {**self._stacks(phase), **self.shared}

    def _stacks(self, phase: Phase) -> Tree:
        parts = self.stages.slots // self.stages.copies
        return arrays.filled(self.phases.pick(self.weights, phase), self.stacks, parts)

    def _fixed(self, slot: jax.Array, microbatch: Any, phase: Phase) -> dict[str, Any]:
        """What a stage reads besides weights and its input."""
        occupied = {kind: self._table(table, slot) for kind, table in self.machine.occupied.items()}
        return {
            "state": self.phases.pick(self.state, phase),
            "batch": self._microbatch(microbatch),
            "occupied": Occupied(**occupied, last=self._table(self.machine.last, slot)),
        }

    def _of(self, by_direction: tuple, slot: jax.Array) -> Any:
        """The part of the direction whose microbatches a slot works on."""
        return arrays.choose(jnp.maximum(slot, 0), by_direction)

    def _microbatch(self, number: Any) -> Any:
        """A microbatch by its number; the empty one for -1."""
        place = jnp.where(jnp.asarray(number) < 0, self.machine.schedule.microbatches, number)
        return take(self.batch, to_varying(place, AXES))

    def _table(self, table: np.ndarray, slot: jax.Array) -> jax.Array:
        """The entry of this rank and a slot in a table `[ranks, slots, ...]`."""
        return take(self._mine(table), jnp.maximum(slot, 0))

    def _mine(self, table: np.ndarray, axis: int = 0) -> jax.Array:
        """This rank's part of a table."""
        return lax.dynamic_index_in_dim(to_varying(jnp.asarray(table), AXES), self.rank, axis, keepdims=False)

    def _column(self, name: str) -> jax.Array:
        """A column of the table: this rank's, or of an end, the same for all."""
        table = self.tables.columns[name]
        return jnp.asarray(table) if name in END_COLUMNS else self._mine(table, axis=1)
