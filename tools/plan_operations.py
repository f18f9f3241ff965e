"""Microbenchmarks of single operations on this machine's processor, for `tools.plan --measure`.

Each operation of a recipe is run alone, in the shapes that it has in a step. None of them is a layer, let alone a train
step: what a plan adds is how often each is needed, and in what order.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax import ops
from deepseek_jax.config import require
from deepseek_jax.model.rope import apply_rope, softmax_scale
from deepseek_jax.model.router import combine_weights, expert_load, router_scores, select_experts, sequence_balance_loss
from deepseek_jax.ops.linear import transposed
from deepseek_jax.parallel.dispatch.local import LocalDispatcher
from deepseek_jax.planning.devices import CPU, Device
from deepseek_jax.planning.efficiency import Pass
from deepseek_jax.planning.flops import Matmul, layer_matmuls, mtp_projection
from deepseek_jax.planning.job import Job
from deepseek_jax.planning.kept import kept_bytes
from deepseek_jax.planning.parameters import total_parameters
from deepseek_jax.training.optimizer import OptimizerConfig

REPEATS, LEAST_SECONDS, SETS = 11, 0.02, 4
"""Of a measurement; how long each of them is; and how many sets of arguments take turns in it: those of an operation in
a step were not all in the caches either."""
_EPS = 1e-6

Timing = tuple[str, Pass, float]
"""Operation, pass, seconds."""


def measured_device(job: Job, optimizer: OptimizerConfig) -> Device:
    """This processor, with the seconds that each operation of `job` takes on it, on one thread.

    Raises:
      ConfigError: see `check_measurable`.
    """
    check_measurable(job)
    bench = Microbenchmarks(job, optimizer)
    measured = {(name, of): took for name, of, took in bench.all()}
    efficiency = dataclasses.replace(
        CPU.efficiency, memory=1.0, measured=measured, sources={"all": "microbenchmarks, processor time of one thread"}
    )
    source = "this machine's processor, one thread"
    return dataclasses.replace(CPU, memory_bandwidth=bench.memory(), efficiency=efficiency, source=source)


def check_measurable(job: Job) -> None:
    """Raises `ConfigError` where a job is not one of a single device in float32."""
    require(
        job.devices == 1 and job.precision.compute == "float32" and not job.is_fp8,
        f"this processor is measured as one device in float32, not as {job.devices} in "
        f"{'FP8' if job.is_fp8 else job.precision.compute}: name another recipe, or --set its parallel axes to 1 and "
        "precision=float32",
    )


@dataclasses.dataclass(frozen=True)
class Microbenchmarks:
    """The operations of a job, each by itself. Shape letters: T tokens of a microbatch, D width, H heads."""

    job: Job
    optimizer: OptimizerConfig

    def all(self) -> Iterator[Timing]:
        """Every operation that the planner counts on a CPU, but copies of weights."""
        yield from self.products()
        yield from self.routed_products()
        yield from _both("attention", self.attention())
        yield from _both("norms", self.norms())
        yield from _both("rotary embedding", self.rotary())
        yield from _both("residual sums", self.residual_sums())
        yield from _both("SwiGLU", self.swiglu())
        yield from _both("dense SwiGLU", self.dense_swiglu())
        yield from _both("sorting rows", self.sorting())
        yield from _both("summing outputs", self.summing())
        yield from _both("stacking what is kept", self.stacking())
        yield from _both("embedding", self.embedding())
        yield from _both("final norm", self.final_norm())
        yield from _both("mtp norms", self.mtp_norms())
        # The library makes the head's gradients with the loss, in the forward pass (`ops.cross_entropy_sum`).
        loss = self.loss()
        yield "head", "F", loss[0]
        yield from (("head", "B", 0.0), ("head", "W", 0.0), ("loss", "F", 0.0), ("loss", "B", loss[1]))
        yield "optimizer", "W", self.update()

    @property
    def _again(self) -> bool:
        """Whether norms, MLA's up-projections and SwiGLU are computed again for the backward pass."""
        return self.job.parallel.recompute == "selective"

    @functools.cached_property
    def _rng(self) -> np.random.Generator:
        return np.random.default_rng(0)

    def _array(self, *shape: int) -> jax.Array:
        return jnp.asarray(self._rng.standard_normal(shape, np.float32))

    def products(self) -> Iterator[Timing]:
        """Of a layer's matrices but those of routed experts."""
        model, known = self.job.model, dict[tuple[int, int], tuple[float, float, float]]()
        for one in (*layer_matmuls(model, dense=True), *layer_matmuls(model, dense=False), mtp_projection(model)):
            if one.kind == "routed_experts":
                continue
            shape = one.inputs, one.outputs
            if shape not in known:
                known[shape] = self._product(*shape)
            yield from _named(one, known[shape], self._again)

    def _product(self, inputs: int, outputs: int) -> tuple[float, float, float]:
        rows = self.job.tokens
        x, w, dy = self._array(rows, inputs), self._array(inputs, outputs), self._array(rows, outputs)
        return (
            seconds(jnp.dot, x, w),
            seconds(lambda dy, w: dy @ w.T, dy, w),
            seconds(lambda x, dy: transposed(x) @ dy, x, dy),
        )

    def routed_products(self) -> Iterator[Timing]:
        """Of the matrices of routed experts, with the rows that random logits give them."""
        model, moe = self.job.model, self.job.model.moe
        plan = self._plan()
        rows, align = plan.grouping.pairs.shape[0], self._dispatcher.alignment
        for one in layer_matmuls(model, dense=False):
            if one.kind != "routed_experts":
                continue
            x, dy = self._array(rows, one.inputs), self._array(rows, one.outputs)
            w = self._array(moe.num_experts, one.inputs, one.outputs)
            times = (
                seconds(functools.partial(ops.grouped_matmul, alignment=align), x, w, plan.sizes),
                seconds(functools.partial(ops.grouped_matmul_dx, alignment=align), dy, w, plan.sizes),
                seconds(functools.partial(ops.grouped_matmul_dw, alignment=align), x, dy, plan.sizes),
            )
            yield from _named(one, times, self._again)

    def memory(self) -> float:
        """Bytes per second of a sum of arrays larger than the caches."""
        x, y = self._array(8 << 20), self._array(8 << 20)
        return 3 * x.nbytes / seconds(jnp.add, x, y)

    def attention(self) -> tuple[float, float]:
        """Its core."""
        config = self.job.model.attention
        shape = (self.job.microbatch_rows, self.job.length, config.num_heads)
        q, k = self._array(*shape, config.qk_head_dim), self._array(*shape, config.qk_head_dim)
        scale = softmax_scale(config)
        return both_ways(
            lambda q, k, v: ops.attention(q, k, v, scale=scale), q, k, self._array(*shape, config.v_head_dim)
        )

    def _norm(self, *sizes: int) -> tuple[float, float]:
        tokens = self.job.tokens
        parts = [both_ways(_norm, self._array(tokens, size), self._array(size), again=self._again) for size in sizes]
        return sum(one for one, _ in parts), sum(other for _, other in parts)

    def norms(self) -> tuple[float, float]:
        """A layer's four."""
        config = self.job.model
        latents = (size for size in (config.attention.q_lora_rank, config.attention.kv_lora_rank) if size)
        return self._norm(config.hidden_size, config.hidden_size, *latents)

    def final_norm(self) -> tuple[float, float]:
        """Before each use of the head."""
        return self._norm(self.job.model.hidden_size)

    def mtp_norms(self) -> tuple[float, float]:
        """What an MTP module joins: two norms side by side."""
        shape = (self.job.tokens, self.job.model.hidden_size)

        def join(x, y, scale):
            return jnp.concatenate([_norm(x, scale), _norm(y, scale)], axis=-1)

        return both_ways(join, self._array(*shape), self._array(*shape), self._array(shape[1]), again=self._again)

    def rotary(self) -> tuple[float, float]:
        """Queries are turned, and queries and keys put together, as in `model.attention`."""
        config, tokens = self.job.model.attention, self.job.tokens
        nope, turned, heads = config.qk_nope_head_dim, config.qk_rope_head_dim, config.num_heads
        cos, sin = self._array(tokens, 1, turned // 2), self._array(tokens, 1, turned // 2)

        def together(q, key_values, k_rope, cos, sin):
            q_nope, q_rope = jnp.split(q, [nope], axis=-1)
            k_nope, v = jnp.split(key_values, [nope], axis=-1)
            k_rope = jnp.broadcast_to(apply_rope(k_rope, cos, sin), (tokens, heads, turned))
            q = jnp.concatenate([q_nope, apply_rope(q_rope, cos, sin)], axis=-1)
            return q, jnp.concatenate([k_nope, k_rope], axis=-1), v

        arguments = (
            self._array(tokens, heads, nope + turned),
            self._array(tokens, heads, nope + config.v_head_dim),
            self._array(tokens, 1, turned),
        )
        return both_ways(together, *arguments, fixed=(cos, sin), again=self._again)

    def residual_sums(self) -> tuple[float, float]:
        """Two, and that of shared and routed experts; backward also those of gradients where two or three read one."""
        x, y = (self._array(self.job.tokens, self.job.model.hidden_size) for _ in range(2))
        once = seconds(jnp.add, x, y)
        return 3 * once, 5 * once

    def swiglu(self) -> tuple[float, float]:
        """Of a layer's shared and routed rows, the latter weighted."""
        moe, tokens = self.job.model.moe, self.job.tokens
        rows = tokens * moe.experts_per_token
        gate_up, weights = self._array(rows, 2 * moe.expert_ffn_size), self._array(rows)
        routed = both_ways(lambda x, w: ops.swiglu(x) * w[:, None], gate_up, weights, again=self._again)
        if not moe.num_shared_experts:
            return routed
        gate_up = self._array(tokens, 2 * moe.num_shared_experts * moe.expert_ffn_size)
        shared = both_ways(ops.swiglu, gate_up, again=self._again)
        return shared[0] + routed[0], shared[1] + routed[1]

    def dense_swiglu(self) -> tuple[float, float]:
        """Of a dense layer."""
        gate_up = self._array(self.job.tokens, 2 * self.job.model.dense_ffn_size)
        return both_ways(ops.swiglu, gate_up, again=self._again)

    @functools.cached_property
    def _dispatcher(self) -> LocalDispatcher:
        return LocalDispatcher(self.job.model.moe.num_experts, ops.preferred_alignment())

    def _plan(self) -> Any:
        moe, dispatcher = self.job.model.moe, self._dispatcher
        logits = self._array(self.job.tokens, moe.num_experts)
        return jax.jit(lambda x: dispatcher.plan(select_experts(router_scores(x, moe), None, moe))[0][0])(logits)

    def sorting(self) -> tuple[float, float]:
        """From router logits to rows by expert; what was chosen, and the plan, are kept for the backward pass."""
        model, moe, tokens = self.job.model, self.job.model.moe, self.job.tokens

        def choose(logits):
            experts = select_experts(router_scores(logits, moe), None, moe)
            (plan,), _ = self._dispatcher.plan(experts)
            return experts, plan, expert_load(experts, moe.num_experts)

        def sort(x, logits, experts, plan):
            scores = router_scores(logits, moe)
            by_sequence = scores.reshape(self.job.microbatch_rows, self.job.length, -1)
            loss = sequence_balance_loss(by_sequence, None, moe)
            found = self._dispatcher.dispatch(x, combine_weights(scores, experts, moe), plan)
            return found.rows, found.weights, loss

        x, logits = self._array(tokens, model.hidden_size), self._array(tokens, moe.num_experts)
        experts, plan, _ = jax.jit(choose)(logits)
        forward, backward = both_ways(sort, x, logits, fixed=(experts, plan), again=self._again)
        return seconds(choose, logits) + forward, backward

    def summing(self) -> tuple[float, float]:
        """Rows by expert back to tokens."""
        plan = self._plan()
        rows = self._array(plan.grouping.pairs.shape[0], self.job.model.hidden_size)
        return both_ways(self._dispatcher.combine, rows, fixed=(plan.grouping,))

    def stacking(self) -> tuple[float, float]:
        """A layer's share of writing what a loop over layers keeps, and of taking it out again."""
        job = self.job
        layers = max(2, job.model.num_moe_layers)
        full = job.parallel.recompute == "full"
        size = job.model.hidden_size * job.width if full else kept_bytes(job, dense=False)
        x = self._array(job.tokens, round(size / 4))

        def write(x):
            return lax.scan(lambda carry, _: (carry * 1.5, carry), x, None, length=layers)

        def read(kept, x):
            return lax.scan(lambda _, one: (lax.optimization_barrier(one), None), x, kept)[0]

        making = seconds(lambda x: x * 1.5, x)
        kept = jnp.zeros((layers, *x.shape), x.dtype)
        return max(seconds(write, x) / layers - making, 0.0), seconds(read, kept, x) / layers

    def embedding(self) -> tuple[float, float]:
        """The lookup."""
        model, tokens = self.job.model, self.job.tokens
        text = jnp.asarray(self._rng.integers(0, model.vocab_size, tokens), jnp.int32)
        return both_ways(ops.lookup, self._array(model.vocab_size, model.hidden_size), fixed=(text,))

    def loss(self) -> tuple[float, float]:
        """The loss with its gradients, and the scaling of those in the backward pass."""
        model, tokens = self.job.model, self.job.tokens
        hidden, head = self._array(tokens, model.hidden_size), self._array(model.hidden_size, model.vocab_size)
        labels = jnp.asarray(self._rng.integers(0, model.vocab_size, tokens), jnp.int32)
        weights = jnp.ones(tokens)
        return both_ways(ops.cross_entropy_sum, hidden, head, fixed=(labels, weights))

    def update(self) -> float:
        """Clipping and the optimizer, of as many numbers as the model has, in a few arrays."""
        count = 8
        size = -(-total_parameters(self.job.model) // count)
        params, gradients = ({str(i): self._array(size) for i in range(count)} for _ in range(2))
        transform = self.optimizer.make({name: _Decays() for name in params})

        def update(params, gradients, state):
            norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in gradients.values()))
            gradients = {name: g * jnp.minimum(1, 1 / norm) for name, g in gradients.items()}
            updates, state = transform.update(gradients, state, params)
            return jax.tree.map(lambda p, u: p - 1e-4 * u, params, updates), state

        return seconds(update, params, gradients, transform.init(params), sets=1)


