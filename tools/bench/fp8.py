"""Benchmark: what FP8 training costs on a CPU, and what it saves in memory.

    python -m tools.bench.fp8 [--part=errors] [--part=step] [--part=kept] [--write]

**errors**: of one product, by what shares a scale and how sums are made, for random numbers and for such with outliers.

**step**: seconds of a train step of `zoo.bench()` in FP8 against float32 and BF16, in one process, in turns. A CPU has
no FP8 products: it dequantises and multiplies in float32, so that a laptop computes what a GPU would.
**kept**: what an MoE layer of DeepSeek-V3 keeps of a token between its forward and its backward pass, from the arrays
that the pipeline's rings hold, experts over 16 devices, selective recomputation; and the optimizer's bytes.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import statistics
import sys
import time
from pathlib import Path

from absl import app, flags

from deepseek_jax import zoo
from deepseek_jax.precision.policy import BF16, FLOAT32, V3_FP8
from experiments.cores import usable_cores
from experiments.run import prepare_environment
from tools.bench.common import LENGTH, ROWS, machine, make_trainer
from tools.bench.fp8_kept import INPUTS, LAYERS, TOKENS, by_meaning, kept
from tools.bench.pipeline_memory import bytes_of

RESULT = Path(__file__).parent / "results" / "fp8.md"
PARTS = ("errors", "step", "kept")
CASES = {
    "float32": FLOAT32,
    "FP8, the rest float32": dataclasses.replace(V3_FP8, compute="float32"),
    "bfloat16": BF16,
    "FP8, the rest bfloat16": V3_FP8,
}

_PART = flags.DEFINE_multi_enum("part", [], PARTS, "what to measure; default: all")
_TURNS = flags.DEFINE_integer("turns", 5, "timed steps of each, in turn, after one that is not", lower_bound=1)
_WRITE = flags.DEFINE_bool("write", False, f"write the tables to {RESULT.name} in tools/bench/results")


def main(argv):
    """Measures and prints the tables."""
    del argv
    prepare_environment(os.environ, virtual_devices=usable_cores())
    parts = _PART.value or PARTS
    chosen = "".join(f" --part={part}" for part in parts)
    lines = [
        "# FP8 training: what it costs on a CPU, and what it keeps",
        "",
        f"`python -m tools.bench.fp8{chosen} --write` on {datetime.date.today()}, on {machine()}; "
        f"jax {importlib.metadata.version('jax')}.",
        "",
    ]
    for part in parts:
        lines += {"errors": report_errors, "step": report_step, "kept": report_kept}[part]()
    text = "\n".join(lines)
    print(text)
    if _WRITE.value:
        RESULT.write_text(text)


SIZE, LOUD = 1024, 1e5


def report_errors() -> list[str]:
    """The table of errors of one product."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.block_scaled_matmul import block_scaled_matmul
    from pallas_kernels.block_scaled_matmul.tensor_core import matmul_14_bits
    from pallas_kernels.quantize import quantize

    keys = jax.random.split(jax.random.key(0), 5)
    x, w = (jax.random.normal(key, (SIZE, SIZE)) for key in keys[:2])
    loud = jnp.where(jax.random.uniform(keys[2], (1, SIZE)) < 0.005, LOUD, 1.0)  # five channels of a thousand
    inputs = {"normal": x, "with loud channels": x * loud}

    def error(y: jax.Array, exact: jax.Array) -> float:
        return float(jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact))

    def fprop(x: jax.Array, tile, block, **options) -> jax.Array:
        return block_scaled_matmul(quantize(x, tile, **options), quantize(w, block), out_dtype=jnp.float32)

    ways = {
        "1×128 by 128×128": lambda x: fprop(x, (1, 128), (128, 128)),
        "the same, scales of x powers of two": lambda x: fprop(x, (1, 128), (128, 128), power_of_two=True),
        "one scale each": lambda x: fprop(x, None, None),
        "1×128 by 128×128, x in E5M2": lambda x: fprop(x, (1, 128), (128, 128), dtype=jnp.float8_e5m2),
    }
    lines = [
        f"Root-mean-square error of `x @ w`, {SIZE}³, relative to the float32 product. Loud: five channels of a "
        f"thousand are {LOUD:,.0f} times as large. Quiet: of what all other channels add to that product.",
        "",
        "| | normal | with loud channels | its quiet channels |",
        "|---|---|---|---|",
    ]
    quiet = jnp.where(loud > 1, 0.0, 1.0)
    for name, way in ways.items():
        errors = [error(way(value), value @ w) for value in inputs.values()]
        # The loud channels' own contribution is taken out of both, as FP8 has it.
        silent = way(inputs["with loud channels"]) - way(inputs["with loud channels"] * (1 - quiet))
        errors.append(error(silent, (x * quiet) @ w))
        lines.append(f"| {name} | {' | '.join(f'{value:.2%}' for value in errors)} |")
    codes = [jax.random.normal(key, shape).astype(jnp.float8_e4m3fn) for key, shape in
             zip(keys[3:], ((256, 4096), (4096, 256)), strict=True)]  # fmt: skip
    exact = jnp.matmul(*(code.astype(jnp.float32) for code in codes), precision="highest")
    worst = {
        how: float(jnp.abs(matmul_14_bits(*codes, promote_every=every) - exact).max() / jnp.sqrt((exact**2).mean()))
        for how, every in (("without promotion", None), ("with promotion every 128", 128))
    }
    lines += [
        "",
        "Largest error of the tensor core's 14 bits over the root mean square of the product, 256 × 4096 × 256: "
        + ", ".join(f"{value:.2%} {how}" for how, value in worst.items())
        + ".",
        "",
    ]
    return lines


