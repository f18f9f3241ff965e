"""The planner beside what others published: DeepSeek's own run, and other systems that train DeepSeek-V3.

Everything that a prediction reads is an input here: the cluster, the layout, the batch. Rates come from kernel tables
and are the same for all systems on a kind of device. Each figure was predicted twice: with the rates that were fixed
before anything was predicted (`first_rates.py`), and, when those had missed, with others (`efficiency.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal

from deepseek_jax import zoo
from deepseek_jax.parallel.mesh import ParallelConfig
from deepseek_jax.planning.devices import B200, GB200, H100, H800, Device
from deepseek_jax.planning.first_rates import with_first_rates
from deepseek_jax.planning.job import Job
from deepseek_jax.planning.plan import Plan, Segment, make_plan
from deepseek_jax.precision.policy import BF16, V3_FP8, Fp8Config, PrecisionPolicy

LENGTH, ROWS = 4096, 15_360
PRETRAINING_TOKENS, TRILLION = 14.8e12, 1e12
EXTENSIONS = ((32_768, 1920), (131_072, 480))
"""(length, sequences of a batch) of both context extensions, a thousand steps each (section 4.3)."""
STEPS_OF_AN_EXTENSION = 1000
POST_TRAINING_HOURS = 5e3


@dataclasses.dataclass(frozen=True)
class Figure:
    """One published number, and ours."""

    of: str
    unit: str
    published: float
    first: float | None
    """What the planner says with its first rates; None: it was not predicted."""
    second: float | None
    """What it says with its second rates, those of plans."""
    role: Literal["input", "prediction", "not predicted"]
    goal: float | None = None
    """The error that a prediction may have, as a fraction."""
    note: str = ""

    @property
    def first_error(self) -> float | None:
        """The first prediction over the published figure, less 1; of predictions only."""
        return self._error(self.first)

    @property
    def error(self) -> float | None:
        """The second prediction over the published figure, less 1; of predictions only."""
        return self._error(self.second)

    @property
    def first_is_met(self) -> bool | None:
        """Whether the first prediction was as near as it should be."""
        return self._is_met(self.first_error)

    @property
    def is_met(self) -> bool | None:
        """Whether the second one was."""
        return self._is_met(self.error)

    def _error(self, predicted: float | None) -> float | None:
        return predicted / self.published - 1 if self.role == "prediction" and predicted is not None else None

    def _is_met(self, error: float | None) -> bool | None:
        return None if error is None or self.goal is None else abs(error) <= self.goal


def deepseek_job() -> Job:
    """DeepSeek's pre-training at its full batch (section 3.2; arXiv 2505.09343)."""
    return Job(
        model=zoo.deepseek_v3(),
        parallel=ParallelConfig(pipe=16, data=2, node=8, expert=8, microbatch_rows=1),
        precision=V3_FP8,
        length=LENGTH,
        rows=ROWS,
        execution="free",
    )


def extension_job(length: int, rows: int) -> Job:
    """A context extension on the same mesh. Its layout was not published. A batch has fewer sequences for each device
    than DualPipe takes, so this is 1F1B; longer sequences would want to be split, which this library cannot do yet."""
    base = deepseek_job()
    parallel = dataclasses.replace(base.parallel, schedule="one_f_one_b")
    model = zoo.deepseek_v3(long_context=True)
    return dataclasses.replace(base, model=model, parallel=parallel, length=length, rows=rows)


def deepseek_figures() -> tuple[Figure, ...]:
    """The run of the report: a step and its parts, utilisation, hours and money."""
    first, second = (_RunPrediction(device) for device in (with_first_rates(H800), H800))
    return (*_inputs(), *_step(first.plan, second.plan), *_run(first, second))


