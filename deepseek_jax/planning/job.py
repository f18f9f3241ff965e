"""What is planned: a model, its layout and its batch, without anything that only a run needs."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

from deepseek_jax.config import ModelConfig, require
from deepseek_jax.parallel.dispatch.capacity import ExpertMesh, check_experts, choose_dispatcher
from deepseek_jax.parallel.mesh import AXES, ParallelConfig
from deepseek_jax.parallel.pipeline.choice import SUFFIX, ScheduleChoice
from deepseek_jax.parallel.pipeline.schedule import StageMap
from deepseek_jax.parallel.vocabulary import check_vocabulary
from deepseek_jax.planning.devices import Device, Dtype
from deepseek_jax.precision.policy import LinearKind, PrecisionPolicy, only_for

Execution = Literal["lock_step", "free"]
"""How a schedule runs. `lock_step`: as this library does it, one program on all ranks, in ticks that end together; ends
are split over ranks. `free`: every rank by itself, as soon as its inputs are there, the head in the last stage, and
layers cut into stages as evenly as they can be. That is how other systems run."""

RUNTIME_WIDTH = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One step, over and over."""

    model: ModelConfig
    parallel: ParallelConfig
    precision: PrecisionPolicy
    length: int
    """Tokens of a sequence."""
    rows: int
    """Sequences of a step, over all devices."""
    moment_bytes: int = 2
    """Of each of the optimizer's two moments, per parameter."""
    execution: Execution = "lock_step"
    imbalance: float = 1.04
    """Rows at the busiest experts over the mean. With the router bias a batch has 1.04 (arXiv 2408.15664, models of 1B
    and 3B); 1 where routing is forced to balance."""

    def __post_init__(self):
        require(self.rows >= 1, f"a step needs at least one sequence, not {self.rows}")
        require(self.imbalance >= 1, f"imbalance is the busiest over the mean, at least 1, not {self.imbalance}")
        mesh, parallel = ExpertMesh(self.parallel.node, self.parallel.expert), self.parallel
        check_experts(self.model.moe, mesh, choose_dispatcher(parallel.dispatcher, mesh))
        if self.execution == "lock_step":
            check_vocabulary(self.model.vocab_size, parallel.pipe)
        stages = self.stage_map.stages
        require(
            stages <= self.model.num_layers,
            f"parallel.pipe={parallel.pipe} with parallel.schedule={parallel.schedule} cuts the model into {stages} "
            f"stages, and it has {self.model.num_layers} layers: lower parallel.pipe or parallel.chunks",
        )

    @property
    def devices(self) -> int:
        """Of the mesh."""
        return math.prod(self.parallel.shape)

    @property
    def stage_map(self) -> StageMap:
        """Where stages live."""
        return _stage_map(self.parallel.schedule_choice)

    @property
    def microbatch_rows(self) -> int:
        """Sequences of a microbatch on one device."""
        share = math.ceil(self.rows / self.parallel.batch_shards)
        return min(self.parallel.rows_at_once or share, share)

    @property
    def tokens(self) -> int:
        """Of a microbatch on one device."""
        return self.microbatch_rows * self.length

    @property
    def microbatches(self) -> int:
        """Of a step, those included that are empty because the schedule needs more than the batch has."""
        needed = math.ceil(self.rows / (self.parallel.batch_shards * self.microbatch_rows))
        return _fitting(self.parallel.schedule_choice, needed)

    @property
    def busiest(self) -> float:
        """`imbalance`, where experts are on several devices, of which all wait for the busiest; else 1."""
        return self.imbalance if self.parallel.node * self.parallel.expert > 1 else 1.0

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return RUNTIME_WIDTH[self.precision.compute]

    @property
    def wire(self) -> float:
        """Bytes per number of a token on its way to experts, scales included."""
        names = {"float8": 1 + 4 / 128, "bfloat16": 2.0, "float32": 4.0, None: float(self.width)}
        return names[self.precision.dispatch]

    @property
    def is_fp8(self) -> bool:
        """Whether any linear layer runs in FP8."""
        return self.precision.fp8 is not None

    def dtype(self, kind: LinearKind | None) -> Dtype:
        """What a kind of linear layer multiplies."""
        return "float8" if kind is not None and only_for(kind, self.precision.fp8) else self.precision.compute


def _fitting(choice: ScheduleChoice, needed: int) -> int:
    """`choice.fitting`, without a schedule of thousands of microbatches made to see that there is one: which numbers a
    known schedule can have repeats every 2P."""
    period = 2 * choice.ranks
    spare = 0 if choice.name.endswith(SUFFIX) else max(needed - 4 * choice.ranks, 0) // period * period
    return choice.fitting(needed - spare) + spare


@functools.lru_cache(maxsize=1024)
def _stage_map(choice: ScheduleChoice) -> StageMap:
    """A schedule has to be made to know it, and a search asks for the same ones again and again."""
    return choice.stage_map


def check_layout(job: Job, device: Device, count: int | None = None) -> None:
    """Raises `ConfigError` where a job's mesh is not one of `count` such devices."""
    parallel = job.parallel
    layout = " x ".join(f"{axis} {getattr(parallel, axis)}" for axis in AXES)
    require(
        count in (None, job.devices),
        f"the mesh {layout} has {job.devices:,} devices, not {count}: change parallel.data (now {parallel.data}), or "
        "let --search find a mesh",
    )
    size, spread = device.devices_per_node, parallel.node * parallel.expert
    require(
        parallel.expert <= size,
        f"parallel.expert={parallel.expert} devices do not fit into one node of {size} {device.name}s: spread experts "
        f"over more nodes, as with parallel.node={math.ceil(spread / size)} parallel.expert={size}",
    )


def with_device_count(parallel: ParallelConfig, count: int) -> ParallelConfig:
    """The layout with as many data replicas as `count` devices need.

    Raises:
      ConfigError: the other axes do not divide them; the message has the nearest counts that they do.
    """
    share = parallel.pipe * parallel.node * parallel.expert
    below = count // share * share
    near = " or ".join(f"{one:,}" for one in (below, below + share) if one > 0)
    require(
        count > 0 and count % share == 0,
        f"{count:,} devices are no multiple of {share:,}, which pipe {parallel.pipe} x node {parallel.node} x expert "
        f"{parallel.expert} need for one replica: take {near}, or change these axes (tools.plan --search finds a mesh)",
    )
    return dataclasses.replace(parallel, data=count // share)
