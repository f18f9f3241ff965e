"""Compiles a recipe's train step for H200s, without one: `python -m tools.aot v3.pretrain --set parallel.pipe=1 …`.

Needs the extra [cuda] (the plugin, no GPU and no driver). Prints the compiler's plan of a device's memory and the
collectives of the compiled program; of a pipeline also what its loops over ticks hold, and how much of their exchanges
the program's order leaves exposed, at the stated speeds (`planning/overlap.py`). Nothing is allocated, and nothing
runs: speed and numbers are not to be had here.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
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
from deepseek_jax.planning.compiled import CompiledProgram, count_collectives, read_program
from deepseek_jax.planning.gpu_target import LATENCY_HIDING, h200_mesh
from deepseek_jax.planning.overlap import Replay, Span, Speeds
from deepseek_jax.planning.tick_loops import TickLoop, tick_loops
from deepseek_jax.training.experiment import Experiment
from deepseek_jax.training.sharding_table import abstract_state, abstract_trainer
from deepseek_jax.training.step import Hyperparameters
from experiments.run import UsageError, find_recipe

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
    "memory_gb", 151.4, "memory of a device: XLA hides no exchange where a program does not fit", lower_bound=1
)
DUMP = flags.DEFINE_string("dump", None, "write the compiled program to this file")


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


def main(argv: Sequence[str]) -> int:
    """Compiles and prints; the exit code."""
    if len(argv) != 2:
        print("usage: python -m tools.aot RECIPE [--set PATH=VALUE]... [--microbatches N]", file=sys.stderr)
        return 2
    try:
        experiment = override_all(find_recipe(argv[1])(), SET.value)
        begin = time.perf_counter()
        options = LATENCY_HIDING if HIDE.value else {}
        choice = experiment.parallel.schedule_choice
        microbatches = MICROBATCHES.value or choice.fitting(1)
        choice.make(microbatches)  # or says what it can have
        mesh = h200_mesh(experiment.parallel, memory=round(MEMORY.value * 1e9))
        compiled = compile_step(experiment, microbatches, SETTING.value, options, mesh)
    except (ConfigError, UsageError) as error:
        print(error, file=sys.stderr)
        return 2
    text, plan = compiled.as_text(), compiled.memory_analysis()
    program = read_program(text)
    parts = {
        "arguments": plan.argument_size_in_bytes,
        "results": plan.output_size_in_bytes - plan.alias_size_in_bytes,
        "temporaries": plan.temp_size_in_bytes,
    }
    print(f"{argv[1]} on {experiment.parallel}")
    print(f"compiled for sm_90a in {time.perf_counter() - begin:.0f} s by jax {jax.__version__}")
    print("bytes per device: " + ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in parts.items()))
    print("collectives: " + ", ".join(f"{count} {name}" for name, count in count_collectives(program).items()))
    if experiment.parallel.pipe > 1:
        print("\n".join(describe_loops(program, ring_rows(experiment, microbatches))))
    if DUMP.value:
        with open(DUMP.value, "w") as file:
            file.write(text)
    return 0


if __name__ == "__main__":
    app.run(lambda argv: sys.exit(main(argv)))
