"""The device mesh: always four named axes, each of size 1 where a run does not use it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from deepseek_jax.config import ConfigError, require
from deepseek_jax.parallel.pipeline.choice import ScheduleChoice

AXES = ("pipe", "data", "node", "expert")
"""Pipeline stages; data replicas; nodes and devices within a node. Expert parallelism is over (node, expert)."""

BATCH_AXES = ("data", "node", "expert")
"""The axes that the rows of a batch are split over."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a run is laid out over devices."""

    pipe: int = 1
    data: int = 1
    node: int = 1
    expert: int = 1
    schedule: str = "dualpipe"
    """The order of work over pipeline ranks: gpipe, one_f_one_b, eager_one_f_one_b, interleaved_one_f_one_b, zb_h1,
    dualpipe, dualpipe_v, or a text file of one's own that ends in .txt. With pipe 1 it does not matter."""
    chunks: int | None = None
    """Stages of each rank under interleaved_one_f_one_b; 2 where left out."""
    put_off: int | None = None
    """How many weight gradients may wait on a rank, of zb_h1, dualpipe and dualpipe_v: what waits for them can take
    more memory than activations, and fewer make a longer bubble. None: as many as the schedule has."""
    overlap: Literal["off", "steady", "braid"] | None = None
    """How the ticks are run in which every pipeline rank does a forward and a backward: like all others; by a body of
    their own without conditionals, so that a compiler can hide the exchanges of one under the other's compute; or with
    the equations of both interleaved layer by layer. The last two compile longer. None: braid, but off on CPUs."""
    layers_per_stage: tuple[int, ...] | None = None
    """Main-model layers of each pipeline stage; none: balanced by what they cost."""
    dispatcher: Literal["local", "all_to_all", "two_hop", "ragged"] | None = None
    """How tokens reach experts on other devices: in one hop, in two (to the node, then within it), or in one of packed
    rows, which needs GPUs. None: two hops where there are several nodes of several devices, else one."""
    capacity: float = 1.5
    """Room for tokens on their way to experts, as a multiple of what balanced routing needs. A step that needs more is
    run again with more: no token is ever dropped."""
    zero: bool = True
    """Keep master weights and optimizer state once across data ranks (ZeRO-1), not on each."""
    microbatch_rows: int | None = None
    """Rows (sequences) of a microbatch on one device; None takes a device's whole share at once, or in a pipeline one
    row."""
    recompute: Literal["none", "selective", "full"] = "selective"
    """What the backward pass computes again: nothing; norms, MLA up-projections and SwiGLU, as the paper does (section
    3.2.3); or all but each layer's input, for the least memory at a third more compute."""
    unroll_layers: int = 1
    """Layers of one kind that the compiled step writes out before it repeats. More save the copies of their activations
    into stacked arrays and back, and compile longer; 1 compiles as fast for any number of layers."""

    def __post_init__(self):
        for name in AXES:
            require(getattr(self, name) >= 1, f"parallel.{name} must be at least 1, not {getattr(self, name)}")
        require(
            self.microbatch_rows is None or self.microbatch_rows >= 1,
            f"parallel.microbatch_rows must be at least 1, not {self.microbatch_rows}",
        )
        require(
            self.put_off is None or self.put_off >= 0,
            f"parallel.put_off must be 0 or more, or none, not {self.put_off}",
        )
        require(self.capacity >= 1, f"parallel.capacity must be at least 1, not {self.capacity}")
        require(
            self.layers_per_stage is None or all(count >= 1 for count in self.layers_per_stage),
            f"parallel.layers_per_stage must be positive numbers of layers, not {self.layers_per_stage}",
        )
        require(
            self.overlap in (None, "off", "steady", "braid"),
            f"parallel.overlap must be off, steady or braid, not {self.overlap!r}",
        )
        known = ("local", "all_to_all", "two_hop", "ragged")
        require(
            self.dispatcher is None or self.dispatcher in known,
            f"parallel.dispatcher must be one of {', '.join(known)}, or none, not {self.dispatcher!r}",
        )
        require(self.unroll_layers >= 1, f"parallel.unroll_layers must be at least 1, not {self.unroll_layers}")
        require(
            self.recompute in ("none", "selective", "full"),
            f"parallel.recompute must be none, selective or full, not {self.recompute!r}",
        )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Sizes of the axes, in the order of `AXES`."""
        return self.pipe, self.data, self.node, self.expert

    @property
    def rows_at_once(self) -> int | None:
        """Rows of a microbatch on one device; None for a device's whole share."""
        return self.microbatch_rows or (1 if self.pipe > 1 else None)

    @property
    def schedule_choice(self) -> ScheduleChoice:
        """The schedule, for any number of microbatches."""
        return ScheduleChoice(self.schedule, self.pipe, self.chunks, self.put_off)

    @property
    def batch_shards(self) -> int:
        """How many devices share the rows of a batch."""
        return self.data * self.node * self.expert


def make_mesh(config: ParallelConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all).

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if math.prod(config.shape) != len(devices):
        layout = " x ".join(f"{name} {size}" for name, size in zip(AXES, config.shape, strict=True))
        raise ConfigError(
            f"the mesh {layout} needs {math.prod(config.shape)} devices, there are {len(devices)}; "
            f"change parallel.data, or simulate devices on CPU with --virtual_devices"
        )
    return mesh_of(np.asarray(devices).reshape(config.shape))


def mesh_of(devices: np.ndarray) -> Mesh:
    """A mesh of the four axes over an array of devices `[pipe, data, node, expert]`."""
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
