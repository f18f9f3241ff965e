"""What a run does besides its steps: evaluations and checkpoints. Failures are in no plan."""

from __future__ import annotations

import dataclasses
import math

from deepseek_jax.parallel.pipeline.tables import make_tables
from deepseek_jax.planning.job import Job
from deepseek_jax.planning.plan import Plan, cell_times, held_parameters

BYTES_PER_TOKEN = 4.0
"""Of held-out text: about what vocabularies of 100,000 tokens have on English and code. Smaller ones have less."""
STORAGE = 2e9
"""Bytes per second that a node writes to a shared file system: a guess, since clusters differ."""


@dataclasses.dataclass(frozen=True)
class Pauses:
    """Evaluations and checkpoints of a run but those at its end."""

    evaluations: int
    evaluation_seconds: float
    """Of one."""
    checkpoints: int
    checkpoint_seconds: float
    """For which one holds training up."""

    @property
    def seconds(self) -> float:
        """All of them."""
        return self.evaluations * self.evaluation_seconds + self.checkpoints * self.checkpoint_seconds


def evaluation_seconds(plan: Plan, text_bytes: float, batch_rows: int) -> float:
    """Forward passes over so much held-out text, in batches of at least `batch_rows` sequences over all devices.

    Batches are as large as mesh and schedule need (`Trainer.padded_rows`); each goes through the pipeline by itself.
    """
    job = plan.job
    share = math.ceil(batch_rows / job.parallel.batch_shards)
    size = min(job.parallel.rows_at_once or share, share)
    microbatches = job.parallel.schedule_choice.fitting(math.ceil(share / size))
    rows = math.ceil(text_bytes / BYTES_PER_TOKEN / job.length)
    batches = math.ceil(rows / (job.parallel.batch_shards * size * microbatches))
    slowest = max(one.forward + one.forward_exchange for one in cell_times(job, plan.device).stages)
    return batches * _forward_passes(job, microbatches) * slowest * size / job.microbatch_rows


def _forward_passes(job: Job, microbatches: int) -> int:
    """Of stages, one after the other, until a batch is through."""
    if job.parallel.pipe == 1:
        return microbatches
    tables = make_tables(job.parallel.schedule_choice.make(microbatches), forward_only=True)
    return len(tables.f_slot)


def checkpoint_seconds(plan: Plan, every_steps: int, *, storage: float = STORAGE, average: bool = False) -> float:
    """For how long a checkpoint holds training up.

    A save copies masters and moments to the host and is written from there in the background; training waits for the
    copy, and at the next save for what is not written by then.

    Args:
      plan: of the run.
      every_steps: between two saves.
      storage: bytes per second that a node writes.
      average: whether a moving average of the weights, which the host has, is saved too.
    """
    device, job = plan.device, plan.job
    held = held_parameters(job)
    copied = held * (4 + 2 * job.moment_bytes)
    written = (copied + 4 * held * average) * min(device.devices_per_node, job.devices) / storage
    return copied / device.host_bandwidth + max(0.0, written - every_steps * plan.step.total)
