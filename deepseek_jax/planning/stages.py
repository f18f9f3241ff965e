"""How long each stage of the pipeline takes for one microbatch: its layers, its exchanges, and its part of the ends."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

from deepseek_jax.config import require
from deepseek_jax.parallel.mesh import ParallelConfig
from deepseek_jax.parallel.placement import place
from deepseek_jax.planning.devices import Device
from deepseek_jax.planning.job import Job
from deepseek_jax.planning.roofline import Op, Roofline, pass_seconds
from deepseek_jax.planning.traffic import exchanges


@dataclasses.dataclass(frozen=True)
class StageTime:
    """Seconds of one microbatch in one stage; compute of each pass, and what its exchanges take, were they alone."""

    forward: float
    input_gradient: float
    weight_gradient: float
    forward_exchange: float
    backward_exchange: float

    def __add__(self, other: StageTime) -> StageTime:
        return StageTime(*(a + b for a, b in zip(self._values, other._values, strict=True)))

    def times(self, count: float) -> StageTime:
        """So many of them."""
        return StageTime(*(count * value for value in self._values))

    @property
    def total(self) -> float:
        """All of it, one after the other."""
        return sum(self._values)

    @property
    def _values(self) -> tuple[float, ...]:
        return (
            self.forward,
            self.input_gradient,
            self.weight_gradient,
            self.forward_exchange,
            self.backward_exchange,
        )


NOTHING = StageTime(0.0, 0.0, 0.0, 0.0, 0.0)


class StageLayers(NamedTuple):
    """What a stage holds. In lock step these are its slots, whose cost is the same when they are empty."""

    dense: int
    moe: int
    mtp: int
    heads: float
    """Uses of the output head; a fraction where it is split over ranks."""


@dataclasses.dataclass(frozen=True)
class Stages:
    """The stages of a job on a device."""

    roofline: Roofline

    @property
    def job(self) -> Job:
        """What is planned."""
        return self.roofline.job

    @functools.cached_property
    def dense(self) -> StageTime:
        """Of a dense layer."""
        return _layer_time(_without_layout(self.job), self.roofline.device, dense=True)

    @functools.cached_property
    def moe(self) -> StageTime:
        """Of an MoE layer."""
        roofline = self.roofline
        there_and_back = sum(one.seconds(roofline.device) for one in exchanges(self.job))
        again = there_and_back if self.job.parallel.recompute == "full" else 0.0
        compute = _layer_time(_without_layout(self.job), roofline.device, dense=False)
        return compute + StageTime(0.0, 0.0, 0.0, there_and_back, there_and_back + again)

    @functools.cached_property
    def copies(self) -> tuple[StageTime, StageTime]:
        """Of a dense and of an MoE layer, where layers are in a loop."""
        dense, moe = (_stage_time(self.roofline.copies(dense=dense)) for dense in (True, False))
        return dense, moe

    @functools.cached_property
    def embedding(self) -> StageTime:
        """Of the lookup of tokens."""
        return _stage_time(self.roofline.embedding())

    @functools.cached_property
    def mtp(self) -> StageTime:
        """Of an MTP module, without its head."""
        return self.moe + _stage_time(self.roofline.mtp_join())

    @functools.cached_property
    def head(self) -> StageTime:
        """Of one use of the output head."""
        return _head_time(_without_layout(self.job), self.roofline.device)

    def time(self, layers: StageLayers) -> StageTime:
        """Of a stage."""
        each = self.job.model.mtp_depth + 1
        parts = [
            *((self.dense, layers.dense), (self.moe, layers.moe), (self.mtp, layers.mtp)),
            *((self.head, layers.heads), (self.embedding, layers.heads / each)),
        ]
        looped = max(1, self.job.parallel.unroll_layers)  # more of them than that are in a loop
        for copies, count in zip(self.copies, (layers.dense, layers.moe), strict=True):
            if count > looped:
                parts.append((copies, count))
        return sum((one.times(count) for one, count in parts), start=NOTHING)

    @functools.cached_property
    def layers(self) -> tuple[StageLayers, ...]:
        """What each stage holds."""
        return self._in_lock_step() if self.job.execution == "lock_step" else self._freely()

    @functools.cached_property
    def times(self) -> tuple[StageTime, ...]:
        """Of each stage."""
        known = {layers: self.time(layers) for layers in set(self.layers)}
        return tuple(known[layers] for layers in self.layers)

    def _in_lock_step(self) -> tuple[StageLayers, ...]:
        model, stages = self.job.model, self.job.stage_map
        placement = place_once(model, self.job.parallel.layers_per_stage, stages)
        heads = (1 + model.mtp_depth) / stages.stages
        moe, tail = placement.size("moe"), placement.size("mtp")
        # The tail is MTP modules in the last stage, and MoE layers, or empty, in all others.
        return tuple(
            StageLayers(
                dense=sum(name is not None for name in placement.slots["dense"][stage]),
                moe=moe + (tail if stage < stages.stages - 1 else 0),
                mtp=tail if stage == stages.stages - 1 else 0,
                heads=heads,
            )
            for stage in range(stages.stages)
        )

    def _freely(self) -> tuple[StageLayers, ...]:
        model, count = self.job.model, self.job.stage_map.stages
        dense, depth = model.num_dense_layers, model.mtp_depth
        costs = [self.dense.total] * dense + [self.moe.total] * model.num_moe_layers
        tail = depth * self.mtp.total + (1 + depth) * self.head.total
        found, start = [], 0
        for size in even_stages(tuple(costs), tail, count):
            own = max(0, min(start + size, dense) - start)
            found.append(StageLayers(own, size - own, 0, 0.0))
            start += size
        found[-1] = found[-1]._replace(mtp=depth, heads=1 + depth)
        return tuple(found)


@functools.lru_cache(maxsize=256)
def even_stages(costs: tuple[float, ...], tail: float, count: int) -> tuple[int, ...]:
    """Layers of each of `count` stages: those whose most expensive one is cheapest, and then the most even.

    Args:
      costs: of each layer.
      tail: of what the last stage has besides.
      count: stages; each gets a layer, but for the last one, which may be left with its tail.
    """
    require(count <= len(costs), f"{count} stages are more than the model's {len(costs)} layers: lower parallel.pipe")
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    @functools.cache
    def best(stage: int, start: int) -> tuple[float, float, tuple[int, ...]] | None:
        """(most expensive, sum of squares, sizes) of the stages from this one on."""
        left = len(costs) - start
        if stage == count - 1:
            cost = sums[-1] - sums[start] + tail
            return cost, cost * cost, (left,)
        found = None
        for size in range(1, left - (count - stage - 2) + 1):
            cost = sums[start + size] - sums[start]
            if found is not None and cost > found[0]:
                break
            rest = best(stage + 1, start + size)
            if rest is not None:
                one = max(cost, rest[0]), cost * cost + rest[1], (size, *rest[2])
                found = one if found is None or one < found else found
        return found

    answer = best(0, 0)
    assert answer is not None
    return answer[2]


place_once = functools.lru_cache(maxsize=256)(
    lambda config, layers_per_stage, stage_map: place(config, layers_per_stage, stage_map=stage_map)
)
"""`place`, which a search asks for the same stages again and again."""


def _without_layout(job: Job) -> Job:
    """The job with all of its layout left out that one microbatch's work does not depend on."""
    parallel = ParallelConfig(
        node=job.parallel.node,
        expert=job.parallel.expert,
        recompute=job.parallel.recompute,
        microbatch_rows=job.microbatch_rows,
    )
    return dataclasses.replace(job, parallel=parallel, rows=job.microbatch_rows * parallel.batch_shards)


@functools.lru_cache(maxsize=4096)
def _layer_time(job: Job, device: Device, *, dense: bool) -> StageTime:
    return _stage_time(Roofline(job, device).layer(dense=dense))


@functools.lru_cache(maxsize=4096)
def _head_time(job: Job, device: Device) -> StageTime:
    return _stage_time(Roofline(job, device).head())


def _stage_time(ops: tuple[Op, ...]) -> StageTime:
    found = pass_seconds(ops)
    return StageTime(found["F"], found["B"], found["W"], 0.0, 0.0)
