"""DeepSeek-V3, 671B parameters, as its report trains it (arXiv 2412.19437, sections 3.2 and 4.2): 2048 devices.

The corpus and its tokenizer are the user's: a folder that `tools/tokenize_corpus.py` wrote.
"""

from __future__ import annotations

import dataclasses

from deepseek_jax import zoo
from deepseek_jax.data import ArrayRecord, DataConfig, TokenizerConfig
from deepseek_jax.parallel.mesh import ParallelConfig
from deepseek_jax.training.experiment import CheckpointConfig, EvaluationConfig, Experiment, MovingAverageConfig
from deepseek_jax.training.optimizer import OptimizerConfig
from deepseek_jax.training.schedules import paper_schedule

LENGTH, FIRST_ROWS, ROWS = 4096, 3072, 15_360
CORPUS = "corpus"


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
