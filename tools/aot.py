"""Compiles a recipe's train step for H200s, without one: `python -m tools.aot --recipe v3.pretrain --devices 2048`.

Needs the extra [cuda] (the plugin, no GPU and no driver). Prints the compiler's plan of a device's memory beside the
planner's, the largest of temporary arrays, and the collectives; of a pipeline also what its loops over ticks
hold, and how much of their exchanges the program's order leaves exposed, at the stated speeds (`planning/overlap.py`).
`--check` is a gate: the exit code is 1 where the step does not fit. Nothing is allocated, and nothing runs: speed and
numbers are not to be had here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import ConfigError, require
from deepseek_jax.config_io import override_all
from deepseek_jax.model.targets import Microbatch
from deepseek_jax.parallel.pipeline.tables import make_tables
from deepseek_jax.parallel.sharding import BATCH_SPEC
from deepseek_jax.planning.buffers import largest_buffers, lost_between, read_plan
from deepseek_jax.planning.compiled import (
    CompiledProgram,
    collective_bytes,
    count_collectives,
    read_program,
)
from deepseek_jax.planning.device_memory import DeviceMemory, device_memory
from deepseek_jax.planning.devices import H200
from deepseek_jax.planning.gpu_target import LATENCY_HIDING, h200_mesh
from deepseek_jax.planning.job import with_device_count
from deepseek_jax.planning.overlap import Replay, Span, Speeds
from deepseek_jax.planning.tick_loops import TickLoop, tick_loops
from deepseek_jax.training.experiment import Experiment
from deepseek_jax.training.sharding_table import abstract_state, abstract_trainer
from deepseek_jax.training.step import Hyperparameters
from experiments.run import UsageError, find_recipe
from pallas_kernels import target
from pallas_kernels.target import compiling_for
from tools.plan import job_of
from tools.plan_text import MEMORY_PARTS, table

RECIPE = flags.DEFINE_string("recipe", None, "as `python -m experiments.run --list` has it")
DEVICES = flags.DEFINE_integer("devices", None, "how many; none: as many as the recipe's mesh has", lower_bound=1)
SET = flags.DEFINE_multi_string("set", [], "change one value of the recipe: parallel.expert=8")
SETTING = flags.DEFINE_integer(
    "setting", None, "the place in the ladder of room for tokens; none: the one that runs begin with", lower_bound=0
)
MICROBATCHES = flags.DEFINE_integer(
    "microbatches",
    None,
    "microbatches of the step that is compiled; none: as few as its schedule can have",
    lower_bound=1,
)
HIDE = flags.DEFINE_bool("hide_latency", True, "compile with the scheduler that lays exchanges beside compute")
MEMORY = flags.DEFINE_float(
    "memory_gb",
    151.4,
    "memory that a device is described with (141 GiB; 139 GB are counted as usable unless this is given): XLA hides no "
    "exchange where a program does not fit",
    lower_bound=1,
)
KERNELS = flags.DEFINE_bool(
    "kernels", False, "with the kernels for Hopper, as on a GPU where they passed their checks; else portable products"
)
CHECK = flags.DEFINE_bool("check", False, "exit with 1 where the step does not fit into a device's memory")
JSON = flags.DEFINE_bool("json", False, "print it for programs")
DUMP = flags.DEFINE_string("dump", None, "write the compiled program to this file")

LARGEST = 16
"""How many temporary arrays are named."""


def compile_step(
    experiment: Experiment,
    microbatches: int,
    setting: int | None = None,
    options: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
):
    """The compiled step of an experiment on H200s, over a batch of so many microbatches a device.

    Args:
      experiment: what is trained.
      microbatches: of a step.
      setting: the place in the ladder of room for tokens; none: the one that runs begin with.
      options: of the compiler.
      mesh: of devices that exist in description only; none: H200s.

    Raises:
      ConfigError: the model does not fit the mesh, or jax cannot compile for GPUs here.
    """
    trainer = abstract_trainer(experiment, mesh or h200_mesh(experiment.parallel))
    parallel = experiment.parallel
    rows = microbatches * (parallel.microbatch_rows or 1) * parallel.batch_shards
    shape = (rows, experiment.data.sequence_length + 1)
    split, everywhere = (NamedSharding(trainer.mesh, spec) for spec in (BATCH_SPEC, P()))
    batch = Microbatch(*(jax.ShapeDtypeStruct(shape, jnp.int32, sharding=split) for _ in Microbatch._fields))
    scalar: Any = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
    ladder = trainer.dispatchers(shape)
    setting = trainer.room.setting(ladder) if setting is None else setting
    require(setting < len(ladder), f"--setting={setting}: the ladder has {len(ladder)}, counted from 0")
    hyper = Hyperparameters(scalar, scalar, scalar)
    return trainer.lower(abstract_state(trainer), batch, hyper, setting).compile(compiler_options=dict(options or {}))


def ring_rows(experiment: Experiment, microbatches: int) -> set[int]:
    """Numbers of rows of the rings that hold a stage's activations, scratch rows included.

    A stack of as many layers cannot be told from a ring, and its copies count as a ring's.
    """
    rings = make_tables(experiment.parallel.schedule_choice.make(microbatches)).rings
    return {rows + 1 for rows in (rings.residual, rings.stash) if rows}


def describe_loops(program: CompiledProgram, rows: set[int], speeds: Speeds | None = None) -> list[str]:
    """A few lines for each loop over ticks."""
    lines = []
    for loop in tick_loops(program, rows, Replay(program, speeds)):
        lines += _describe(loop)
    return lines


def _describe(loop: TickLoop) -> list[str]:
    conditionals = ", ".join(f"{count} {name}" for name, count in loop.conditionals.items()) or "none"
    copies = (
        f"{len(loop.ring_copies)} ring copies ({', '.join(loop.ring_copies[:4])})"
        if loop.ring_copies
        else "no ring copies"
    )
    lines = [
        f"loop of {loop.turns} turns: {loop.exchanges} exchanges, {loop.around_exchanges} conditionals around them; "
        f"conditionals: {conditionals}; {loop.sums} all-reduces, {copies}",
        f"  a turn: {_times(loop.span)}",
    ]
    for layers in loop.layer_loops:
        groups = " and ".join(map(str, layers.chains))
        lines.append(f"  loop of {layers.turns} layers, independent exchanges {groups}: {_times(layers.span)}")
    return lines


def _times(span: Span) -> str:
    total, compute, exchange, exposed = (1e3 * seconds for seconds in span)
    return (
        f"{total:.1f} ms as replayed, compute {compute:.1f}, exchanges {exchange:.1f}, of them {exposed:.1f} exposed, "
        f"{exposed / max(total, 1e-9):.1%}"
    )


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What the compiler made of a step. Bytes are those of one device."""

    jax: str
    """Its version."""
    devices: int
    microbatches: int
    arguments: int
    """The state, and the batch."""
    results: int
    """Besides those that lie where arguments did."""
    temporaries: int
    lost: int | None
    """Of the temporaries, what no array has even when they have most. None: the compiler did not say."""
    collectives: dict[str, tuple[int, float]]
    """Of each kind how many stand in the program, and the bytes of their results in a step, at most."""
    largest: list[tuple[int, str, str]]
    """The largest arrays in temporary memory that share no bytes: bytes, shape, where from."""
    planned: DeviceMemory
    """What the planner says of the same step."""
    seconds: float
    """Of compiling."""
    host_memory: int
    """The most that this process had."""

    @property
    def peak(self) -> int:
        """Bytes of a device that the step needs."""
        return self.arguments + self.results + self.temporaries

    @property
    def planned_step(self) -> float:
        """What the planner says of `peak`: all but what is lost between buffers."""
        return self.planned.total - self.planned.lost


