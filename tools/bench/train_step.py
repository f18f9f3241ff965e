"""Benchmark (a): tokens per second of a train step, against Hugging Face on PyTorch.

    python -m tools.bench.train_step [--write]

Both train `zoo.bench()` on 8 rows of 512 tokens in float32 with AdamW and clipping, on the same number of threads, in
processes of their own that take turns; ours also with its layers unrolled, PyTorch with the malloc settings that our
runs make for themselves and as it comes. Needs the `parity` extra.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from absl import app, flags

from deepseek_jax import zoo
from deepseek_jax.config import ModelConfig
from experiments.run import keep_freed_memory, prepare_environment
from tools.bench.common import LENGTH, ROWS, hugging_face_config, machine, make_trainer

RESULT = Path(__file__).parent / "results" / "train_step.md"
UNROLL_LAYERS = 8
SIDES = {
    "deepseek_jax": "deepseek_jax",
    "unrolled": f"deepseek_jax, `parallel.unroll_layers={UNROLL_LAYERS}`",
    "torch": "transformers on torch, our malloc settings",
    "torch_as_it_comes": "transformers on torch, as it comes",
}

_SIDE = flags.DEFINE_enum("side", None, list(SIDES), "measure one side in this process and print its result as JSON")
_TURNS = flags.DEFINE_integer("turns", 3, "processes per side")
_THREADS = flags.DEFINE_integer("threads", 2, "threads (and cores) of each process")
_STEPS = flags.DEFINE_integer("steps", 8, "timed steps per process, after two that are not")
_WRITE = flags.DEFINE_bool("write", False, f"write the table to {RESULT.name} in tools/bench/results")


def main(argv):
    """Measures one side, or all in turns, and prints the table."""
    del argv
    if _SIDE.value:
        measure = {
            "deepseek_jax": measure_deepseek_jax,
            "unrolled": functools.partial(measure_deepseek_jax, unroll_layers=UNROLL_LAYERS),
            "torch": measure_torch,
            "torch_as_it_comes": functools.partial(measure_torch, tune_malloc=False),
        }[_SIDE.value]
        print(json.dumps(measure(zoo.bench(), _STEPS.value, _THREADS.value)))
        return
    results: dict[str, list[dict]] = {side: [] for side in SIDES}
    for turn in range(_TURNS.value):
        for side in SIDES:
            results[side].append(run_alone(side))
            print(f"turn {turn + 1}, {side}: {results[side][-1]['tokens_per_second']:.0f} tokens/s", file=sys.stderr)
    text = report(results)
    print(text)
    if _WRITE.value:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(text)


def run_alone(side: str) -> dict:
    """One measurement in a fresh process, bound to `--threads` cores."""
    threads = str(_THREADS.value)
    command = [sys.executable, "-m", "tools.bench.train_step", f"--side={side}"]
    command += [f"--threads={threads}", f"--steps={_STEPS.value}"]
    settings = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=os.environ | settings, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def bind(threads: int) -> None:
    """Keeps this process on as many cores as it has threads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def timed(step, steps: int) -> dict:
    """Runs `step()` until it is done, twice untimed and then `steps` times."""
    begin = time.perf_counter()
    loss = step()
    first = time.perf_counter() - begin
    step()
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - begin)
    return {
        "tokens_per_second": ROWS * LENGTH / statistics.median(seconds),
        "fastest": ROWS * LENGTH / min(seconds),
        "first_step_seconds": first,
        "loss": loss,
    }


def measure_deepseek_jax(config: ModelConfig, steps: int, threads: int, *, unroll_layers: int = 1) -> dict:
    """The jitted train step of this library, data-parallel over one virtual device per core, as the quickstart runs."""
    bind(threads)
    prepare_environment(os.environ, virtual_devices=threads)
    import jax

    trainer, batch, hyper = make_trainer(config, unroll_layers=unroll_layers)
    state = trainer.initial_state(0)

    def step() -> float:
        nonlocal state
        state, metrics = trainer.step(state, batch, hyper)
        jax.block_until_ready(state)
        return float(metrics.loss)

    return timed(step, steps)


def measure_torch(config: ModelConfig, steps: int, threads: int, *, tune_malloc: bool = True) -> dict:
    """A plain PyTorch loop on Hugging Face's model, with fused AdamW."""
    bind(threads)
    if tune_malloc:
        keep_freed_memory()
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(hugging_face_config(config))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2.2e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, config.vocab_size, (ROWS, LENGTH + 1))

    def step() -> float:
        optimizer.zero_grad()
        logits = model(tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return timed(step, steps)


def report(results: dict[str, list[dict]]) -> str:
    """The table, with what is needed to read it later."""
    rates = {side: [run["tokens_per_second"] for run in runs] for side, runs in results.items()}
    medians = {side: statistics.median(values) for side, values in rates.items()}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "torch", "transformers"))
    lines = [
        "# Train step against Hugging Face on PyTorch",
        "",
        f"`python -m tools.bench.train_step --write` on {datetime.date.today()}: `zoo.bench()`, {ROWS} × {LENGTH} "
        f"tokens, float32, {_THREADS.value} threads on {machine()}; {versions}. Turns alternate; each number is the "
        f"median of {_STEPS.value} steps of one process, without the first two.",
        "",
        "| | tokens/s, median | each turn | first step | times torch | times torch as it comes |",
        "|---|---|---|---|---|---|",
    ]
    for side, label in SIDES.items():
        turns = ", ".join(f"{rate:,.0f}" for rate in rates[side])
        first = statistics.median(run["first_step_seconds"] for run in results[side])
        ratios = " | ".join(f"{medians[side] / medians[peer]:.2f}" for peer in ("torch", "torch_as_it_comes"))
        lines.append(f"| {label} | {medians[side]:,.0f} | {turns} | {first:.1f} s | {ratios} |")
    lines += ["", "jax and torch on CPU; torch trains `DeepseekV3ForCausalLM` with fused AdamW.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    app.run(main)
