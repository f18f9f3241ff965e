"""Benchmark: what the pipeline costs, in work, compile time, program size, memory and bubble.

    python -m tools.bench.pipeline [--part=work] [--part=compile] [--part=memory] [--part=bubble] [--write]

**work**: total work of a step under each schedule, against plain sequential gradient accumulation of the same batch by
the same kernels. Virtual devices share one core, so the time of a step is the work of all ranks together. Processor
time is what is compared: other programs on the machine change it little. One step of each is traced; the trace says how
often each matrix product ran, so that products that the pipeline does besides (padding) and its overhead are told
apart.
**compile**: seconds and size of the compiled program, for numbers of microbatches and ranks.
**memory**: temporary memory of a device, planned by XLA for an H200 (needs the extra [cuda]), against what the schedule
says that it must hold.
**bubble**: by simulation, against the published formulas.

Each measurement runs in a process of its own.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags

from deepseek_jax.config import AttentionConfig, ModelConfig, MoEConfig
from experiments.run import prepare_environment, prepare_for_stages
from tools.bench.common import machine

RESULT = Path(__file__).parent / "results"
PARTS = ("work", "compile", "memory", "bubble")
SCHEDULES = (
    *("gpipe", "one_f_one_b", "eager_one_f_one_b", "interleaved_one_f_one_b", "zb_h1", "dualpipe", "dualpipe_v"),
)
LENGTH = 512
OVERLAPS = ("off", "steady", "braid")

_PART = flags.DEFINE_multi_enum("part", [], PARTS, "what to measure; default: all")
_MEASURE = flags.DEFINE_string("measure", None, "measure one case in this process and print it as JSON")
_RANKS = flags.DEFINE_multi_integer("ranks", [], "pipeline ranks; default: those of the part")
_SCHEDULES = flags.DEFINE_multi_enum("schedule", [], SCHEDULES, "schedules; default: all")
_OVERLAP = flags.DEFINE_multi_enum("overlap", ["off"], OVERLAPS, "how steady ticks are run")
_RECOMPUTE = flags.DEFINE_enum("recompute", "none", ["none", "selective", "full"], "in work: what is computed again")
_TURNS = flags.DEFINE_integer("turns", 5, "in work: timed steps of each, in turn, after one that is not", lower_bound=1)
_TRACES = flags.DEFINE_string("traces", None, "in work: keep traces and compiled programs in this folder")
_WRITE = flags.DEFINE_bool("write", False, "write each table to tools/bench/results/pipeline_PART.md")


def main(argv):
    """Measures one case, or all of the parts in processes of their own, and prints the tables."""
    del argv
    if _MEASURE.value:
        name, *arguments = _MEASURE.value.split(":")
        print(json.dumps(MEASURES[name](*arguments)))
        return
    for part in _PART.value or PARTS:
        text = REPORTS[part]()
        print(text)
        if _WRITE.value:
            (RESULT / f"pipeline_{part}.md").write_text(text)


def run_alone(case: str) -> Any:
    """One measurement in a fresh process, with the flags of this one."""
    given = [f"--{flag.name}={value}" for flag in (_OVERLAP, _SCHEDULES) for value in flag.value]
    given += [f"--{flag.name}={flag.value}" for flag in (_RECOMPUTE, _TURNS, _TRACES) if flag.value is not None]
    command = [sys.executable, "-m", "tools.bench.pipeline", f"--measure={case}", *given]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


# --- a model, a trainer -----------------------------------------------------------------------------------------------


def model_of(stages: int, *, hidden: int = 256) -> ModelConfig:
    """DeepSeek-V3's layers, one dense and 16 MoE slots, which 2, 4, 8 or 16 stages fill without padding.

    The MTP module takes the last slot; 16 stages have one slot each and no MTP, since every stage has a layer.
    """
    mtp = int(stages < 16)
    return ModelConfig(
        vocab_size=2048,
        hidden_size=hidden,
        num_layers=17 - mtp,
        num_dense_layers=1,
        dense_ffn_size=3 * hidden,
        mtp_depth=mtp,
        attention=AttentionConfig(
            **{"num_heads": 4, "q_lora_rank": 3 * hidden // 8, "kv_lora_rank": hidden // 4},
            **{"qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32},
        ),
        moe=MoEConfig(
            num_experts=4, experts_per_token=2, expert_ffn_size=hidden // 2, num_groups=1, groups_per_token=1
        ),
    )


def make_trainer(config: ModelConfig, *, pipe: int, schedule: str = "dualpipe", devices=None, **options):
    """A trainer of plain gradient descent on the first `pipe` devices, so that a step is little but gradients."""
    import jax
    import optax

    from deepseek_jax.model.transformer import Transformer
    from deepseek_jax.parallel.mesh import ParallelConfig, make_mesh
    from deepseek_jax.parallel.placement import place
    from deepseek_jax.training.step import Trainer
    from deepseek_jax.training.step_config import StepConfig

    parallel = ParallelConfig(pipe=pipe, schedule=schedule)
    mesh = make_mesh(parallel, jax.devices()[:pipe] if devices is None else devices)
    placement = place(config, stage_map=parallel.schedule_choice.stage_map)
    options = StepConfig(schedule=schedule, microbatch_rows=1, force_balance=True, **options)
    return Trainer(Transformer(config), placement, mesh, lambda specs: optax.identity(), options)


def lowered(trainer, rows: int, length: int):
    """The step for so many rows, lowered from shapes."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from deepseek_jax.model.targets import Microbatch
    from deepseek_jax.parallel.sharding import BATCH_SPEC
    from deepseek_jax.training.sharding_table import abstract_state
    from deepseek_jax.training.step import Hyperparameters

    split, everywhere = (NamedSharding(trainer.mesh, spec) for spec in (BATCH_SPEC, jax.P()))
    tokens = jax.ShapeDtypeStruct((rows, length + 1), jnp.int32, sharding=split)
    scalar: Any = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
    hyper = Hyperparameters(scalar, scalar, scalar)
    return trainer.lower(abstract_state(trainer), Microbatch(*[tokens] * len(Microbatch._fields)), hyper)


