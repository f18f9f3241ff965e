"""Benchmark (c): peak memory of a train step, against the analytic sum of what it must hold.

    python -m tools.bench.memory [--write]

The analytic sum is `planning.memory`: parameters, gradients, two moments, and what the backward pass needs. The
compiler's figure is its own plan of the step: arguments, results that reuse none of them, and temporaries. The
process's figure is how far its resident memory grew, at most, from before the state was made to after the step; malloc
is as the system sets it, since memory that a run keeps after compiling (`keep_freed_memory`) would hide growth.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

from absl import app, flags

from deepseek_jax import zoo
from deepseek_jax.planning.memory import step_memory
from deepseek_jax.precision.policy import Fp8Config
from tools.bench.common import LENGTH, ROWS, machine, make_trainer

RESULT = Path(__file__).parent / "results" / "memory.md"
CASES: dict[str, dict] = {
    f"{name}, recompute {mode}": {**rows, "recompute": mode}
    for name, rows in (("one microbatch", {}), ("8 microbatches", {"microbatch_rows": 1}))
    for mode in ("none", "selective", "full")
} | {"one microbatch, recompute selective, FP8": {"recompute": "selective", "fp8": Fp8Config()}}

_CASE = flags.DEFINE_enum("case", None, list(CASES), "measure one case in this process and print it as JSON")
_WRITE = flags.DEFINE_bool("write", False, f"write the table to {RESULT.name} in tools/bench/results")


def main(argv):
    """Measures one case, or each in a process of its own, and prints the table."""
    del argv
    if _CASE.value:
        print(json.dumps(measure(**CASES[_CASE.value])))
        return
    text = report({case: run_alone(case) for case in CASES})
    print(text)
    if _WRITE.value:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(text)


def run_alone(case: str) -> dict:
    """One measurement in a fresh process."""
    command = [sys.executable, "-m", "tools.bench.memory", f"--case={case}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(**step_options) -> dict:
    """Bytes that the compiler plans, and that the process takes, for two steps of `zoo.bench()`."""
    import jax

    config = zoo.bench()
    trainer, batch, hyper = make_trainer(config, **step_options)

    # Compiling takes memory of its own, so it comes first; its state is only drawn to be measured again.
    state = trainer.initial_state(0)
    step = trainer.lower(state, batch, hyper).compile()
    plan = step.memory_analysis()
    del state
    before = resident()
    reset_peak()
    state = trainer.initial_state(0)
    for _ in range(2):
        state, metrics = step(state, batch, hyper)
        jax.block_until_ready((state, metrics))
    rows = step_options.get("microbatch_rows", ROWS)
    microbatches = ROWS // rows
    how = {name: step_options.get(name) for name in ("recompute", "fp8")}
    memory = step_memory(config, rows * LENGTH, microbatches=microbatches, **how)
    return {
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "moments": memory.moments,
        "head gradients": memory.head_gradients,
        "activations": memory.activations,
        "total": memory.total,
        "plan": plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        - plan.alias_size_in_bytes
        + plan.temp_size_in_bytes,
        "temporaries": plan.temp_size_in_bytes,
        "process": peak() - before if peak() is not None and before is not None else None,
    }


def resident() -> int | None:
    """Bytes of this process in memory; None where the system does not tell."""
    return _status("VmRSS")


def peak() -> int | None:
    """The most that this process has held since `reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Starts the measure of `peak` anew, where Linux lets us."""
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")


def _status(field: str) -> int | None:
    path = Path("/proc/self/status")
    if not path.exists():
        return None
    lines = [line for line in path.read_text().splitlines() if line.startswith(f"{field}:")]
    return int(lines[0].split()[1]) * 1024


def report(results: dict[str, dict]) -> str:
    """The table in MiB."""
    import jax

    lines = [
        "# Peak memory of a train step",
        "",
        f"`python -m tools.bench.memory --write` on {datetime.date.today()}: `zoo.bench()`, {ROWS} × {LENGTH} tokens, "
        f"float32 but where it says FP8, on {machine()}; jax {jax.__version__}. MiB.",
        "",
        "| | parameters | gradients | moments | head gradients | activations | analytic sum | compiler's plan | ratio "
        "| process |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, numbers in results.items():
        columns = ("parameters", "gradients", "moments", "head gradients", "activations", "total", "plan")
        cells = [f"{numbers[name] / 2**20:.0f}" for name in columns]
        cells.append(f"{numbers['plan'] / numbers['total']:.2f}")
        cells.append("–" if numbers["process"] is None else f"{numbers['process'] / 2**20:.0f}")
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    app.run(main)
