"""Compiles a recipe's train step for H200s, without one: `python -m tools.aot v3.pretrain --set parallel.pipe=1 …`.

Needs the extra [cuda] (the plugin, no GPU and no driver). Prints the compiler's plan of a device's memory and the
collectives of the compiled program. Nothing is allocated, and nothing runs: speed and numbers are not to be had here.
"""

from __future__ import annotations

import collections
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import ConfigError, require
from deepseek_jax.config_io import override_all
from deepseek_jax.model.targets import Microbatch
from deepseek_jax.parallel.sharding import BATCH_SPEC
from deepseek_jax.planning.gpu_target import h200_mesh
from deepseek_jax.training.experiment import Experiment
from deepseek_jax.training.sharding_table import abstract_state, abstract_trainer
from deepseek_jax.training.step import Hyperparameters
from experiments.run import UsageError, find_recipe

SET = flags.DEFINE_multi_string("set", [], "change one value of the recipe: parallel.expert=8")
SETTING = flags.DEFINE_integer(
    "setting", None, "the place in the ladder of room for tokens; none: the one that runs begin with", lower_bound=0
)
MICROBATCHES = flags.DEFINE_integer("microbatches", 1, "microbatches of the step that is compiled", lower_bound=1)
DUMP = flags.DEFINE_string("dump", None, "write the compiled program to this file")

COLLECTIVES = ("all-to-all", "ragged-all-to-all", "all-gather", "reduce-scatter", "all-reduce", "collective-permute")


def compile_step(experiment: Experiment, microbatches: int, setting: int | None = None):
    """The compiled step of an experiment on H200s, over a batch of so many microbatches a device.

    Raises:
      ConfigError: the model does not fit the mesh, or jax cannot compile for GPUs here.
    """
    trainer = abstract_trainer(experiment, h200_mesh(experiment.parallel))
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
    return trainer.lower(abstract_state(trainer), batch, hyper, setting).compile()


def count_collectives(program: str) -> dict[str, int]:
    """How many of each kind of collective are in a compiled program's text; a loop's body counts once."""
    found = collections.Counter(re.findall(r" ([a-z-]+?)(?:-start)?\(", program))
    return {name: found[name] for name in COLLECTIVES if found[name]}


def main(argv: Sequence[str]) -> int:
    """Compiles and prints; the exit code."""
    if len(argv) != 2:
        print("usage: python -m tools.aot RECIPE [--set PATH=VALUE]... [--microbatches N]", file=sys.stderr)
        return 2
    try:
        experiment = override_all(find_recipe(argv[1])(), SET.value)
        begin = time.perf_counter()
        compiled = compile_step(experiment, MICROBATCHES.value, SETTING.value)
    except (ConfigError, UsageError) as error:
        print(error, file=sys.stderr)
        return 2
    text, plan = compiled.as_text(), compiled.memory_analysis()
    parts = {
        "arguments": plan.argument_size_in_bytes,
        "results": plan.output_size_in_bytes - plan.alias_size_in_bytes,
        "temporaries": plan.temp_size_in_bytes,
    }
    print(f"{argv[1]} on {experiment.parallel}")
    print(f"compiled for sm_90a in {time.perf_counter() - begin:.0f} s by jax {jax.__version__}")
    print("bytes per device: " + ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in parts.items()))
    print("collectives: " + ", ".join(f"{count} {name}" for name, count in count_collectives(text).items()))
    if DUMP.value:
        with open(DUMP.value, "w") as file:
            file.write(text)
    return 0


if __name__ == "__main__":
    app.run(lambda argv: sys.exit(main(argv)))