def report_of(
    experiment: Experiment, microbatches: int, compiled, plan_of_memory: tuple[str, str], seconds: float
) -> StepReport:
    """Reads a compiled step of an experiment, and the compiler's plan of its memory, as `read_plan` gives it."""
    plan, program = compiled.memory_analysis(), read_program(compiled.as_text())
    moved, counts = collective_bytes(program), count_collectives(program)
    parallel, job = experiment.parallel, job_of(experiment)
    buffers = largest_buffers(plan_of_memory[0], LARGEST)
    made_by = {one.name: one.op_name for of in program.computations.values() for one in of.instructions if one.op_name}
    rows = microbatches * (parallel.microbatch_rows or 1) * parallel.batch_shards
    return StepReport(
        jax=jax.__version__,
        devices=job.devices,
        microbatches=microbatches,
        arguments=plan.argument_size_in_bytes,
        results=plan.output_size_in_bytes - plan.alias_size_in_bytes,
        temporaries=plan.temp_size_in_bytes,
        lost=lost_between(*plan_of_memory),
        collectives={kind: (count, moved.get(kind, 0.0)) for kind, count in counts.items()},
        largest=[(one.size, one.shape, made_by.get(one.name, one.name)) for one in buffers],
        planned=device_memory(dataclasses.replace(job, rows=rows)),
        seconds=seconds,
        host_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def describe(found: StepReport, usable: float) -> str:
    """For people: memory beside the plan and beside what a device has, collectives, and the largest temporaries."""
    gigabytes = [f"{size / 1e9:.2f}" for size in (found.arguments, found.results, found.temporaries, found.peak)]
    verdict = "fits" if found.peak <= usable else f"lacks {(found.peak - usable) / 1e9:.1f} GB"
    lost = "an unknown part" if found.lost is None else f"{found.lost / 1e9:.2f}, {found.lost / found.temporaries:.1%},"
    parts = ", ".join(
        f"{words} {getattr(found.planned, name) / 1e9:.1f}" for name, words in MEMORY_PARTS.items() if name != "lost"
    )
    collectives = [(kind, str(n), f"{moved / 1e9:.2f}") for kind, (n, moved) in found.collectives.items()]
    largest = [(f"{size / 1e9:.2f}", shape, where[-90:]) for size, shape, where in found.largest]
    return "\n".join(
        [
            f"compiled for sm_90a and {found.devices:,} devices in {found.seconds:.0f} s with "
            f"{found.host_memory / 1e9:.1f} GB of this machine's memory, by jax {found.jax}",
            "",
            f"A step of {found.microbatches} microbatches, GB of a device: arguments {gigabytes[0]}, results "
            f"{gigabytes[1]}, temporaries {gigabytes[2]}, together {gigabytes[3]} of {usable / 1e9:.1f}: {verdict}.",
            f"Of the temporaries {lost} is lost between arrays.",
            f"The planner says {found.planned_step / 1e9:.2f}, {found.planned_step / found.peak - 1:+.1%}: {parts}.",
            "",
            table(("collective", "in the program", "GB of results in a step, at most"), collectives, left=(0,)),
            "",
            table(("GB", "largest of temporaries", "where from"), largest, left=(1, 2)),
        ]
    )


def main(argv: Sequence[str]) -> int:
    """Compiles and prints; the exit code."""
    if len(argv) != 1 or RECIPE.value is None:
        usage = "python -m tools.aot --recipe NAME [--devices N] [--set PATH=VALUE]... [--check]"
        print(f"usage: {usage}", file=sys.stderr)
        return 2
    try:
        experiment = override_all(find_recipe(RECIPE.value)(), SET.value)
        if DEVICES.value is not None:
            parallel = with_device_count(experiment.parallel, DEVICES.value)
            experiment = dataclasses.replace(experiment, parallel=parallel)
        begin = time.perf_counter()
        options = LATENCY_HIDING if HIDE.value else {}
        choice = experiment.parallel.schedule_choice
        microbatches = MICROBATCHES.value or choice.fitting(1)
        choice.make(microbatches)  # or says what it can have
        with tempfile.TemporaryDirectory() as folder:
            # Before the plugin is loaded, which reads it. XLA says where it places arrays nowhere else.
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder}".strip()
            mesh = h200_mesh(experiment.parallel, memory=round(MEMORY.value * 1e9))
            with compiling_for(target.H200._replace(trusted=True)) if KERNELS.value else contextlib.nullcontext():
                compiled = compile_step(experiment, microbatches, SETTING.value, options, mesh)
            plan_of_memory = read_plan(Path(folder))
    except (ConfigError, UsageError) as error:
        print(error, file=sys.stderr)
        return 2
    found = report_of(experiment, microbatches, compiled, plan_of_memory, time.perf_counter() - begin)
    usable = MEMORY.value * 1e9 - H200.reserved if flags.FLAGS["memory_gb"].present else H200.usable_memory
    if JSON.value:
        print(json.dumps(dataclasses.asdict(found) | {"peak": found.peak, "usable": usable}, indent=1))
    else:
        print(f"{RECIPE.value} on {experiment.parallel}\n{describe(found, usable)}")
        if experiment.parallel.pipe > 1:
            program = read_program(compiled.as_text())
            print("\n" + "\n".join(describe_loops(program, ring_rows(experiment, microbatches))))
    if DUMP.value:
        with open(DUMP.value, "w") as file:
            file.write(compiled.as_text())
    return 1 if CHECK.value and found.peak > usable else 0


if __name__ == "__main__":
    app.run(lambda argv: sys.exit(main(argv)))
