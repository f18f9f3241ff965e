"""A whole DeepSeek-V3, tiny: every mechanism of the paper in minutes on two CPU cores, with no download."""

from __future__ import annotations

import dataclasses

from deepseek_jax import zoo
from deepseek_jax.data import DataConfig, TokenizerConfig
from deepseek_jax.parallel.mesh import ParallelConfig
from deepseek_jax.precision.policy import FLOAT32
from deepseek_jax.training.experiment import CheckpointConfig, EvaluationConfig, Experiment, LoggingConfig
from deepseek_jax.training.optimizer import OptimizerConfig
from deepseek_jax.training.schedules import constant, paper_schedule

PROMPTS = (
    "def __init__(self, ",
    "    for line in lines:\n",
    'class Parser:\n    """',
)


def pretrain() -> Experiment:
    """Tokenizer, pre-training, evaluation and samples on Python's own standard library: the quickstart."""
    model = zoo.tiny()
    return Experiment(
        model=model,
        tokenizer=TokenizerConfig(vocab_size=model.vocab_size),
        data=DataConfig(sequence_length=256),
        optimizer=OptimizerConfig(peak_lr=3e-3),
        schedule=paper_schedule(800_000, warmup_tokens=40_000, rows=8),
        precision=FLOAT32,
        evaluation=EvaluationConfig(every_steps=100, max_bytes=40_000, samples=PROMPTS),
        checkpoint=CheckpointConfig(every_steps=100, keep_last=2),
        logging=LoggingConfig(every_steps=10),
    )


def pretrain_sharded() -> Experiment:
    """The quickstart on eight devices: two replicas of experts that are spread over two nodes of two devices each."""
    return dataclasses.replace(pretrain(), parallel=ParallelConfig(data=2, node=2, expert=2))


def pretrain_dualpipe() -> Experiment:
    """The quickstart by DualPipe on eight devices: two stages, two replicas, experts over two devices.

    DualPipe over two ranks needs four microbatches, and four devices share a batch: so a step takes sixteen rows, where
    the quickstart takes eight. As many tokens are then half as many steps, at a learning rate √2 times as high, as Adam
    wants it for a batch twice as large. Another schedule is one change away: `--set parallel.schedule=zb_h1`.
    """
    base = pretrain()
    return dataclasses.replace(
        base,
        optimizer=dataclasses.replace(base.optimizer, peak_lr=4.2e-3),
        schedule=dataclasses.replace(base.schedule, batch_rows=constant(16)),
        parallel=ParallelConfig(pipe=2, data=2, expert=2, schedule="dualpipe", microbatch_rows=1),
        evaluation=dataclasses.replace(base.evaluation, every_steps=50),
        checkpoint=dataclasses.replace(base.checkpoint, every_steps=50),
        logging=dataclasses.replace(base.logging, every_steps=5),
    )


def pretrain_dualpipe_deep() -> Experiment:
    """The same batches by DualPipe in four stages, a layer each, with experts over two devices."""
    base = pretrain_dualpipe()
    return dataclasses.replace(base, parallel=dataclasses.replace(base.parallel, pipe=4, data=1))


def pretrain_without_bias() -> Experiment:
    """The quickstart with the router bias frozen at zero: what balance looks like without its update."""
    base = pretrain()
    return dataclasses.replace(base, schedule=dataclasses.replace(base.schedule, bias_rate=constant(0.0)))
