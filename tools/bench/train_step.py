"""Benchmark (a): tokens per second of a train step, against Hugging Face on PyTorch.

    python -m tools.bench.train_step [--write]

Both train `zoo.bench()` on 8 rows of 512 tokens in float32 with AdamW and clipping, on the same number of threads, in
processes of their own that take turns. Needs the `parity` extra.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from absl import app, flags

from deepseek_jax import zoo
from deepseek_jax.config import ModelConfig

ROWS, LENGTH = 8, 512
RESULT = Path(__file__).parent / "results" / "train_step.md"
SIDES = {"deepseek_jax": "deepseek_jax, jax on CPU", "torch": "transformers DeepseekV3ForCausalLM, torch on CPU"}

_SIDE = flags.DEFINE_enum("side", None, list(SIDES), "measure one side in this process and print its result as JSON")
_TURNS = flags.DEFINE_integer("turns", 3, "processes per side")
_THREADS = flags.DEFINE_integer("threads", 2, "threads (and cores) of each process")
_STEPS = flags.DEFINE_integer("steps", 8, "timed steps per process, after two that are not")
_WRITE = flags.DEFINE_bool("write", False, f"write the table to {RESULT.name} in tools/bench/results")


def main(argv):
    """Measures one side, or both in turns, and prints the table."""
    del argv
    if _SIDE.value:
        measure = {"deepseek_jax": measure_deepseek_jax, "torch": measure_torch}[_SIDE.value]
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
    settings = {"NPROC": threads, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "JAX_PLATFORMS": "cpu"}
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


def measure_deepseek_jax(config: ModelConfig, steps: int, threads: int) -> dict:
    """The jitted train step of this library."""
    bind(threads)
    import functools

    import jax
    import jax.numpy as jnp
    import numpy as np

    from deepseek_jax.model.targets import Microbatch
    from deepseek_jax.model.transformer import Transformer
    from deepseek_jax.parallel.mesh import ParallelConfig, make_mesh
    from deepseek_jax.parallel.placement import place
    from deepseek_jax.training.optimizer import OptimizerConfig, adamw
    from deepseek_jax.training.step import Hyperparameters, StepConfig, Trainer

    mesh = make_mesh(ParallelConfig(), jax.devices()[:1])
    optimizer = functools.partial(adamw, OptimizerConfig())
    trainer = Trainer(Transformer(config), place(config), mesh, optimizer, StepConfig())
    state = trainer.initial_state(0)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    ones = np.ones_like(tokens)
    batch = Microbatch(tokens, ones, np.broadcast_to(np.arange(LENGTH + 1, dtype=np.int32), tokens.shape), ones)
    batch = jax.device_put(batch)
    hyper = Hyperparameters(*(jnp.float32(x) for x in (2.2e-4, 0.3, 0.001)))

    def step() -> float:
        nonlocal state
        state, metrics = trainer.step(state, batch, hyper)
        jax.block_until_ready(state)
        return float(metrics.loss)

    return timed(step, steps)


def measure_torch(config: ModelConfig, steps: int, threads: int) -> dict:
    """A plain PyTorch loop on Hugging Face's model, with fused AdamW."""
    bind(threads)
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


def hugging_face_config(config: ModelConfig):
    """`transformers.DeepseekV3Config` of the same architecture, without MTP."""
    import transformers

    attention, moe = config.attention, config.moe
    rope = {"rope_type": "default", "rope_theta": attention.rope_theta}
    if attention.yarn is not None:
        yarn = attention.yarn
        rope |= {
            "rope_type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_length,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale_all_dim,
        }
    return transformers.DeepseekV3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.dense_ffn_size,
        moe_intermediate_size=moe.expert_ffn_size,
        num_hidden_layers=config.num_layers,
        first_k_dense_replace=config.num_dense_layers,
        num_attention_heads=attention.num_heads,
        num_key_value_heads=attention.num_heads,
        q_lora_rank=attention.q_lora_rank,
        kv_lora_rank=attention.kv_lora_rank,
        qk_nope_head_dim=attention.qk_nope_head_dim,
        qk_rope_head_dim=attention.qk_rope_head_dim,
        v_head_dim=attention.v_head_dim,
        rope_parameters=rope,
        n_routed_experts=moe.num_experts,
        n_shared_experts=moe.num_shared_experts,
        num_experts_per_tok=moe.experts_per_token,
        n_group=moe.num_groups,
        topk_group=moe.groups_per_token,
        norm_topk_prob=moe.normalize_weights,
        routed_scaling_factor=moe.routed_scale,
        rms_norm_eps=config.rms_norm_eps,
        initializer_range=config.init_std,
        tie_word_embeddings=config.tie_embeddings,
        num_mtp_layers=0,
    )


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
        "| | tokens/s, median | each turn | first step |",
        "|---|---|---|---|",
    ]
    for side, label in SIDES.items():
        turns = ", ".join(f"{rate:,.0f}" for rate in rates[side])
        first = statistics.median(run["first_step_seconds"] for run in results[side])
        lines.append(f"| {label} | {medians[side]:,.0f} | {turns} | {first:.1f} s |")
    lines += ["", f"Ratio of the medians: **{medians['deepseek_jax'] / medians['torch']:.2f}**.", ""]
    return "\n".join(lines)


def machine() -> str:
    """The processor's name and the number of cores."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return f"{name}, {os.cpu_count()} cores"


if __name__ == "__main__":
    app.run(main)
