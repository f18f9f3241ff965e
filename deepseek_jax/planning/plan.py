"""A plan: what a step needs, how long it takes and what a run costs, of one job on one kind of device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from deepseek_jax.planning.device_memory import DeviceMemory, device_memory, owned
from deepseek_jax.planning.devices import Device
from deepseek_jax.planning.flops import training_flops_per_token
from deepseek_jax.planning.job import Job, check_layout
from deepseek_jax.planning.roofline import Roofline
from deepseek_jax.planning.stages import Stages
from deepseek_jax.planning.timeline import CellTimes, Composition, compose
from deepseek_jax.planning.traffic import transfer_seconds, weight_seconds


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of a step, averaged over ranks."""

    forward: float
    """Forward passes beside nothing."""
    backward: float
    """Backward passes beside nothing, full or of inputs."""
    weight_gradients: float
    """Those that were put off."""
    pairs: float
    """Forward passes beside backward passes."""
    bubble: float
    """Waiting for other stages."""
    weights: float
    """Gathering weights, and summing gradients, between devices."""
    update: float
    """The optimizer's reading and writing of its state."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(dataclasses.astuple(self))


class Segment(NamedTuple):
    """A part of a run in which batches have one size."""

    tokens: float
    rows: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a run."""

    tokens: float
    hours: float
    """On the clock."""
    gpu_hours: float
    dollars: float | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """A job on devices of one kind."""

    job: Job
    device: Device
    memory: DeviceMemory
    step: StepTime

    @property
    def lacks(self) -> float:
        """Bytes by which a step is too large for a device; negative where there is room."""
        return self.memory.total - self.device.usable_memory

    @property
    def fits(self) -> bool:
        """Whether a device has the memory."""
        return self.lacks <= 0

    @property
    def tokens_per_second(self) -> float:
        """Of each device."""
        return self.job.rows * self.job.length / self.step.total / self.job.devices

    def flops_per_second(self, *, mtp: bool = True, causal: bool = True) -> float:
        """Of each device, as the counter of FLOPs has it."""
        each = training_flops_per_token(self.job.model, self.job.length, mtp=mtp, causal=causal)
        return self.tokens_per_second * each

    def mfu(self, *, mtp: bool = True, causal: bool = True) -> float:
        """Model FLOPs utilisation, of the peak in the compute dtype."""
        return self.flops_per_second(mtp=mtp, causal=causal) / self.device.peak(self.job.precision.compute)

    def cost(self, course: Sequence[Segment], paused: float = 0.0) -> Cost:
        """Of a run whose batches may grow, and which does something else for `paused` seconds."""
        seconds = sum(one.tokens / (one.rows * self.job.length) * self._step_seconds(one.rows) for one in course)
        seconds += paused
        gpu_hours = seconds / 3600 * self.job.devices
        price = self.device.price
        tokens = sum(one.tokens for one in course)
        return Cost(tokens, seconds / 3600, gpu_hours, None if price is None else price * gpu_hours)

    def _step_seconds(self, rows: int) -> float:
        """Of a step with another batch: each microbatch more takes as long as every other."""
        if rows == self.job.rows:
            return self.step.total
        other = dataclasses.replace(self.job, rows=rows)
        if self.job.parallel.rows_at_once is None:  # the batch is one microbatch, of another size
            return step_time(other, self.device).total
        return step_seconds(self.job, self.device, other.microbatches)


def make_plan(job: Job, device: Device, count: int | None = None) -> Plan:
    """The plan of a job.

    Args:
      job: what is trained, and how.
      device: on what.
      count: how many devices there are; None: as many as the mesh has.

    Raises:
      ConfigError: the mesh has another number of devices, or does not fit their nodes.
    """
    check_layout(job, device, count)
    return Plan(job, device, device_memory(job), step_time(job, device))


def step_time(job: Job, device: Device) -> StepTime:
    """How long a step takes, part by part."""
    one = composition(job, device, job.microbatches)
    weights, update = ends_of_step(job, device)
    return StepTime(
        forward=one.parts["F"],
        backward=one.parts["B"],
        weight_gradients=one.parts["W"],
        pairs=one.parts["F&B"],
        bubble=one.bubble,
        weights=weights,
        update=update,
    )


def composition(job: Job, device: Device, microbatches: int) -> Composition:
    """The schedule of so many microbatches, with the times of the job's stages."""
    return compose(job.parallel.schedule_choice, microbatches, cell_times(job, device), job.execution)


def cell_times(job: Job, device: Device) -> CellTimes:
    """What a rank's cells take."""
    stages = Stages(Roofline(job, device))
    efficiency = device.efficiency
    overlap = job.parallel.overlap != "off" and device.overlaps
    transfer = transfer_seconds(job, device)
    return CellTimes(stages.times, transfer, overlap, efficiency.exchange_units)


def step_seconds(job: Job, device: Device, microbatches: int) -> float:
    """Of a step of so many microbatches."""
    return composition(job, device, microbatches).makespan + sum(ends_of_step(job, device))


def ends_of_step(job: Job, device: Device) -> tuple[float, float]:
    """Seconds of (weights and gradients between devices, the optimizer's update)."""
    weights = weight_seconds(job, device, *owned(job))
    # Weight and moments are read and written, the gradient is read.
    moved = held_parameters(job) * (3 * 4 + 4 * job.moment_bytes)
    update = moved / (device.memory_bandwidth * device.efficiency.memory)
    return weights, device.efficiency.measured.get(("optimizer", "W"), update)


def held_parameters(job: Job) -> float:
    """How many a device updates: its part of masters and moments."""
    dense, experts = owned(job)
    zero = job.parallel.zero
    return dense / (job.parallel.batch_shards if zero else 1) + experts / (job.parallel.data if zero else 1)
