"""Measures the total work of a step under each schedule, for `tools.bench.pipeline`."""

from __future__ import annotations

import functools
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.run import prepare_environment, prepare_for_stages
from tools.bench.pipeline_cases import lowered, make_trainer, model_of


def measure_work(
    ranks: int,
    *,
    schedules: Sequence[str],
    overlaps: Sequence[str],
    recompute: str,
    tokens: int,
    turns: int,
    traces: str | None = None,
) -> list[dict]:
    """Per schedule, and per sequential baseline, processor and wall seconds of each turn, and what a trace counted.

    Args:
      ranks: of the pipeline.
      schedules: their names.
      overlaps: how steady ticks are run; each schedule is run in each of these ways.
      recompute: what is computed again.
      tokens: of a microbatch.
      turns: timed steps of each, in turn, after one that is not.
      traces: a folder for traces and compiled programs; none keeps none.
    """
    prepare_environment(os.environ, virtual_devices=ranks)
    prepare_for_stages(os.environ, virtual_devices=ranks)
    from deepseek_jax.parallel.pipeline.generators import GENERATORS

    rows = microbatches_of(ranks)
    cases: dict[str, tuple[str, Callable]] = {}
    for schedule in schedules:
        stages = GENERATORS[schedule](ranks, rows).stages.stages
        base = f"sequential, {stages} stages" if stages == 16 else "sequential"
        make = functools.partial(make_trainer, model_of(stages), recompute=recompute)
        cases.setdefault(base, (base, make))
        cases.setdefault(shared(base, ranks), (base, functools.partial(make, data=ranks)))
        for overlap in overlaps:
            pipelined = functools.partial(make, pipe=ranks, schedule=schedule, overlap=overlap)
            cases[f"{schedule}, {overlap}"] = base, pipelined
    runs = {case: Run(case, make(), rows, tokens) for case, (_, make) in cases.items()}
    # After compiling, which profits from more.
    share_one_core()
    for turn in range(1 + turns):
        for run in runs.values():
            run.step(timed=turn > 0)
    return [
        {"case": case, "base": base, "ranks": ranks, "rows": rows, **runs[case].result(traces)}
        for case, (base, _) in cases.items()
    ]


def shared(base: str, ranks: int) -> str:
    """The name of a baseline's work on as many data ranks: what it costs so many devices alone to take turns on a core,
    and to have each other's numbers in its caches."""
    return f"{base} on {ranks} data ranks"


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

    def __init__(self, case: str, trainer, rows: int, tokens: int):
        import jax
        import numpy as np
        from jax.sharding import NamedSharding

        from deepseek_jax.model.targets import Microbatch
        from deepseek_jax.parallel.sharding import BATCH_SPEC
        from deepseek_jax.training.step import Hyperparameters

        begin = time.process_time()
        self.case, self.compiled = case, lowered(trainer, rows, tokens).compile()
        print(f"{case}: compiled in {time.process_time() - begin:.0f} s of processor time", file=sys.stderr)
        self.state = trainer.initial_state(0)
        shape = (rows, tokens + 1)
        text = np.random.default_rng(0).integers(0, trainer.model.config.vocab_size, shape).astype(np.int32)
        ones, positions = np.ones_like(text), np.broadcast_to(np.arange(tokens + 1, dtype=np.int32), shape)
        batch = Microbatch(text, ones, positions, ones)
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

    def result(self, traces: str | None) -> dict:
        """Times, and the FLOPs and kinds of work of one more step, which is traced."""
        import jax

        from deepseek_jax.planning.compiled import read_program
        from tools.bench.trace import read_trace

        text = self.compiled.as_text()
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(traces) / re.sub(r"\W+", "_", self.case) if traces else Path(scratch)
            with jax.profiler.trace(folder):
                self.step(timed=False)
            if traces:
                (folder / "program.txt").write_text(text)
            traced = read_trace(folder, read_program(text))
        return {"processor": self.processor, "wall": self.wall, "loss": self.loss, **traced}
