"""Planned against measured: a train step of the small recipes on this machine's processor, for `tools.plan --measure`.

One device on one thread, and processor time, not the clock: other work on the machine then changes little. Plans
are made from microbenchmarks of single operations (`plan_operations.py`), none of which is a train step.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Mapping, MutableMapping, Sequence

import numpy as np

from deepseek_jax.planning.devices import Device
from deepseek_jax.planning.efficiency import Pass
from deepseek_jax.planning.job import RUNTIME_WIDTH, Job
from deepseek_jax.planning.plan import step_time
from deepseek_jax.training.experiment import Experiment
from tools.plan_operations import check_measurable, measured_device
from tools.plan_text import table

GOAL = 0.25
"""What a plan may be wrong by."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """A recipe's step."""

    recipe: str
    planned: float
    """Seconds."""
    seconds: float
    """Of processor time, median."""
    device: Device
    """With the operations that were measured for the plan."""

    @property
    def error(self) -> float:
        """Of the plan."""
        return self.planned / self.seconds - 1


def one_thread(environment: MutableMapping[str, str]) -> None:
    """Has XLA use one thread. Before jax makes its devices."""
    environment["NPROC"] = "1"
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()


def measure(recipes: Mapping[str, Experiment], *, steps: int = 7) -> tuple[Measured, ...]:
    """Each recipe's step on one device, planned and measured."""
    one_thread(os.environ)
    from experiments.run import keep_freed_memory

    keep_freed_memory()
    jobs = {name: job_on_one_device(experiment) for name, experiment in recipes.items()}
    for job in jobs.values():
        check_measurable(job)
    # Steps first: hundreds of small programs leave a heap with holes, in which a step finds no room for its arrays.
    taken = {name: _step_seconds(experiment, steps) for name, experiment in recipes.items()}
    found = []
    for name, job in jobs.items():
        device = measured_device(job, recipes[name].optimizer)
        found.append(Measured(name, step_time(job, device).total, taken[name], device))
    return tuple(found)


def report(found: Sequence[Measured]) -> str:
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
    lines = [table(head, rows, left=(0, 4)), "", "Processor time of a step on one thread. Single operations, measured:"]
    return "\n".join([*lines, "", _operations(found)])


def _operations(found: Sequence[Measured]) -> str:
    """Milliseconds of each operation, all passes of it together."""
    names = dict.fromkeys(name for one in found for name, _ in one.device.efficiency.measured)
    passes: tuple[Pass, ...] = ("F", "B", "W")

    def cell(one: Measured, name: str) -> str:
        measured = one.device.efficiency.measured
        return " ".join(f"{1e3 * measured[name, of]:.2f}" if (name, of) in measured else "–" for of in passes)

    head = ("operation, ms of F B W", *(one.recipe for one in found))
    return table(head, [(name, *(cell(one, name) for one in found)) for name in names], left=(0,))


def job_on_one_device(experiment: Experiment) -> Job:
    """A recipe's step, with even routing."""
    schedule = experiment.schedule
    return Job(
        model=experiment.model,
        parallel=experiment.parallel,
        precision=experiment.precision,
        length=experiment.data.sequence_length,
        rows=schedule.rows(0),
        moment_bytes=RUNTIME_WIDTH[experiment.optimizer.moment_dtype],
        imbalance=1.0,
    )


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
