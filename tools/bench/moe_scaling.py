"""Benchmark (b): an MoE layer's time at 8, 32, 64 and 128 experts with the same active FLOPs.

    python -m tools.bench.moe_scaling [--write]

Forward and backward (input and all parameters) of one `MoE` of `zoo.bench()`: router, dispatch, shared and routed
experts, combine, on 8 × 512 tokens in float32. Only the number of experts changes, not how many of them a token uses.
Sizes take turns, so that a change of the machine's load falls on all of them.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx

from deepseek_jax import ops, zoo
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.context import LayerContext
from deepseek_jax.model.moe import MoE
from deepseek_jax.parallel.dispatch import LocalDispatcher
from experiments.run import keep_freed_memory
from tools.bench.common import LENGTH, ROWS, machine

EXPERTS = (8, 32, 64, 128)
LAYERS = 4
LIMIT = 1.5
RESULT = Path(__file__).parent / "results" / "moe_scaling.md"

_TURNS = flags.DEFINE_integer("turns", 15, "timed runs per number of experts")
_WRITE = flags.DEFINE_bool("write", False, f"write the table to {RESULT.name} in tools/bench/results")


def main(argv: list[str]) -> None:
    """Measures, prints the table, and with `--write` keeps it."""
    del argv
    keep_freed_memory()
    runs = {experts: make_run(with_experts(zoo.bench(), experts)) for experts in EXPERTS}
    for run in runs.values():
        run()
    seconds: dict[int, list[tuple[float, float]]] = {experts: [] for experts in EXPERTS}
    for _ in range(_TURNS.value):
        for experts, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            seconds[experts].append((time.perf_counter() - wall, time.process_time() - cpu))
    text = report(seconds)
    print(text)
    if _WRITE.value:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(text)


def with_experts(config: ModelConfig, experts: int) -> ModelConfig:
    """The same model with another number of experts, in the same number of groups."""
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, num_experts=experts))


def make_run(config: ModelConfig):
    """A function that runs `LAYERS` layers forward and backward, one after the other in one program, and waits.

    One program per layer would measure the allocation of its buffers, which a train step pays once for all layers.
    """
    module = MoE(config)
    graphdef, variables = nnx.split(module)
    keys = iter(jax.random.split(jax.random.key(0), 16))
    shapes = nnx.to_pure_dict(variables)
    params = jax.tree.map(lambda leaf: 0.05 * jax.random.normal(next(keys), leaf.shape, jnp.float32), shapes)
    x, cotangent = jax.random.normal(next(keys), (2, ROWS, LENGTH, config.hidden_size), jnp.float32)
    dispatcher = LocalDispatcher(config.moe.num_experts, ops.preferred_alignment())
    unused = jnp.zeros((ROWS, LENGTH, 1))

    def loss(params, x):
        nnx.replace_by_pure_dict(variables, params)
        out = nnx.merge(graphdef, variables)(x, LayerContext(unused, unused, dispatcher))
        return (out.y * cotangent).sum() + out.balance_loss

    @jax.jit
    def layers(params, x):
        def layer(x, _):
            dparams, dx = jax.grad(loss, argnums=(0, 1))(params, x)
            return x + 1e-3 * dx, dparams

        return jax.lax.scan(layer, x, None, length=LAYERS)

    return lambda: jax.block_until_ready(layers(params, x))


def report(seconds: dict[int, list[tuple[float, float]]]) -> str:
    """The table, with what is needed to read it later."""
    medians = {
        experts: [1e3 * statistics.median(column) / LAYERS for column in zip(*times, strict=True)]
        for experts, times in seconds.items()
    }
    first, last = EXPERTS[0], EXPERTS[-1]
    ratio = medians[last][0] / medians[first][0]
    lines = [
        "# The MoE layer's time does not follow the number of experts",
        "",
        f"`python -m tools.bench.moe_scaling --write` on {datetime.date.today()}: one MoE layer of `zoo.bench()`, "
        f"forward and backward, {ROWS} × {LENGTH} tokens, float32, on {machine()}; "
        f"jax {importlib.metadata.version('jax')}. Median of {_TURNS.value} alternating runs of {LAYERS} layers. "
        "CPU time is summed over threads and says more on a machine that does other work as well.",
        "",
        f"| experts | ms | to {first} experts | CPU ms | to {first} experts |",
        "|---|---|---|---|---|",
    ]
    for experts, (wall, cpu) in medians.items():
        wall_ratio, cpu_ratio = wall / medians[first][0], cpu / medians[first][1]
        lines.append(f"| {experts} | {wall:.0f} | {wall_ratio:.2f} | {cpu:.0f} | {cpu_ratio:.2f} |")
    verdict = "met" if ratio <= LIMIT else "missed"
    lines += ["", f"The goal, at most {LIMIT} times the time of {first} experts at {last}, is {verdict}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    app.run(main)
