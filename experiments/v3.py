"""DeepSeek-V3, 671B parameters, as its report trains it (arXiv 2412.19437, sections 3.2, 4.2, 4.3 and 5.1).

The corpus and its tokenizer are the user's: a folder that `tools/tokenize_corpus.py` wrote. `python -m tools.plan` says
of each recipe what it needs and what it costs, and which of them fit on which GPUs.
"""

from __future__ import annotations

import dataclasses

from deepseek_jax import zoo
from deepseek_jax.data import ArrayRecord, DataConfig, TokenizerConfig
from deepseek_jax.parallel.mesh import ParallelConfig
from deepseek_jax.precision.policy import V3_FP8
from deepseek_jax.training.experiment import CheckpointConfig, EvaluationConfig, Experiment, MovingAverageConfig
from deepseek_jax.training.optimizer import OptimizerConfig
from deepseek_jax.training.schedules import Curve, Phase, ScheduleConfig, constant, paper_schedule

LENGTH, FIRST_ROWS, ROWS = 4096, 3072, 15_360
CORPUS = "corpus"
LAST_LR = 7.3e-6
"""Of pre-training's last stretch, and of both context extensions."""


def pretrain() -> Experiment:
    """As published: 14.8T tokens in 16 stages of 128 devices, experts over 8 nodes of 8; corpus/ holds the tokens.

    Set data.sources.0.path and tokenizer.path for another folder. The batch ramps from 24 to 120 microbatches of one
    row per device; DualPipe needs 32 over 16 ranks, so the first 24 come with eight empty ones.
    """
    return Experiment(
        model=zoo.deepseek_v3(),
        tokenizer=TokenizerConfig(path=f"{CORPUS}/tokenizer.json"),
        # Streams for up to as many hosts as there are devices.
        data=DataConfig(sources=(ArrayRecord(path=CORPUS),), sequence_length=LENGTH, virtual_shards=2048),
        optimizer=OptimizerConfig(peak_lr=2.2e-4, moment_dtype="bfloat16"),
        schedule=paper_schedule(
            14_800_000_000_000,
            warmup_tokens=2000 * FIRST_ROWS * LENGTH,
            rows=ROWS,
            start_rows=FIRST_ROWS,
            batch_multiple=FIRST_ROWS // 2,  # the ramp in nine sizes, each of whole rows for 128 devices
        ),
        parallel=ParallelConfig(pipe=16, data=2, node=8, expert=8, microbatch_rows=1),
        evaluation=EvaluationConfig(every_steps=1000, max_bytes=4_000_000),
        checkpoint=CheckpointConfig(every_steps=500),
        moving_average=MovingAverageConfig(),
    )


def pretrain_512() -> Experiment:
    """The same run on a quarter of the devices: 8 stages, and one copy of every expert."""
    base = pretrain()
    return dataclasses.replace(base, parallel=dataclasses.replace(base.parallel, pipe=8, data=1))


def pretrain_256() -> Experiment:
    """The same run on 256 devices of 141 GB or more: 4 stages, in FP8, all but layers' inputs computed again."""
    return _lean(pretrain(), pipe=4, node=8, expert=8, schedule="eager_one_f_one_b")


def pretrain_64() -> Experiment:
    """The same run on 64 devices of 186 GB: 32 stages of two devices, by 1F1B. Years, and less than 10 GB to spare."""
    return _lean(pretrain(), pipe=32, node=1, expert=2, schedule="one_f_one_b")


def pretrain_8() -> Experiment:
    """The same run on one node of eight devices. None has the memory: a plan says what is lacking."""
    lean = _lean(pretrain(), pipe=4, node=1, expert=2, schedule="one_f_one_b")
    return dataclasses.replace(lean, cannot_run="no eight devices have the memory for 671B parameters and their state")


def extend_32k() -> Experiment:
    """The first context extension (section 4.3): YaRN, a thousand steps of 1920 sequences of 32K. Use --init_from.

    A device has 15 sequences of a batch, too few for DualPipe over 16 ranks.
    """
    return _extension(length=32_768, rows=1920)


def extend_128k() -> Experiment:
    """The second one: a thousand steps of 480 sequences of 128K. Use --init_from with the first one's folder.

    Devices have four sequences of a batch each, a few of them empty. A sequence is not split over devices, which this
    library cannot do yet: a stage's activations of 128K tokens fit on no device that there is.
    """
    reason = "a sequence of 128K is not split over devices yet, and a stage's activations of one fit on no device"
    return dataclasses.replace(_extension(length=131_072, rows=480), cannot_run=reason)


def sft() -> Experiment:
    """Supervised fine-tuning (section 5.1): two epochs of 1.5M instances, at a learning rate from 5e-6 to 1e-6.

    Instances are packed, and attend to themselves only. The report gives neither their length nor the batch: here they
    have 1500 tokens on average, and a batch 1024 sequences. Use --init_from.
    """
    base, total = pretrain(), 2 * 1_500_000 * 1500
    return dataclasses.replace(
        base,
        model=zoo.deepseek_v3(long_context=True),
        optimizer=dataclasses.replace(base.optimizer, peak_lr=5e-6),
        schedule=ScheduleConfig(
            total_tokens=total,
            learning_rate=Curve(start=1.0, phases=(Phase(until=total, value=0.2, shape="cosine"),)),
            batch_rows=constant(1024),
            mtp_weight=constant(0.1),
            bias_rate=constant(0.0),
        ),
        parallel=dataclasses.replace(base.parallel, schedule="one_f_one_b"),
        mask_documents=True,
    )


def _lean(base: Experiment, *, pipe: int, node: int, expert: int, schedule: str) -> Experiment:
    """A recipe on another mesh with one copy of every expert, with the least memory for it."""
    parallel = dataclasses.replace(
        base.parallel, pipe=pipe, data=1, node=node, expert=expert, schedule=schedule, recompute="full"
    )
    return dataclasses.replace(base, parallel=parallel, precision=V3_FP8)


def _extension(*, length: int, rows: int) -> Experiment:
    """A thousand steps at pre-training's last learning rate, and with its last λ and γ: the report gives no others."""
    base, total = pretrain(), 1000 * rows * length
    return dataclasses.replace(
        base,
        model=zoo.deepseek_v3(long_context=True),
        data=dataclasses.replace(base.data, sequence_length=length),
        optimizer=dataclasses.replace(base.optimizer, peak_lr=LAST_LR),
        schedule=ScheduleConfig(
            total_tokens=total,
            learning_rate=constant(1.0),
            batch_rows=constant(rows),
            mtp_weight=constant(0.1),
            bias_rate=constant(0.0),
        ),
        parallel=dataclasses.replace(base.parallel, schedule="one_f_one_b"),
    )