# --- total work -------------------------------------------------------------------------------------------------------


def measure_work(pipe: str) -> list[dict]:
    """Per schedule, and per sequential baseline, processor and wall seconds of each turn, and what a trace counted."""
    ranks = int(pipe)
    prepare_environment(os.environ, virtual_devices=ranks)
    prepare_for_stages(os.environ, virtual_devices=ranks)
    from deepseek_jax.parallel.pipeline.generators import GENERATORS

    rows = microbatches_of(ranks)
    cases: dict[str, tuple[int, Callable]] = {}
    for schedule in _SCHEDULES.value or SCHEDULES:
        stages = GENERATORS[schedule](ranks, rows).stages.stages
        base = f"sequential, {stages} stages" if stages == 16 else "sequential"
        if base not in cases:
            make = lambda stages=stages: make_trainer(model_of(stages), pipe=1, recompute=_RECOMPUTE.value)  # noqa: E731
            cases[base] = stages, make
        for overlap in _OVERLAP.value:
            make = lambda stages=stages, schedule=schedule, overlap=overlap: make_trainer(  # noqa: E731
                model_of(stages), pipe=ranks, schedule=schedule, overlap=overlap, recompute=_RECOMPUTE.value
            )
            cases[f"{schedule}, {overlap}"] = stages, make
    runs = {case: Run(case, make(), rows) for case, (_, make) in cases.items()}
    # After compiling, which profits from more.
    share_one_core()
    for turn in range(1 + _TURNS.value):
        for run in runs.values():
            run.step(timed=turn > 0)
    found = []
    for case, (stages, _) in cases.items():
        base = case if case.startswith("sequential") else "sequential, 16 stages" if stages == 16 else "sequential"
        found.append({"case": case, "base": base, "ranks": ranks, "rows": rows, **runs[case].result()})
    return found


def microbatches_of(ranks: int) -> int:
    """How many there are in a step of the measurements: enough for every schedule."""
    return max(8, 2 * ranks)


