"""Measures the total work of a step under each schedule, for `tools.bench.pipeline`.

Every case is a compiled step in a process of its own, and the processes take turns. In one process they would leave
holes of different sizes in one heap, which then grows from step to step; that the kernel clears new pages would count
as the schedule's work, and takes longer than what sets schedules apart.

The devices of a case share a core, and each runs until it waits for another, where the user may ask for that
(SCHED_FIFO). Were they to take turns of the few milliseconds that a kernel gives by itself, each would find its numbers
evicted from the caches by the others; devices of a real machine do not do that to each other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.run import keep_freed_memory, prepare_environment, prepare_for_stages
from tools.bench.pipeline_cases import lowered, make_trainer, model_of

WARM_UP = 3
"""Steps that are not timed: in the first ones the heap grows."""


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Processor time of a step: `all`, and what of it the kernel of the system took, most of it for new pages."""

    all: float
    kernel: float


@dataclasses.dataclass(frozen=True)
class Case:
    """A step that is measured, in a process of its own."""

    name: str
    ranks: int
    stages: int
    data: int = 1
    pipe: int = 1
    schedule: str = "dualpipe"
    overlap: str = "off"

    @property
    def rows(self) -> int:
        """Microbatches of a step: enough for every schedule."""
        return max(8, 2 * self.ranks)


def measure_work(
    ranks: int,
    *,
    schedules: Sequence[str],
    overlaps: Sequence[str],
    turns: int,
    start: Callable[[str], subprocess.Popen],
) -> list[dict]:
    """A row for each case: processor seconds of a step, as many times those of its baselines, and what a trace counted.

    In a turn the sequential step, that on data ranks and the case take one step each; times are medians over turns, and
    those of the least steps.

    Args:
      ranks: of the pipeline.
      schedules: their names.
      overlaps: how steady ticks are run; each schedule is run in each of these ways.
      turns: timed ones of each case, after `WARM_UP` that are not.
      start: starts the process of a case (`Case` as JSON), which runs `take_steps`, with pipes to it and from it.
    """
    from deepseek_jax.parallel.pipeline.generators import GENERATORS

    groups: dict[int, list[Case]] = {}
    for schedule in schedules:
        stages = GENERATORS[schedule](ranks, Case("", ranks, 0).rows).stages.stages
        for overlap in overlaps:
            case = Case(f"{schedule}, {overlap}", ranks, stages, pipe=ranks, schedule=schedule, overlap=overlap)
            groups.setdefault(stages, []).append(case)
    return [row for stages, cases in groups.items() for row in _measure_group(ranks, stages, cases, turns, start)]


def _measure_group(ranks: int, stages: int, cases: Sequence[Case], turns: int, start) -> list[dict]:
    """The rows of cases that have the same model, and before them those of its baselines."""
    name = f"sequential, {stages} stages" if stages == 16 else "sequential"
    base, shared = Case(name, ranks, stages), Case(f"{name} on {ranks} data ranks", ranks, stages, data=ranks)
    with Worker(base, start) as alone, Worker(shared, start) as sharing:
        rows, seen = [], []
        for case in cases:
            with Worker(case, start) as worker:
                taken = [(alone.step(), sharing.step(), worker.step()) for _ in range(WARM_UP + turns)][WARM_UP:]
                rows.append(_row(case, [turn[2] for turn in taken], taken) | worker.traced())
            seen += taken
        first = _row(base, [turn[0] for turn in seen], seen) | alone.traced()
        second = _row(shared, [turn[1] for turn in seen], seen) | sharing.traced()
    return [row | {"times_flops": row["flops"] / first["flops"]} for row in (first, second, *rows)]