def _inputs() -> Iterator[Figure]:
    job = deepseek_job()
    for of, value in (
        ("GPUs (H800)", 2048.0),
        ("pipeline stages", float(job.parallel.pipe)),
        ("devices that share the experts", float(job.parallel.node * job.parallel.expert)),
        ("sequences of a batch", float(ROWS)),
        ("tokens of a sequence", float(LENGTH)),
    ):
        yield Figure(of, "", value, value, value, "input")
    yield Figure("microbatch", "sequences", 1.0, 1.0, 1.0, "input", note="not published; ours")


def _step(*plans: Plan) -> Iterator[Figure]:
    for of, unit, published, get in _STEP:
        first, second = map(get, plans)
        yield Figure(of, unit, published, first, second, "prediction", 0.1)


_STEP: tuple[tuple[str, str, float, Callable[[Plan], float]], ...] = (
    ("1F: forward alone", "s", 1.13, lambda plan: plan.step.forward),
    ("1B: backward alone", "s", 1.99, lambda plan: plan.step.backward),
    ("1W: put-off weight gradients", "s", 0.48, lambda plan: plan.step.weight_gradients),
    ("1F1B: forward beside backward", "s", 13.95, lambda plan: plan.step.pairs),
    ("bubble", "s", 2.06, lambda plan: plan.step.bubble),
    ("optimizer", "s", 0.29, lambda plan: plan.step.weights + plan.step.update),
    ("a step", "s", 19.926, lambda plan: plan.step.total),
    ("FLOPs, attention in full", "TFLOP/s", 432.0, lambda plan: plan.flops_per_second(mtp=False, causal=False) / 1e12),
    ("FLOPs, attention causal", "TFLOP/s", 385.0, lambda plan: plan.flops_per_second(mtp=False) / 1e12),
    ("MFU, attention in full", "%", 43.73, lambda plan: 100 * plan.mfu(mtp=False, causal=False)),
    ("MFU, attention causal", "%", 38.94, lambda plan: 100 * plan.mfu(mtp=False)),
)
"""(figure, unit, as published in arXiv 2505.09343, ours)."""


class _RunPrediction:
    """The whole run on H800s with one set of rates; hours are thousands of GPU hours."""

    def __init__(self, device: Device):
        self.device = device
        self.plan = make_plan(deepseek_job(), device, 2048)
        self.trillion = self.plan.cost([Segment(TRILLION, ROWS)]).gpu_hours / 1e3
        self.pretraining = self.plan.cost([Segment(PRETRAINING_TOKENS, ROWS)]).gpu_hours / 1e3
        self.extensions = sum(self._extension_hours(*one) for one in EXTENSIONS) / 1e3

    @property
    def dollars(self) -> float:
        """Millions, with the published hours of post-training."""
        assert self.device.price is not None
        return (self.pretraining + self.extensions + POST_TRAINING_HOURS / 1e3) * self.device.price / 1e3

    def _extension_hours(self, length: int, rows: int) -> float:
        plan = make_plan(extension_job(length, rows), self.device, 2048)
        return plan.cost([Segment(STEPS_OF_AN_EXTENSION * rows * length, rows)]).gpu_hours


def _run(first: _RunPrediction, second: _RunPrediction) -> Iterator[Figure]:
    def predicted(
        of: str, unit: str, published: float, get: Callable[[_RunPrediction], float], note: str = ""
    ) -> Figure:
        return Figure(of, unit, published, get(first), get(second), "prediction", 0.1, note)

    yield predicted("GPU hours per trillion tokens", "K", 180.0, lambda one: one.trillion)
    yield predicted("pre-training, 14.8T tokens", "K GPU hours", 2664.0, lambda one: one.pretraining)
    note = "layout not published: the same mesh with 1F1B"
    yield predicted("both context extensions", "K GPU hours", 119.0, lambda one: one.extensions, note)
    post = POST_TRAINING_HOURS / 1e3
    note = "its tokens are not published"
    yield Figure("post-training", "K GPU hours", post, None, None, "not predicted", note=note)
    yield Figure("price", "$ per GPU hour", 2.0, first.device.price, second.device.price, "input")
    note = "with the published hours of post-training; errors cancel"
    yield predicted("all of it", "M$", 5.576, lambda one: one.dollars, note)


