"""DeepSeek-V2-Lite, 15.7B parameters: the smallest published model with MLA and DeepSeekMoE (arXiv 2405.04434)."""

from __future__ import annotations

import dataclasses

from deepseek_jax import zoo
from deepseek_jax.data import DataConfig, TokenizerConfig
from deepseek_jax.training.experiment import CheckpointConfig, EvaluationConfig, Experiment
from deepseek_jax.training.optimizer import OptimizerConfig
from deepseek_jax.training.schedules import Curve, Phase, ScheduleConfig, constant

LENGTH = 4096


def pretrain() -> Experiment:
    """As published: 5.7T tokens, batches of 4608 sequences of 4K, the learning rate times 0.316 at 80% and at 90%."""
    model, total, rows = zoo.deepseek_v2_lite(), 5_700_000_000_000, 4608
    return Experiment(
        model=model,
        tokenizer=TokenizerConfig(vocab_size=100_000),
        data=DataConfig(sequence_length=LENGTH),
        optimizer=OptimizerConfig(peak_lr=4.2e-4),
        schedule=ScheduleConfig(
            total_tokens=total,
            learning_rate=Curve(
                phases=(
                    Phase(until=2000 * rows * LENGTH, value=1.0, shape="linear"),
                    Phase(until=total * 8 // 10, value=1.0),
                    Phase(until=total * 9 // 10, value=0.316),
                    Phase(until=total, value=0.316**2),
                )
            ),
            batch_rows=constant(rows),
            balance_weight=1e-3,
        ),
        evaluation=EvaluationConfig(every_steps=1000, max_bytes=4_000_000),
    )


def continue_pretraining() -> Experiment:
    """A billion tokens of one's own text on top of published weights: use it with --init_from hf:FOLDER.

    The peak learning rate is a tenth of pre-training's and falls to a tenth of itself.
    """
    base, total = pretrain(), 1_000_000_000
    return dataclasses.replace(
        base,
        optimizer=OptimizerConfig(peak_lr=4.2e-5),
        schedule=ScheduleConfig(
            total_tokens=total,
            learning_rate=Curve(
                phases=(
                    Phase(until=total // 50, value=1.0, shape="linear"),
                    Phase(until=total, value=0.1, shape="cosine"),
                )
            ),
            batch_rows=constant(64),
            balance_weight=1e-3,
        ),
        evaluation=EvaluationConfig(every_steps=500, max_bytes=4_000_000),
        checkpoint=CheckpointConfig(every_steps=500),
    )