def _row(case: Case, own: Sequence[Seconds], turns: Sequence[tuple[Seconds, ...]]) -> dict:
    """`own` are the seconds of the case's steps, and each turn begins with those of the two baselines."""
    times = [statistics.median(one.all / turn[i].all for one, turn in zip(own, turns, strict=True)) for i in (0, 1)]
    of = {"case": case.name, "ranks": case.ranks, "rows": case.rows}
    of |= {"processor": statistics.median(one.all for one in own)}
    of |= {"kernel": statistics.median(one.kernel for one in own)}
    # What else happens on a machine only adds, so the least are nearest to the work, if there are enough turns.
    least = [min(one.all for one in own) / min(turn[i].all for turn in turns) for i in (0, 1)]
    of |= {"least_base": least[0], "least_shared": least[1]}
    return of | {"times_base": times[0], "times_shared": times[1]}


class Worker:
    """A process that takes a case's steps when it is told to."""

    def __init__(self, case: Case, start: Callable[[str], subprocess.Popen]):
        self._process = start(json.dumps(dataclasses.asdict(case)))

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.wait()

    def step(self) -> Seconds:
        """Processor seconds of one step."""
        return Seconds(**self._ask("step"))

    def traced(self) -> dict:
        """FLOPs and seconds by kind of one step more."""
        return self._ask("trace")

    def _ask(self, what: str) -> Any:
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise ChildProcessError(f"a measured step's process ended with status {self._process.wait()}")
        return json.loads(line)


def take_steps(case: Case, *, recompute: str, tokens: int, traces: str | None) -> None:
    """Takes one step for each line of standard input and writes, as JSON, its processor seconds, or what a trace says.

    Args:
      case: what is run.
      recompute: what is computed again.
      tokens: of a microbatch.
      traces: a folder for traces and compiled programs; none keeps none.
    """
    prepare_environment(os.environ, virtual_devices=case.ranks)
    prepare_for_stages(os.environ, virtual_devices=case.ranks)
    model, how = model_of(case.stages), {"schedule": case.schedule, "overlap": case.overlap}
    trainer = make_trainer(model, data=case.data, pipe=case.pipe, recompute=recompute, **how)
    run = Run(case.name, trainer, case.rows, tokens)
    # As a run has it: else each step gets its buffers anew, page by page.
    keep_freed_memory()
    # After compiling, which profits from more.
    share_one_core()
    for line in sys.stdin:
        print(json.dumps(dataclasses.asdict(run.step()) if line == "step\n" else run.traced(traces)), flush=True)


def share_one_core() -> None:
    """Puts every thread of this process on one core, each until it waits, where the system can and the user may."""
    if not hasattr(os, "sched_setaffinity"):
        return
    core, until_it_waits = {min(os.sched_getaffinity(0))}, may_run_until_it_waits()
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
            os.sched_setaffinity(int(thread), core)
            if until_it_waits:
                os.sched_setscheduler(int(thread), os.SCHED_FIFO, os.sched_param(1))


def may_run_until_it_waits() -> bool:
    """Whether threads may have SCHED_FIFO, which mostly the superuser may give them."""
    if not hasattr(os, "sched_setscheduler"):
        return False
    asked = "import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"
    return subprocess.run([sys.executable, "-c", asked], stderr=subprocess.DEVNULL, check=False).returncode == 0


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

    def step(self) -> Seconds:
        """Processor seconds of one step."""
        import jax

        begin = resource.getrusage(resource.RUSAGE_SELF)
        self.state, _ = jax.block_until_ready(self.compiled(self.state, self.batch, self.hyper))
        end = resource.getrusage(resource.RUSAGE_SELF)
        kernel = end.ru_stime - begin.ru_stime
        return Seconds(end.ru_utime - begin.ru_utime + kernel, kernel)

    def traced(self, traces: str | None) -> dict:
        """FLOPs and seconds by kind of work of one more step."""
        import jax

        from deepseek_jax.planning.compiled import read_program
        from tools.bench.trace import read_trace

        text = self.compiled.as_text()
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(traces) / re.sub(r"\W+", "_", self.case) if traces else Path(scratch)
            with jax.profiler.trace(folder):
                self.step()
            if traces:
                (folder / "program.txt").write_text(text)
            return read_trace(folder, read_program(text))
