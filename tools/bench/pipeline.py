"""Benchmark: what the pipeline costs, in work, compile time, program size, memory and bubble.

    python -m tools.bench.pipeline [--part=work] [--part=compile] [--part=memory] [--part=bubble] [--write]

**work**: total work of a step under each schedule, against plain sequential gradient accumulation of the same batch by
the same kernels, on one device and on as many data ranks. Virtual devices share one core, so the time of a step is the
work of all ranks together. Processor time is what is compared: other programs on the machine change it little. One step
of each is traced; the trace says how often each matrix product ran, so that products that the pipeline does besides
(padding) and its overhead are told apart.
**compile**: seconds and size of the compiled program, for numbers of microbatches and ranks.
**memory**: temporary memory of a device, planned by XLA for an H200 (needs the extra [cuda]), against what the schedule
says that it must hold.
**bubble**: by simulation, against the published formulas.

Each measurement runs in a process of its own; those of work take turns.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments.run import prepare_environment, prepare_for_stages
from tools.bench.common import machine
from tools.bench.pipeline_cases import lowered, make_trainer, model_of
from tools.bench.pipeline_memory import measure_memory
from tools.bench.pipeline_work import Case, may_run_until_it_waits, measure_work, take_steps

RESULT = Path(__file__).parent / "results"
PARTS = ("work", "compile", "memory", "bubble")
SCHEDULES = (
    *("gpipe", "one_f_one_b", "eager_one_f_one_b", "interleaved_one_f_one_b", "zb_h1", "dualpipe", "dualpipe_v"),
)
OVERLAPS = ("off", "steady", "braid")

_PART = flags.DEFINE_multi_enum("part", [], PARTS, "what to measure; default: all")
_MEASURE = flags.DEFINE_string("measure", None, "measure one case in this process and print it as JSON")
_RANKS = flags.DEFINE_multi_integer("ranks", [], "pipeline ranks; default: those of the part")
_SCHEDULES = flags.DEFINE_multi_enum("schedule", [], SCHEDULES, "schedules; default: all")
_OVERLAP = flags.DEFINE_multi_enum("overlap", ["off"], OVERLAPS, "how steady ticks are run")
_RECOMPUTE = flags.DEFINE_enum(
    "recompute", "selective", ["none", "selective", "full"], "in work: what is computed again"
)
_TOKENS = flags.DEFINE_integer("tokens", 512, "in work: tokens of a microbatch", lower_bound=1)
_TURNS = flags.DEFINE_integer(
    "turns", 5, "in work: timed steps of each, in turn, after three that are not", lower_bound=1
)
_TRACES = flags.DEFINE_string("traces", None, "in work: keep traces and compiled programs in this folder")
_WRITE = flags.DEFINE_bool("write", False, "write each table to tools/bench/results/pipeline_PART.md")


def main(argv):
    """Measures one case, or all of the parts in processes of their own, and prints the tables."""
    del argv
    if _MEASURE.value:
        name, rest = _MEASURE.value.split(":", 1)
        if name == "work":
            take_work_steps(rest)
        else:
            print(json.dumps(MEASURES[name](*rest.split(":"))))
        return
    for part in _PART.value or PARTS:
        text = REPORTS[part]()
        print(text)
        if _WRITE.value:
            (RESULT / f"pipeline_{part}.md").write_text(text)


def run_alone(case: str) -> Any:
    """One measurement in a fresh process, with the flags of this one."""
    done = subprocess.run(_command(case), env=_on_cpus(), check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _command(case: str) -> list[str]:
    given = [f"--{flag.name}={flag.value}" for flag in (_RECOMPUTE, _TOKENS, _TRACES) if flag.value is not None]
    return [sys.executable, "-m", "tools.bench.pipeline", f"--measure={case}", *given]


def _on_cpus() -> dict[str, str]:
    return os.environ | {"JAX_PLATFORMS": "cpu"}


# --- total work -------------------------------------------------------------------------------------------------------


def report_work() -> str:
    """The table of total work."""
    lines = [
        *heading("Total work of a step, against sequential gradient accumulation", "work"),
        f"Float32, recompute {_RECOMPUTE.value}; one dense layer, 16 MoE slots of width 256, one sequence of "
        f"{_TOKENS.value} tokens a microbatch; all ranks on one core, {_slices()}. Processor seconds of a step, "
        f"medians of {_TURNS.value} turns; times: the median over turns of the ratio to the baseline in the same turn, "
        "and behind it that of the least steps of either, to which other work on the machine adds least. "
        "FLOPs are of all matrix products that ran; seconds by kind are from a traced step, those of exchanges mostly "
        "waiting. Data ranks share the core as the ranks of a pipeline do, and have no pipeline: what they take above "
        "1 is the price of sharing. Goals: 1.10 at 2 and 4 ranks, 1.15 at 8.",
        "",
        "| ranks | microbatches | | seconds | in the kernel | times baseline | times data ranks | GFLOP "
        "| times baseline | by kind |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for ranks in _RANKS.value or (2, 4, 8):
        rows = measure_work(
            ranks,
            schedules=_SCHEDULES.value or SCHEDULES,
            overlaps=_OVERLAP.value,
            turns=_TURNS.value,
            start=_start_worker,
        )
        for row in rows:
            kinds = ", ".join(f"{kind} {seconds:.2f}" for kind, seconds in row["seconds"].items())
            lines.append(
                f"| {ranks} | {row['rows']} | {row['case']} | {row['processor']:.2f} | {row['kernel']:.2f} "
                f"| {row['times_base']:.3f} ({row['least_base']:.3f}) "
                f"| {row['times_shared']:.3f} ({row['least_shared']:.3f}) "
                f"| {row['flops'] / 1e9:.1f} | {row['times_flops']:.3f} | {kinds} |"
            )
    return "\n".join([*lines, ""])


def _slices() -> str:
    until_it_waits = "each until it waits for another"
    return until_it_waits if may_run_until_it_waits() else "in turns of the system's length, for want of the privilege"


def _start_worker(case: str) -> subprocess.Popen:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(_command(f"work:{case}"), env=_on_cpus(), **pipes)


def take_work_steps(case: str) -> None:
    """`take_steps` of a case, as the flags have it."""
    options = {"recompute": _RECOMPUTE.value, "tokens": _TOKENS.value, "traces": _TRACES.value}
    take_steps(Case(**json.loads(case)), **options)


# --- compile time and program size ------------------------------------------------------------------------------------


def measure_compile(ranks: str, microbatches: str, schedule: str, overlap: str) -> dict:
    """Seconds of processor time to trace, lower and compile, and the sizes of what comes out."""
    prepare_environment(os.environ, virtual_devices=int(ranks))
    prepare_for_stages(os.environ, virtual_devices=int(ranks))
    import jax

    jax.devices()
    config = dataclasses.replace(model_of(2, hidden=64), num_layers=2 * int(ranks), vocab_size=128)
    begin = time.process_time()
    trainer = make_trainer(config, pipe=int(ranks), schedule=schedule, overlap=overlap)
    program = lowered(trainer, int(microbatches), 32)
    middle = time.process_time()
    # The least optimization of machine code: its time grows with the program's size and says nothing more.
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    text = program.compile(compiler_options=options).as_text()
    end = time.process_time()
    instructions = sum(1 for line in text.splitlines() if " = " in line)
    return {"lower": middle - begin, "compile": end - middle, "instructions": instructions, "bytes": len(text)}


def report_compile() -> str:
    """The table of compile time and program size."""
    cases = [(4, 8), (4, 32), (4, 128), (2, 32), (8, 32), (16, 32), (16, 128)]
    lines = [
        *heading("Compile time and size of the step", "compile"),
        "A small V3 of two layers a stage with MTP, compiled for virtual devices without optimization of machine code. "
        "Processor seconds to trace and lower, and to compile; instructions of the optimized program, and the size of "
        "its text. Goals: flat in the number of microbatches, at most 1.5 times from 2 to 16 ranks.",
        "",
        "| schedule | overlap | ranks | microbatches | lower, s | compile, s | instructions | MB of text |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for schedule in _SCHEDULES.value or ("dualpipe",):
        for overlap in _OVERLAP.value:
            for ranks, microbatches in cases:
                if _RANKS.value and ranks not in _RANKS.value:
                    continue
                one = run_alone(f"compile:{ranks}:{microbatches}:{schedule}:{overlap}")
                lines.append(
                    f"| {schedule} | {overlap} | {ranks} | {microbatches} | {one['lower']:.1f} | {one['compile']:.1f} "
                    f"| {one['instructions']:,} | {one['bytes'] / 1e6:.1f} |"
                )
    return "\n".join([*lines, ""])


# --- memory -----------------------------------------------------------------------------------------------------------


def report_memory() -> str:
    """The table of temporary memory."""
    lines = [
        *heading("Temporary memory of a device, as XLA plans it for an H200", "memory"),
        "A V3 of width 1024, four layers a stage with MTP, float32, selective recomputation, one sequence of 1024 "
        "tokens a microbatch. MB. Expected: rings + working copies + gradients + one stage's transients. Goals: flat "
        "in microbatches for all but gpipe, and within 20% of what is expected.",
        "",
        "| schedule | overlap | ranks | microbatches | planned | rings | copies | gradients | transients | expected "
        "| ratio |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for schedule in _SCHEDULES.value or SCHEDULES:
        for overlap in _OVERLAP.value:
            for ranks in _RANKS.value or (4,):
                for microbatches in (2 * ranks, 8 * ranks):
                    one = run_alone(f"memory:{ranks}:{microbatches}:{schedule}:{overlap}")
                    parts = ("temporaries", "rings", "copies", "gradients", "transients", "total")
                    sizes = " | ".join(f"{one[name] / 1e6:.0f}" for name in parts)
                    lines.append(
                        f"| {schedule} | {overlap} | {ranks} | {microbatches} | {sizes} "
                        f"| {one['temporaries'] / one['total']:.2f} |"
                    )
    return "\n".join([*lines, ""])


# --- bubble -----------------------------------------------------------------------------------------------------------


def report_bubble() -> str:
    """Bubbles by simulation and by formula: idle time of the busiest rank, with F = B = W = 1."""
    from deepseek_jax.parallel.pipeline.generators import GENERATORS
    from deepseek_jax.parallel.pipeline.simulate import Costs, simulate

    costs = Costs()
    f, b, w = costs.forward, costs.input_gradient + costs.weight_gradient, costs.weight_gradient
    formulas: dict[str, Callable[[int], float]] = {
        "gpipe": lambda p: (p - 1) * (f + b),
        "one_f_one_b": lambda p: (p - 1) * (f + b),
        "eager_one_f_one_b": lambda p: (p - 1) * (2 * costs.pair - f - b),
        "zb_h1": lambda p: (p - 1) * (f + b - 2 * w),
        "dualpipe": lambda p: (p // 2 - 1) * (costs.pair + b - 3 * w),
        "dualpipe_v": lambda p: (p - 1) * (costs.pair + b - 3 * w),
        "interleaved_one_f_one_b": lambda p: (p - 1) * (f + b),
    }
    lines = [
        *heading("Bubbles by simulation, against the formulas", "bubble"),
        "Idle time of the busiest rank in units of F = B = W = 1 (of one stage: a rank of DualPipeV and of interleaved "
        "1F1B has two, half as long as others' stages of the same model). Each is simulated with 2P, 4P and 8P "
        "microbatches; where they agree there is one number. Lock step, with 4P: the busiest rank's idle time as a "
        "share of a step whose ticks all ranks start together, and the number of its ticks.",
        "",
        "| schedule | ranks | simulated | formula | as published | idle in lock step | ticks |",
        "|---|---|---|---|---|---|---|",
    ]
    wrong = 0
    for name, formula in formulas.items():
        for ranks in _RANKS.value or range(2, 17, 2):
            counts = [factor * ranks for factor in (2, 4, 8)]
            simulated = sorted({simulate(GENERATORS[name](ranks, m), costs).bubble for m in counts})
            same = simulated == [formula(ranks)]
            wrong += not same
            locked = simulate(GENERATORS[name](ranks, 4 * ranks), costs, "lock_step")
            lines.append(
                f"| {name} | {ranks} | {', '.join(f'{value:g}' for value in simulated)} | {formula(ranks):g} "
                f"| {'yes' if same else 'NO'} | {locked.bubble / locked.makespan:.1%} | {locked.number_of_ticks} |"
            )
    lines += ["", f"{wrong} of them differ from their formula." if wrong else "All equal their formulas.", ""]
    return "\n".join(lines)


# --- the tables -------------------------------------------------------------------------------------------------------


def heading(title: str, part: str) -> list[str]:
    """What is needed to read a table later."""
    return [
        f"# {title}",
        "",
        f"`python -m tools.bench.pipeline --part={part} --write` on {datetime.date.today()}, on {machine()}; "
        f"jax {importlib.metadata.version('jax')}.",
        "",
    ]


MEASURES: dict[str, Callable] = {"compile": measure_compile, "memory": measure_memory}
REPORTS: dict[str, Callable[[], str]] = {
    "work": report_work,
    "compile": report_compile,
    "memory": report_memory,
    "bubble": report_bubble,
}


if __name__ == "__main__":
    app.run(main)
