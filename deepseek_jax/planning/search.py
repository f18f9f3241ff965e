"""Layouts of a job on so many devices: which fit, which is fastest, and what would make one fit that does not."""

from __future__ import annotations

import dataclasses
import heapq
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from deepseek_jax.config import ConfigError
from deepseek_jax.parallel.mesh import ParallelConfig
from deepseek_jax.parallel.pipeline.put_off import PUTS_OFF
from deepseek_jax.planning.device_memory import DeviceMemory, device_memory
from deepseek_jax.planning.devices import Device
from deepseek_jax.planning.job import Job, check_layout
from deepseek_jax.planning.plan import Plan, cell_times, ends_of_step, step_time
from deepseek_jax.precision.policy import V3_FP8, PrecisionPolicy

SCHEDULES = ("one_f_one_b", "eager_one_f_one_b", "interleaved_one_f_one_b", "zb_h1", "dualpipe", "dualpipe_v")
"""GPipe keeps every microbatch and is as slow as 1F1B, so it is not among them."""
PUT_OFF: dict[str, tuple[int | None, ...]] = dict.fromkeys(PUTS_OFF, (None, 0))
"""How many weight gradients may wait, of schedules that put some off; None: as many as the schedule has."""
_PAIRED = ("eager_one_f_one_b", "dualpipe", "dualpipe_v")
"""Schedules with forwards beside backwards."""
Recompute = Literal["none", "selective", "full"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
MICROBATCH_ROWS = (1, 2, 4)


@dataclasses.dataclass(frozen=True)
class Search:
    """What was found."""

    best: tuple[Plan, ...]
    """Layouts that fit, the fastest first."""
    nearest: tuple[tuple[Job, DeviceMemory], ...]
    """Of those that do not fit, the ones that lack least, one for each mesh and schedule."""
    tried: int
    fitting: int
    simulated: int
    """How many were: all others that fit are slower even without a bubble."""
    complete: bool
    """Whether the time sufficed to be sure of the order."""
    seconds: float


def search(job: Job, device: Device, count: int, *, top: int = 10, seconds: float = 45.0) -> Search:
    """The fastest layouts of a job.

    Tries the mesh, schedule, microbatches, recomputation, precision (the job's and FP8) and ZeRO.

    Args:
      job: what is trained; its layout does not matter, but for what is not tried.
      device: on what.
      count: how many devices.
      top: how many layouts to return.
      seconds: how long it may take.
    """
    begin = time.monotonic()
    fitting: list[tuple[float, int, Job, DeviceMemory]] = []
    lacking: dict[tuple, tuple[float, Job, DeviceMemory]] = {}
    tried = 0
    for one in candidates(job, device, count):
        tried += 1
        memory = device_memory(one)
        lacks = memory.total - device.usable_memory
        if lacks <= 0:
            fitting.append((least_seconds(one, device), tried, one, memory))
            continue
        key = (one.parallel.shape, one.parallel.schedule, one.parallel.put_off)
        if key not in lacking or lacks < lacking[key][0]:
            lacking[key] = (lacks, one, memory)
    heapq.heapify(fitting)
    total, simulated = len(fitting), 0
    best: list[tuple[float, int, Plan]] = []
    complete = True
    while fitting and (len(best) < top or fitting[0][0] < best[-1][0]):
        if time.monotonic() - begin > seconds:
            complete = False
            break
        _, number, one, memory = heapq.heappop(fitting)
        plan = Plan(one, device, memory, step_time(one, device))
        simulated += 1
        best = sorted([*best, (plan.step.total, number, plan)])[:top]
    nearest = sorted(lacking.values(), key=lambda found: found[0])[:top]
    return Search(
        best=tuple(plan for *_, plan in best),
        nearest=tuple((one, memory) for _, one, memory in nearest),
        tried=tried,
        fitting=total,
        simulated=simulated,
        complete=complete,
        seconds=time.monotonic() - begin,
    )


def candidates(job: Job, device: Device, count: int) -> Iterator[Job]:
    """Every layout that the model and its batch allow."""
    for mesh in meshes(job, device, count):
        for schedule in SCHEDULES if mesh["pipe"] > 1 else (job.parallel.schedule,):
            for rows in MICROBATCH_ROWS:
                for put_off in PUT_OFF.get(schedule, (None,)) if mesh["pipe"] > 1 else (None,):
                    layout = dict(mesh, schedule=schedule, chunks=None, put_off=put_off, layers_per_stage=None)
                    one = changed(job, **layout, microbatch_rows=rows)
                    # Empty microbatches, and microbatches larger than a device's share, are never faster.
                    if one is None or one.microbatch_rows != rows or not _has_schedule(one):
                        continue
                    yield from _variants(one)


def _variants(job: Job) -> Iterator[Job]:
    precisions = [job.precision] + ([V3_FP8] if job.precision.compute == "bfloat16" and not job.is_fp8 else [])
    for precision in precisions:
        for recompute in RECOMPUTE:
            for zero in (True, False):
                one = changed(job, precision=precision, recompute=recompute, zero=zero)
                if one is not None:
                    yield one


def meshes(job: Job, device: Device, count: int) -> Iterator[dict[str, Any]]:
    """Sizes of the axes: `pipe`, and `node` × `expert` of whole nodes where experts need several."""
    experts = job.model.moe.num_experts
    for pipe in _divisors(count):
        if pipe > job.model.num_layers:
            continue
        stage = count // pipe
        for split in _divisors(stage):
            if experts % split:
                continue
            expert = max(size for size in _divisors(split) if size <= device.devices_per_node)
            yield {"pipe": pipe, "data": stage // split, "node": split // expert, "expert": expert}


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def _has_schedule(job: Job) -> bool:
    """Whether a batch is enough for the schedule, without empty microbatches beyond an eighth."""
    needed = -(-job.rows // (job.parallel.batch_shards * job.microbatch_rows))
    try:
        return job.parallel.pipe == 1 or job.microbatches <= max(needed * 9 // 8, needed + 1)
    except ConfigError:
        return False


def changed(job: Job, *, precision: PrecisionPolicy | None = None, **fields: Any) -> Job | None:
    """The job with other values in its layout; None where the model does not allow them."""
    try:
        parallel: ParallelConfig = dataclasses.replace(job.parallel, **fields)
        return dataclasses.replace(job, parallel=parallel, precision=precision or job.precision)
    except ConfigError:
        return None


def least_seconds(job: Job, device: Device) -> float:
    """A step without any bubble: no schedule of this kind is faster."""
    times = cell_times(job, device)
    pairs = times.overlap and job.parallel.schedule in _PAIRED and job.parallel.pipe > 1
    work = 0.0
    for stage in times.stages:
        compute = stage.forward + stage.input_gradient + stage.weight_gradient
        alone = compute + stage.forward_exchange + stage.backward_exchange
        exchange = stage.forward_exchange + stage.backward_exchange
        together = min(alone, max(compute / (1 - times.exchange_units), exchange))
        work += min(alone, together) if pairs else alone
    return job.microbatches * work / job.parallel.pipe + sum(ends_of_step(job, device))


def smallest_that_fits(job: Job, device: Device, count: int) -> Job | None:
    """A layout that fits on so many devices, or on the least of 2, 4, 8 … times as many; None up to 4096 times.

    Looks at the leanest ones alone: 1F1B, one sequence at a time, full recomputation, ZeRO-1, FP8 where the job allows.
    """
    precision = V3_FP8 if job.precision.compute == "bfloat16" else job.precision
    for doublings in range(13):
        for mesh in meshes(job, device, count << doublings):
            lean = dict(mesh, schedule="one_f_one_b", chunks=None, put_off=None, layers_per_stage=None)
            one = changed(job, precision=precision, recompute="full", zero=True, microbatch_rows=1, **lean)
            if one is not None and one.rows >= one.parallel.batch_shards and _fits(one, device):
                return one
    return None


# --- what would make it fit -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Remedy:
    """Changes that make a job fit, as the recipe's fields have them."""

    changes: tuple[str, ...]
    plan: Plan


def remedies(job: Job, device: Device, *, top: int = 3) -> tuple[Remedy, ...]:
    """The fastest ways to make a job fit on as many devices: one change where one is enough, else two, else three."""
    singles = list(_changes(job, device))
    for depth in (1, 2, 3):
        found = [one for one in _combined(job, singles, depth) if _fits(one[1], device)]
        if found:
            plans = [Remedy(texts, _plan(one, device)) for texts, one in found]
            return tuple(sorted(plans, key=lambda remedy: remedy.plan.step.total)[:top])
    return ()


def _changes(job: Job, device: Device) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(what is changed, how it is written, the fields) of each change worth trying."""
    parallel = job.parallel
    for recompute in ("selective", "full"):
        if RECOMPUTE.index(recompute) > RECOMPUTE.index(parallel.recompute):
            yield "recompute", f"parallel.recompute={recompute}", {"recompute": recompute}
    if not job.is_fp8 and job.precision.compute == "bfloat16":
        yield "precision", "precision=v3_fp8", {"precision": V3_FP8}
    if not parallel.zero:
        yield "zero", "parallel.zero=true", {"zero": True}
    if parallel.microbatch_rows != 1:
        yield "rows", "parallel.microbatch_rows=1", {"microbatch_rows": 1}
    if parallel.pipe > 1:
        if parallel.schedule in PUT_OFF and parallel.put_off is None:
            yield "schedule", "parallel.put_off=0", {"put_off": 0}
        for schedule in SCHEDULES:
            if schedule != parallel.schedule:
                other: dict[str, Any] = {"schedule": schedule, "chunks": None, "put_off": None}
                yield "schedule", f"parallel.schedule={schedule}", other
    if parallel.data % 2 == 0:
        fields = {"data": parallel.data // 2, "pipe": 2 * parallel.pipe, "layers_per_stage": None}
        yield "mesh", _set("pipe", "data", fields), fields
    for times in (2, 4, 8):
        # Experts go to more devices of the node while it has some, then to more nodes.
        axis = "expert" if parallel.expert * times <= device.devices_per_node else "node"
        if parallel.data % times == 0:
            fields = {"data": parallel.data // times, axis: times * getattr(parallel, axis)}
            yield "mesh", _set(axis, "data", fields), fields


def _set(first: str, second: str, fields: dict[str, Any]) -> str:
    return f"parallel.{first}={fields[first]} parallel.{second}={fields[second]}"


def _combined(
    job: Job, singles: Sequence[tuple[str, str, dict[str, Any]]], depth: int, start: int = 0
) -> Iterator[tuple[tuple[str, ...], Job]]:
    """Every combination of `depth` changes of different things."""
    for index in range(start, len(singles)):
        what, text, fields = singles[index]
        one = changed(job, **fields)
        if one is None or not _has_schedule_at_all(one):
            continue
        if depth == 1:
            yield (text,), one
            continue
        rest = [single for single in singles[index + 1 :] if single[0] != what]
        yield from (((text, *texts), other) for texts, other in _combined(one, rest, depth - 1))


def _has_schedule_at_all(job: Job) -> bool:
    try:
        return job.microbatches > 0
    except ConfigError:
        return False


def _fits(job: Job, device: Device) -> bool:
    return device_memory(job).total <= device.usable_memory


def _plan(job: Job, device: Device) -> Plan:
    check_layout(job, device)
    return Plan(job, device, device_memory(job), step_time(job, device))


def settings(job: Job) -> Iterable[str]:
    """A job's layout as `--set` takes it."""
    parallel = job.parallel
    yield f"parallel.pipe={parallel.pipe}"
    yield f"parallel.data={parallel.data}"
    yield f"parallel.node={parallel.node}"
    yield f"parallel.expert={parallel.expert}"
    if parallel.pipe > 1:
        yield f"parallel.schedule={parallel.schedule}"
        if parallel.put_off is not None:
            yield f"parallel.put_off={parallel.put_off}"
    yield f"parallel.microbatch_rows={job.microbatch_rows}"
    yield f"parallel.recompute={parallel.recompute}"
    yield f"parallel.zero={str(parallel.zero).lower()}"
    yield f"precision={'v3_fp8' if job.is_fp8 else {'bfloat16': 'bf16', 'float32': 'float32'}[job.precision.compute]}"