def report_step() -> list[str]:
    """The table of a step's seconds."""
    import jax.numpy as jnp

    seconds: dict[str, list[float]] = {}
    runs = {}
    for case, policy in CASES.items():
        trainer, batch, hyper = make_trainer(zoo.bench(), fp8=policy.fp8, compute_dtype=jnp.dtype(policy.compute))
        runs[case] = [trainer, trainer.initial_state(0), batch, hyper]
        print(f"{case}: loss {step(runs[case]):.4f}", file=sys.stderr)
    for _ in range(_TURNS.value):
        for case, run in runs.items():
            begin = time.perf_counter()
            step(run)
            seconds.setdefault(case, []).append(time.perf_counter() - begin)
    lines = [
        f"A step of `zoo.bench()`, {ROWS} rows of {LENGTH} tokens, data-parallel over {usable_cores()} cores. Medians "
        f"of {_TURNS.value} turns; times: the median over turns of the ratio to float32 in the same turn. Goal: 2.5.",
        "",
        "| | seconds | times float32 |",
        "|---|---|---|",
    ]
    for case, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, seconds["float32"], strict=True))
        lines.append(f"| {case} | {statistics.median(values):.2f} | {ratio:.2f} |")
    return [*lines, ""]


def step(run: list) -> float:
    """One step; `run` is (trainer, state, batch, scalars), whose state moves on."""
    import jax

    trainer, state, batch, hyper = run
    run[1], metrics = trainer.step(state, batch, hyper)
    jax.block_until_ready(run[1])
    return float(metrics.loss)


def report_kept() -> list[str]:
    """The table of what is kept, and of the optimizer's bytes."""
    arrays = {name: kept(policy) for name, policy in (("bfloat16", BF16), ("FP8", V3_FP8))}
    per_token = lambda found: bytes_of(found) / TOKENS / (LAYERS // 2)  # noqa: E731
    groups = {name: by_meaning(found) for name, found in arrays.items()}
    lines = [
        "Bytes that an MoE layer of DeepSeek-V3 keeps of a token. Goals: 0.57 for linear and SwiGLU inputs, 0.65 for "
        "the layer.",
        "",
        "| | bfloat16 | FP8 | ratio |",
        "|---|---|---|---|",
    ]
    rows = {what: [per_token(groups[name][what]) for name in arrays] for what in groups["FP8"]}
    inputs = [sum(values) for values in zip(*(rows[what] for what in INPUTS.values()), strict=True)]
    rows |= {"linear and SwiGLU inputs": inputs, "the layer": [per_token(found) for found in arrays.values()]}
    for what, (before, after) in rows.items():
        lines.append(f"| {what} | {before:,.0f} | {after:,.0f} | {after / before:.3f} |")
    lines += [
        "",
        "Optimizer: 4 bytes a parameter for the master weight and 2 for each moment with "
        "`optimizer.moment_dtype=bfloat16` (12 with float32 moments), once across data ranks; 4 for the sum of its "
        "gradient.",
        "",
    ]
    return lines


if __name__ == "__main__":
    app.run(main)