class _Decays:
    """Stands for the declaration of a parameter."""

    decays = True


def _both(name: str, times: tuple[float, float]) -> Iterator[Timing]:
    yield name, "F", times[0]
    yield name, "B", times[1]


def _named(one: Matmul, times: tuple[float, float, float], again: bool) -> Iterator[Timing]:
    yield one.name, "F", times[0]
    yield one.name, "B", times[1]
    yield one.name, "W", times[2]
    if again and one.recomputed:
        yield f"{one.name} again", "B", times[0]


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + _EPS) * scale


def both_ways(
    function: Callable[..., Any], *arguments: Any, fixed: Iterable[Any] = (), again: bool = False
) -> tuple[float, float]:
    """Seconds of a function, and of its gradient.

    Args:
      function: takes `arguments` and `fixed`.
      arguments: have gradients.
      fixed: have none.
      again: the gradient computes the function again, from its arguments; else the function leaves it what it needs.
    """
    fixed, count = tuple(fixed), len(arguments)
    shapes = jax.eval_shape(function, *arguments, *fixed)
    cotangent = jax.tree.map(lambda one: jnp.full(one.shape, 0.5, one.dtype), shapes)

    def with_gradient(*inputs):
        return jax.vjp(lambda *given: function(*given, *inputs[count:]), *inputs[:count])

    if again:
        gradient = seconds(lambda dy, *inputs: with_gradient(*inputs)[1](dy), cotangent, *arguments, *fixed)
        return seconds(function, *arguments, *fixed), gradient
    _, back = jax.jit(with_gradient)(*arguments, *fixed)
    return seconds(with_gradient, *arguments, *fixed), seconds(lambda back, dy: back(dy), back, cotangent)


def seconds(function: Callable[..., Any], *arguments: Any, sets: int | None = None) -> float:
    """Processor time of one call once compiled, median, without that of calling; each measures several calls, for a
    clock of milliseconds."""
    return max(_seconds(function, *arguments, sets=sets) - _of_calling(), 0.0)


@functools.cache
def _of_calling() -> float:
    return _seconds(lambda x: x + 1, jnp.zeros(8))


def _seconds(function: Callable[..., Any], *arguments: Any, sets: int | None = None) -> float:
    compiled = jax.jit(function)
    turns = [arguments] + [jax.tree.map(jnp.copy, arguments) for _ in range((sets or SETS) - 1)]
    jax.block_until_ready([compiled(*given) for given in turns])
    calls = len(turns)
    while True:
        took = _turns(compiled, turns, calls)
        if took > LEAST_SECONDS:
            break
        calls *= 2
    return statistics.median(_turns(compiled, turns, calls) / calls for _ in range(REPEATS))


def _turns(compiled: Callable[..., Any], turns: list[tuple], calls: int) -> float:
    start = time.process_time()
    for index in range(calls):
        jax.block_until_ready(compiled(*turns[index % len(turns)]))
    return time.process_time() - start
