"""Planned against measured: a train step of the small recipes on this machine's processor, for `tools.plan --measure`.

One device on one thread, and processor time, not the clock: other work on the machine then changes little. The rates
come from microbenchmarks of single operations, made just before; none of them is a train step.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np

from deepseek_jax.planning.devices import CPU, Device
from deepseek_jax.planning.efficiency import ProductRow, fit_products
from deepseek_jax.planning.job import Job
from deepseek_jax.planning.plan import step_time
from deepseek_jax.training.experiment import Experiment
from tools.plan_text import table

GOAL = 0.25
"""What a plan may be wrong by."""
SHAPES = ((2048, 192, 192), (2048, 192, 512), (2048, 512, 192), (2048, 96, 288), (2048, 64, 384), (2048, 192, 1024))
"""(rows, K, N) of products: those of a tiny model."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """A recipe's step."""

    recipe: str
    planned: float
    """Seconds."""
    seconds: float
    """Of processor time, median."""

    @property
    def error(self) -> float:
        """Of the plan."""
        return self.planned / self.seconds - 1


def one_thread(environment: MutableMapping[str, str]) -> None:
    """Has XLA use one thread. Before jax makes its devices."""
    environment["NPROC"] = "1"
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()


def measure(recipes: Mapping[str, Experiment], *, steps: int = 7) -> tuple[tuple[Measured, ...], Device]:
    """Each recipe's step on one device, planned and measured, and the rates that the plans were made with."""
    one_thread(os.environ)
    from experiments.run import keep_freed_memory

    keep_freed_memory()
    device = microbenchmarks()
    found = []
    for name, experiment in recipes.items():
        planned = step_time(_job(experiment), device).total
        found.append(Measured(name, planned, _step_seconds(experiment, steps)))
    return tuple(found), device


def microbenchmarks() -> Device:
    """This processor's rates: products, weight gradients, attention both ways, and passes over memory."""
    import jax
    import jax.numpy as jnp

    from deepseek_jax import ops
    from deepseek_jax.ops.linear import transposed

    rng = np.random.default_rng(0)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    table = []
    for rows, inputs, outputs in SHAPES:
        seconds = _seconds(jax.jit(jnp.dot), array(rows, inputs), array(inputs, outputs))
        table.append(ProductRow(rows, outputs, inputs, 2 * rows * inputs * outputs / seconds))
    rate, half = fit_products(table)

    x, dy = array(2048, 192), array(2048, 512)
    gradient = jax.jit(lambda x, dy: transposed(x) @ dy)
    weights = 2 * 2048 * 192 * 512 / _seconds(gradient, x, dy)

    q, k, v = array(8, 256, 6, 48), array(8, 256, 6, 48), array(8, 256, 6, 32)
    causal = 2.0 * 8 * 6 * 256 * 256 / 2 * (48 + 32)

    def attention(q, k, v):
        return ops.attention(q, k, v, scale=48**-0.5)

    def both_ways(q, k, v):
        out, back = jax.vjp(attention, q, k, v)
        return back(out)

    forward = _seconds(jax.jit(attention), q, k, v)
    backward = _seconds(jax.jit(both_ways), q, k, v) - forward

    def norm(x):
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)

    memory = 2 * x.nbytes / _seconds(jax.jit(norm), x)
    efficiency = dataclasses.replace(
        CPU.efficiency,
        products=1.0,
        half_inputs=max(half, 0.0),
        weight_gradients=weights / rate,
        attention_forward=causal / forward / rate,
        attention_backward=2.5 * causal / backward / rate,
        memory=1.0,
        sources={"all": "microbenchmarks on this machine, processor time of one thread"},
    )
    return dataclasses.replace(CPU, flops={"float32": rate}, memory_bandwidth=memory, efficiency=efficiency)


def report(found: Sequence[Measured], device: Device) -> str:
    """For people."""
    rows = [
        (
            one.recipe,
            f"{one.planned:.3f}",
            f"{one.seconds:.3f}",
            f"{one.error:+.1%}",
            "met" if abs(one.error) <= GOAL else "missed",
        )
        for one in found
    ]
    head = ("recipe", "planned, s", "measured, s", "error of the plan", f"goal of {GOAL:.0%}")
    efficiency = device.efficiency
    return "\n".join(
        [
            table(head, rows, left=(0, 4)),
            "",
            "Processor time of a step on one thread. Rates, measured just before: "
            f"{device.peak('float32') / 1e9:.0f} GFLOP/s of a long product, weight gradients at "
            f"{efficiency.weight_gradients:.0%} of it, attention at {efficiency.attention_forward:.0%} and "
            f"{efficiency.attention_backward:.0%}, {device.memory_bandwidth / 1e9:.1f} GB/s of elementwise work.",
        ]
    )


def _job(experiment: Experiment) -> Job:
    schedule = experiment.schedule
    return Job(
        model=experiment.model,
        parallel=experiment.parallel,
        precision=experiment.precision,
        length=experiment.data.sequence_length,
        rows=schedule.rows(0),
        moment_bytes=4,
        imbalance=1.0,
    )


def _seconds(function: Callable[..., Any], *arguments: Any, repeats: int = 15) -> float:
    """Processor time of one call, median; each measures several calls, for a clock of milliseconds."""
    import jax

    jax.block_until_ready(function(*arguments))
    calls = 1
    while True:
        start = time.process_time()
        jax.block_until_ready([function(*arguments) for _ in range(calls)])
        if time.process_time() - start > 0.02:
            break
        calls *= 2
    found = []
    for _ in range(repeats):
        start = time.process_time()
        for _ in range(calls):
            jax.block_until_ready(function(*arguments))
        found.append((time.process_time() - start) / calls)
    return statistics.median(found)


def _step_seconds(experiment: Experiment, steps: int) -> float:
    """Processor time of a train step on random tokens, median, without the first two."""
    import jax
    import jax.numpy as jnp

    from deepseek_jax.model.targets import Microbatch
    from deepseek_jax.parallel.mesh import make_mesh
    from deepseek_jax.training.sharding_table import abstract_trainer
    from deepseek_jax.training.step import Hyperparameters

    trainer = abstract_trainer(experiment, make_mesh(experiment.parallel, jax.devices()[:1]))
    shape = (experiment.schedule.rows(0), experiment.data.sequence_length + 1)
    tokens = np.random.default_rng(0).integers(0, experiment.model.vocab_size, shape).astype(np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    ones = np.ones(shape, np.int32)
    batch = jax.device_put(Microbatch(tokens, ones, positions, ones))
    hyper = Hyperparameters(*(jnp.asarray(value, jnp.float32) for value in (1e-4, 0.3, 1e-3)))
    state, found = trainer.initial_state(0), []
    for _ in range(steps + 2):
        start = time.process_time()
        state, _ = trainer.step(state, batch, hyper)
        jax.block_until_ready(state)
        found.append(time.process_time() - start)
    return statistics.median(found[2:])
