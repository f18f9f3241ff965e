"""Which pipeline schedule is best for a job's mesh, and when plain 1F1B beats DualPipe on it."""

from __future__ import annotations

import dataclasses

from deepseek_jax.config import ConfigError
from deepseek_jax.parallel.pipeline.generators import GENERATORS
from deepseek_jax.planning.devices import Device
from deepseek_jax.planning.job import Job
from deepseek_jax.planning.plan import Plan, cell_times, make_plan, step_seconds
from deepseek_jax.planning.timeline import CellTimes, compose

_MOST_EXCHANGE = 4.0


@dataclasses.dataclass(frozen=True)
class Compared:
    """One schedule on a job's mesh."""

    name: str
    plan: Plan | None
    """None where it cannot have so many ranks or microbatches."""
    refusal: str
    """Why, or empty."""


def with_schedule(job: Job, name: str) -> Job:
    """The job with another schedule, and its stages cut for that one; with its own, it has as many W waiting."""
    put_off = job.parallel.put_off if name == job.parallel.schedule else None
    parallel = dataclasses.replace(job.parallel, schedule=name, chunks=None, put_off=put_off, layers_per_stage=None)
    return dataclasses.replace(job, parallel=parallel)


def compare_schedules(job: Job, device: Device) -> tuple[Compared, ...]:
    """Every known schedule, the fastest first, then those that cannot be had."""
    found = []
    for name in GENERATORS:
        try:
            found.append(Compared(name, make_plan(with_schedule(job, name), device), ""))
        except ConfigError as error:
            found.append(Compared(name, None, str(error)))
    return tuple(sorted(found, key=lambda one: (one.plan is None, one.plan.step.total if one.plan else 0.0)))


@dataclasses.dataclass(frozen=True)
class Crossover:
    """DualPipe against 1F1B, on one mesh."""

    dualpipe: Plan
    one_f_one_b: Plan
    least_microbatches: int
    """DualPipe needs as many; smaller batches are filled up with empty ones."""
    enough_microbatches: int | None
    """From how many on DualPipe is faster, with those that it fills up; None: with no number up to those it needs."""
    break_even: float | None
    """How many times as long exchanges would have to be for both to take as long; None: one of the two is faster from
    no exchange at all to four times as much."""
    wins_below: bool
    """Whether 1F1B is the faster one with shorter exchanges than that, and not with longer ones."""


def crossover(job: Job, device: Device) -> Crossover | None:
    """When 1F1B beats DualPipe; None on a mesh without DualPipe."""
    if job.parallel.pipe < 2 or job.parallel.pipe % 2:
        return None
    try:
        dualpipe = make_plan(with_schedule(job, "dualpipe"), device)
        other = make_plan(with_schedule(job, "one_f_one_b"), device)
    except ConfigError:
        return None
    least = dualpipe.job.parallel.schedule_choice.fitting(1)
    enough = _enough(other.job, device, least, dualpipe if dualpipe.job.microbatches == least else None)
    return Crossover(dualpipe, other, least, enough, *_break_even(dualpipe.job, other.job, device))


def _enough(other: Job, device: Device, least: int, dualpipe: Plan | None) -> int | None:
    """The fewest microbatches at which DualPipe, with as many as it needs, takes no longer than 1F1B with those few."""
    share = other.parallel.batch_shards * other.microbatch_rows
    if dualpipe is None:
        dualpipe = make_plan(dataclasses.replace(with_schedule(other, "dualpipe"), rows=least * share), device)
    for count in range(1, least + 1):
        if step_seconds(other, device, count) >= dualpipe.step.total:
            return count
    return None


def _break_even(dualpipe: Job, other: Job, device: Device) -> tuple[float | None, bool]:
    """By bisection; and whether DualPipe gains as exchanges get longer."""

    def gains(scale: float) -> float:
        """By how much DualPipe is faster with exchanges `scale` times as long."""
        return _scaled_seconds(other, device, scale) - _scaled_seconds(dualpipe, device, scale)

    low, high = 0.0, _MOST_EXCHANGE
    if (gains(low) > 0) == (gains(high) > 0):
        return None, False
    rises = gains(high) > 0
    for _ in range(20):
        middle = (low + high) / 2
        if (gains(middle) > 0) == rises:
            high = middle
        else:
            low = middle
    return (low + high) / 2, rises


def _scaled_seconds(job: Job, device: Device, scale: float) -> float:
    times = cell_times(job, device)
    stages = tuple(
        dataclasses.replace(
            stage,
            forward_exchange=scale * stage.forward_exchange,
            backward_exchange=scale * stage.backward_exchange,
        )
        for stage in times.stages
    )
    scaled: CellTimes = dataclasses.replace(times, stages=stages)
    return compose(job.parallel.schedule_choice, job.microbatches, scaled, job.execution).makespan


def describe(found: Crossover) -> list[str]:
    """In words, a line each."""
    dual, other = found.dualpipe, found.one_f_one_b
    gain = other.step.total / dual.step.total - 1
    faster, slower = ("DualPipe", "1F1B") if gain >= 0 else ("1F1B", "DualPipe")
    lines = [
        f"{faster} is faster than {slower}: {dual.step.total:.2f} s a step by DualPipe, {other.step.total:.2f} by 1F1B."
    ]
    if found.break_even is None:
        lines.append("That holds from no exchange at all up to exchanges of four times the length.")
    else:
        side = "shorter" if found.wins_below else "longer"
        lines.append(
            f"With exchanges {side} than {found.break_even:.2f} times what they take here 1F1B is the faster one."
        )
    share = dual.job.parallel.batch_shards * dual.job.microbatch_rows
    enough = found.least_microbatches if found.enough_microbatches is None else found.enough_microbatches
    lines.append(
        f"DualPipe needs {found.least_microbatches} microbatches, and fills up what a batch has fewer: with less than "
        f"{enough} of them, {enough * share:,} sequences, 1F1B is faster."
    )
    sizes = [plan.memory.total / 1e9 for plan in (dual, other)]
    lines.append(
        f"A device holds {sizes[0]:.0f} GB by DualPipe and {sizes[1]:.0f} GB by 1F1B"
        + ("; in between 1F1B alone fits." if sizes[0] > sizes[1] else ".")
    )
    return lines
