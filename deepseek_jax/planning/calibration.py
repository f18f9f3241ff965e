"""The planner beside what others published: DeepSeek's own run, and other systems that train DeepSeek-V3.

Everything that a prediction reads is an input here: the cluster, the layout, the batch. Rates come from kernel tables
(`efficiency.py`), which were fixed before the first of these predictions was made, and are the same for all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from deepseek_jax import zoo
from deepseek_jax.parallel.mesh import ParallelConfig
from deepseek_jax.planning.devices import B200, GB200, H100, H800, Device
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
    ours: float | None
    """What the planner says; None: it was not predicted."""
    role: Literal["input", "prediction", "not predicted"]
    goal: float | None = None
    """The error that a prediction may have, as a fraction."""
    note: str = ""

    @property
    def error(self) -> float | None:
        """Ours over the published one, less 1; of predictions only."""
        return self.ours / self.published - 1 if self.role == "prediction" and self.ours is not None else None

    @property
    def is_met(self) -> bool | None:
        """Whether a prediction is as near as it should be."""
        return None if self.error is None or self.goal is None else abs(self.error) <= self.goal


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
    plan = make_plan(deepseek_job(), H800, 2048)
    return (*_inputs(), *_step(plan), *_run(plan))


def _inputs() -> Iterator[Figure]:
    job = deepseek_job()
    for of, value in (
        ("GPUs (H800)", 2048.0),
        ("pipeline stages", float(job.parallel.pipe)),
        ("devices that share the experts", float(job.parallel.node * job.parallel.expert)),
        ("sequences of a batch", float(ROWS)),
        ("tokens of a sequence", float(LENGTH)),
    ):
        yield Figure(of, "", value, value, "input")
    yield Figure("microbatch", "sequences", 1.0, 1.0, "input", note="not published; ours")


def _step(plan: Plan) -> Iterator[Figure]:
    step = plan.step
    parts = {
        "1F: forward alone": (1.13, step.forward),
        "1B: backward alone": (1.99, step.backward),
        "1W: put-off weight gradients": (0.48, step.weight_gradients),
        "1F1B: forward beside backward": (13.95, step.pairs),
        "bubble": (2.06, step.bubble),
        "optimizer": (0.29, step.weights + step.update),
        "a step": (19.926, step.total),
    }
    for of, (published, ours) in parts.items():
        yield Figure(of, "s", published, ours, "prediction", 0.1)
    mfu = plan.mfu(mtp=False, causal=False), plan.mfu(mtp=False)
    rate = plan.flops_per_second(mtp=False, causal=False) / 1e12, plan.flops_per_second(mtp=False) / 1e12
    yield Figure("FLOPs, attention in full", "TFLOP/s", 432.0, rate[0], "prediction", 0.1)
    yield Figure("FLOPs, attention causal", "TFLOP/s", 385.0, rate[1], "prediction", 0.1)
    yield Figure("MFU, attention in full", "%", 43.73, 100 * mfu[0], "prediction", 0.1)
    yield Figure("MFU, attention causal", "%", 38.94, 100 * mfu[1], "prediction", 0.1)


def _run(plan: Plan) -> Iterator[Figure]:
    thousand = 1e3
    each = plan.cost([Segment(TRILLION, ROWS)]).gpu_hours / thousand
    whole = plan.cost([Segment(PRETRAINING_TOKENS, ROWS)]).gpu_hours / thousand
    yield Figure("GPU hours per trillion tokens", "K", 180.0, each, "prediction", 0.1)
    yield Figure("pre-training, 14.8T tokens", "K GPU hours", 2664.0, whole, "prediction", 0.1)
    extensions = sum(map(_extension_hours, EXTENSIONS)) / thousand
    note = "layout not published: the same mesh with 1F1B"
    yield Figure("both context extensions", "K GPU hours", 119.0, extensions, "prediction", 0.1, note)
    post = POST_TRAINING_HOURS / thousand
    yield Figure("post-training", "K GPU hours", post, None, "not predicted", note="its tokens are not published")
    assert H800.price is not None
    yield Figure("price", "$ per GPU hour", 2.0, H800.price, "input")
    dollars = (whole + extensions + post) * thousand * H800.price / 1e6
    note = "with the published hours of post-training; two errors cancel"
    yield Figure("all of it", "M$", 5.576, dollars, "prediction", 0.1, note)


def _extension_hours(extension: tuple[int, int]) -> float:
    length, rows = extension
    plan = make_plan(extension_job(length, rows), H800, 2048)
    return plan.cost([Segment(STEPS_OF_AN_EXTENSION * rows * length, rows)]).gpu_hours


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
        "TP2 taken as data parallel",
    ),
    System(
        "Megatron-Bridge 26.02, 256 B200, MXFP8, PP16 EP8",
        B200,
        _system(ParallelConfig(pipe=16, data=2, expert=8, schedule="one_f_one_b"), 2048),
        2689,
        699,
        "",
    ),
    System(
        "Megatron-Bridge 26.02, 256 GB200, MXFP8, PP4 EP64",
        GB200,
        _system(_interleaved(4, expert=64), 2048),
        3955,
        1028,
        "VP4; its overlap of exchanges is not in ours",
    ),
    System(
        "Megatron 25.11 without MTP, 256 GB200, BF16, PP4",
        GB200,
        _system(_interleaved(4, expert=64), 2048, BF16, mtp=False),
        3139,
        782,
        "EP64 and VP4 assumed",
    ),
    System(
        "Megatron 25.11 without MTP, 256 GB200, MXFP8, PP8",
        GB200,
        _system(_interleaved(8, expert=32), 2048, mtp=False),
        4018,
        1003,
        "EP32 and VP4 assumed",
    ),
)
"""Rates are the vendor's and were not reproduced. Batches, VP, recomputation (MLA's up-projections) and that exchanges
are not overlapped on Hopper and B200 are those of its own recipes (github.com/NVIDIA-NeMo/Megatron-Bridge,
scripts/performance); routing is forced to balance."""


def system_figures() -> tuple[Figure, ...]:
    """Tokens and FLOPs per second and GPU of each system."""
    found = []
    for one in SYSTEMS:
        plan = make_plan(one.job, one.device)
        rate = plan.tokens_per_second
        found.append(Figure(one.name, "tokens/s", one.tokens_per_second, rate, "prediction", 0.2, one.note))
        flops = plan.flops_per_second() / 1e12
        found.append(Figure("", "TFLOP/s", one.teraflops, flops, "prediction", 0.2))
    return tuple(found)