# --- other systems ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class System:
    """A published figure of another system on DeepSeek-V3, with what it takes to predict it."""

    name: str
    device: Device
    job: Job
    tokens_per_second: float
    """Of each GPU, as published."""
    teraflops: float
    """Of each GPU, as published."""
    note: str


_MEGATRON_FP8 = PrecisionPolicy(fp8=Fp8Config())
"""FP8 products; tokens travel in BF16."""


def _system(
    parallel: ParallelConfig, rows: int, precision: PrecisionPolicy = _MEGATRON_FP8, *, mtp: bool = True
) -> Job:
    model = zoo.deepseek_v3()
    return Job(
        model=model if mtp else dataclasses.replace(model, mtp_depth=0),
        parallel=dataclasses.replace(parallel, microbatch_rows=1, overlap="off"),
        precision=precision,
        length=LENGTH,
        rows=rows,
        execution="free",
        imbalance=1.0,
    )


def _interleaved(pipe: int, *, data: int = 1, node: int = 1, expert: int) -> ParallelConfig:
    schedule = "interleaved_one_f_one_b"
    return ParallelConfig(pipe=pipe, data=data, node=node, expert=expert, schedule=schedule, chunks=4)


SYSTEMS = (
    System(
        "Megatron-Bridge 25.09, 1024 H100, FP8, TP2 PP8 VP4 EP64",
        H100,
        _system(_interleaved(8, data=2, node=8, expert=8), 8192),
        1297,
        338,
        "338 is without tiles, with ours it is 330; TP2 taken as data parallel",
    ),
    System(
        "Megatron-Bridge 26.02, 256 B200, MXFP8, PP16 EP8",
        B200,
        _system(ParallelConfig(pipe=16, data=2, expert=8, schedule="one_f_one_b"), 4096),
        2689,
        699,
        "",
    ),
    System(
        "Megatron-Bridge 26.02, 256 GB200, MXFP8, PP4 VP4 EP64",
        GB200,
        _system(_interleaved(4, expert=64), 4096),
        3955,
        1028,
        "",
    ),
    System(
        "Megatron-Bridge 25.11 without MTP, 256 GB200, BF16, PP4 VP4 EP64",
        GB200,
        _system(_interleaved(4, expert=64), 4096, BF16, mtp=False),
        3139,
        782,
        "",
    ),
    System(
        "Megatron-Bridge 25.11 without MTP, 256 GB200, MXFP8, PP8 VP4 EP32",
        GB200,
        _system(_interleaved(8, expert=32), 4096, mtp=False),
        4018,
        1003,
        "",
    ),
)
"""Rates, layouts and batches are the vendor's and were not reproduced (github.com/NVIDIA-NeMo/Megatron-Bridge,
docs/performance-summary.md); that MLA's up-projections are recomputed, and that exchanges are not overlapped on
Blackwell, is what its own recipes set (scripts/performance there, f0e2c37). On an H100 recipes of that time may have
overlapped them; here an interleaved schedule has no pairs in which they could. Routing is forced to balance."""


def system_figures() -> tuple[Figure, ...]:
    """Tokens and FLOPs per second and GPU of each system."""
    found = []
    for one in SYSTEMS:
        first, second = (make_plan(one.job, device) for device in (with_first_rates(one.device), one.device))
        rates = first.tokens_per_second, second.tokens_per_second
        found.append(Figure(one.name, "tokens/s", one.tokens_per_second, *rates, "prediction", 0.2, one.note))
        flops = first.flops_per_second() / 1e12, second.flops_per_second() / 1e12
        found.append(Figure("", "TFLOP/s", one.teraflops, *flops, "prediction", 0.2))
    return tuple(found)
