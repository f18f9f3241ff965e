"""An hour on two CPU cores: the tiny model's bigger sibling, trained until it beats gzip on files it never saw."""

from __future__ import annotations

import dataclasses

from deepseek_jax import zoo
from deepseek_jax.training.experiment import CheckpointConfig, EvaluationConfig, Experiment, LoggingConfig
from deepseek_jax.training.schedules import paper_schedule
from experiments import tiny


def pretrain() -> Experiment:
    """The quickstart's recipe with twice the experts, longer rows and ten times the tokens."""
    base = tiny.pretrain()
    model = zoo.small()
    return dataclasses.replace(
        base,
        model=model,
        tokenizer=dataclasses.replace(base.tokenizer, vocab_size=model.vocab_size),
        data=dataclasses.replace(base.data, sequence_length=512),
        schedule=paper_schedule(8_000_000, warmup_tokens=200_000, rows=8),
        evaluation=EvaluationConfig(every_steps=200, max_bytes=60_000, samples=tiny.PROMPTS, sample_tokens=192),
        checkpoint=CheckpointConfig(every_steps=200, keep_last=2),
        logging=LoggingConfig(every_steps=20),
    )