def share_one_core() -> None:
    """Puts every thread of this process on one core, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        core = {min(os.sched_getaffinity(0))}
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), core)


class Run:
    """A compiled step and its state."""

    def __init__(self, case: str, trainer, rows: int):
        import jax
        import numpy as np
        from jax.sharding import NamedSharding

        from deepseek_jax.model.targets import Microbatch
        from deepseek_jax.parallel.sharding import BATCH_SPEC
        from deepseek_jax.training.step import Hyperparameters

        begin = time.process_time()
        self.case, self.compiled = case, lowered(trainer, rows, LENGTH).compile()
        print(f"{case}: compiled in {time.process_time() - begin:.0f} s of processor time", file=sys.stderr)
        self.state = trainer.initial_state(0)
        shape = (rows, LENGTH + 1)
        tokens = np.random.default_rng(0).integers(0, trainer.model.config.vocab_size, shape).astype(np.int32)
        ones, positions = np.ones_like(tokens), np.broadcast_to(np.arange(LENGTH + 1, dtype=np.int32), shape)
        batch = Microbatch(tokens, ones, positions, ones)
        self.batch = jax.device_put(batch, NamedSharding(trainer.mesh, BATCH_SPEC))
        scalars = Hyperparameters(*(np.float32(x) for x in (1e-4, 0.3, 0.001)))
        self.hyper = jax.device_put(scalars, NamedSharding(trainer.mesh, jax.P()))
        self.processor: list[float] = []
        self.wall: list[float] = []
        self.loss = 0.0

    def step(self, *, timed: bool) -> None:
        """One step."""
        import jax

        wall, processor = time.perf_counter(), time.process_time()
        self.state, metrics = jax.block_until_ready(self.compiled(self.state, self.batch, self.hyper))
        if timed:
            self.processor.append(time.process_time() - processor)
            self.wall.append(time.perf_counter() - wall)
        self.loss = float(metrics.loss)

    def result(self) -> dict:
        """Times, and the FLOPs and kinds of work of one more step, which is traced."""
        import jax

        from deepseek_jax.planning.compiled import read_program
        from tools.bench.trace import read_trace

        text = self.compiled.as_text()
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(_TRACES.value) / re.sub(r"\W+", "_", self.case) if _TRACES.value else Path(scratch)
            with jax.profiler.trace(folder):
                self.step(timed=False)
            if _TRACES.value:
                (folder / "program.txt").write_text(text)
            traced = read_trace(folder, read_program(text))
        return {"processor": self.processor, "wall": self.wall, "loss": self.loss, **traced}


def report_work() -> str:
    """The table of total work."""
    lines = [
        *heading("Total work of a step, against sequential gradient accumulation", "work"),
        f"Float32, recompute {_RECOMPUTE.value}; one dense layer, 16 MoE slots of width 256, one sequence of {LENGTH} "
        "tokens a microbatch; all ranks on one core. Processor seconds of a step, medians of "
        f"{_TURNS.value} turns; times: the median over turns of the ratio to the baseline in the same turn. FLOPs are "
        "of all matrix products that ran; seconds by kind are from one traced step. Goals: 1.10 at 2 and 4 "
        "ranks, 1.15 at 8.",
        "",
        "| ranks | microbatches | | seconds | times baseline | GFLOP | times baseline | by kind |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for ranks in _RANKS.value or (2, 4, 8):
        found = run_alone(f"work:{ranks}")
        base = {one["case"]: one for one in found}
        for one in found:
            of = base[one["base"]]
            ratio = statistics.median(a / b for a, b in zip(one["processor"], of["processor"], strict=True))
            kinds = ", ".join(f"{kind} {seconds:.2f}" for kind, seconds in one["seconds"].items())
            lines.append(
                f"| {ranks} | {one['rows']} | {one['case']} | {statistics.median(one['processor']):.2f} | {ratio:.3f} "
                f"| {one['flops'] / 1e9:.1f} | {one['flops'] / of['flops']:.3f} | {kinds} |"
            )
    return "\n".join([*lines, ""])


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


def measure_memory(ranks: str, microbatches: str, schedule: str, overlap: str) -> dict:
    """Bytes of temporaries that XLA plans for a device, and what the schedule says that it must hold."""
    from deepseek_jax.parallel.mesh import ParallelConfig
    from deepseek_jax.parallel.pipeline.tables import make_tables
    from deepseek_jax.planning.gpu_target import h200_mesh
    from deepseek_jax.planning.pipeline_memory import pipeline_memory

    config = memory_model(int(ranks))
    mesh = h200_mesh(ParallelConfig(pipe=int(ranks), schedule=schedule))
    trainer = make_trainer(
        config,
        pipe=int(ranks),
        schedule=schedule,
        devices=list(mesh.devices.flat),
        overlap=overlap,
        recompute="selective",
    )
    plan = lowered(trainer, int(microbatches), 1024).compile().memory_analysis()
    tables = make_tables(trainer.schedule.make(int(microbatches)))
    expected = pipeline_memory(tables, stage_bytes(trainer, (int(microbatches), 1025)))
    return {"temporaries": plan.temp_size_in_bytes, **dataclasses.asdict(expected), "total": expected.total}


def stage_bytes(trainer, shape: tuple[int, int]):
    """`StageBytes` of a trainer's stages, traced for a global batch of this shape."""
    import jax
    import jax.numpy as jnp

    from deepseek_jax.model.targets import Microbatch
    from deepseek_jax.parallel.pipeline.protocol import LossScales
    from deepseek_jax.parallel.pipeline.stage import Stage
    from deepseek_jax.parallel.pipeline.tables import make_tables
    from deepseek_jax.parallel.pipeline.ticks import Machine, _Run
    from deepseek_jax.parallel.sharding import BATCH_SPEC
    from deepseek_jax.planning.memory import layer_activations
    from deepseek_jax.planning.pipeline_memory import StageBytes
    from deepseek_jax.training.sharding_table import abstract_state

    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))  # noqa: E731
    found = []

    def device(state, batch):
        microbatches, _ = trainer._microbatches(batch, trainer.dispatchers(shape)[0])
        schedule = trainer.schedule.make(trainer.microbatches(shape))
        staged = Stage(trainer.staged(trainer.dispatchers(shape)[0]), trainer.config.recompute)
        machine = Machine(staged, schedule, trainer.placement.occupied())
        scales = LossScales(*(jnp.zeros((), jnp.float32) for _ in LossScales._fields))
        run = _Run(machine, make_tables(schedule), *trainer._local_weights(state), microbatches, scales)
        totals, shapes = run._no_totals(), run.shapes
        tokens = jax.tree.leaves(microbatches)[0].shape[1] * (shape[1] - 1)
        layer = layer_activations(trainer.model.config, dense=False) * tokens
        found.append(
            StageBytes(
                x=size(shapes.out.x),
                output=size(shapes.out.hidden),
                residual=size(shapes.residual),
                stash=size(shapes.stash),
                weights=size(run.weights) // schedule.stages.slots,
                gradients=size(totals.stacks) // schedule.stages.slots,
                ends=size(run.ends),
                ends_gradients=size((totals.ends, totals.shared)),
                layer=layer * jax.tree.leaves(shapes.out.x)[0].dtype.itemsize,
            )
        )
        return jnp.zeros(())

    batch = Microbatch(*[jax.ShapeDtypeStruct(shape, jnp.int32)] * len(Microbatch._fields))
    specs = (trainer.state_specs(), BATCH_SPEC)
    mapped = jax.shard_map(device, mesh=trainer.mesh, in_specs=specs, out_specs=jax.P())
    jax.eval_shape(mapped, abstract_state(trainer), batch)
    return found[0]


def memory_model(ranks: int) -> ModelConfig:
    """One large enough for its arrays to outweigh what the compiler keeps besides."""
    return dataclasses.replace(model_of(2, hidden=1024), num_layers=4 * ranks, vocab_size=8192)


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


MEASURES: dict[str, Callable] = {"work": measure_work, "compile": measure_compile, "memory": measure_memory}
REPORTS: dict[str, Callable[[], str]] = {
    "work": report_work,
    "compile": report_compile,
    "memory": report_memory,
    "bubble": report_bubble,
}


if __name__ == "__main__":
    app.run(main)
