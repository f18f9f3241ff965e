"""A whole run small enough for a test: a folder of texts, an experiment over it, and compiled steps that runs share."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_model import initial_state, quickly

from deepseek_jax.config import AttentionConfig, ModelConfig, MoEConfig
from deepseek_jax.data import DataConfig, TextFiles, TokenizerConfig
from deepseek_jax.evaluation.heldout import HeldoutResult
from deepseek_jax.parallel.mesh import ParallelConfig
from deepseek_jax.precision.policy import FLOAT32
from deepseek_jax.training import loop
from deepseek_jax.training.checkpoint import CheckpointStore
from deepseek_jax.training.experiment import CheckpointConfig, EvaluationConfig, Experiment, LoggingConfig
from deepseek_jax.training.finish import HeldoutEvaluator
from deepseek_jax.training.optimizer import OptimizerConfig
from deepseek_jax.training.room import RoomControl
from deepseek_jax.training.schedules import Curve, Phase, ScheduleConfig, constant, stepped
from deepseek_jax.training.step import Trainer, TrainState

LENGTH = 32
VOCABULARY = 300
MODEL = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_layers=2,
    num_dense_layers=1,
    dense_ffn_size=48,
    attention=AttentionConfig(
        num_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
    ),
    moe=MoEConfig(num_experts=4, experts_per_token=2, expert_ffn_size=16, num_groups=2, groups_per_token=1),
    mtp_depth=1,
    init_std=0.1,
)
STEPS = 20
TOKENS = (8 * 2 + 6 * 3 + 6 * 4) * LENGTH
"""Of twenty steps: 8 of 2 rows, 6 of 3, 6 of 4."""
SCHEDULE = ScheduleConfig(
    total_tokens=TOKENS,
    learning_rate=Curve(phases=(Phase(until=128, value=1.0, shape="linear"), Phase(until=TOKENS, value=0.1))),
    batch_rows=Curve(start=2, phases=(Phase(until=16 * 2 * LENGTH, value=4, shape="linear"),)),
    mtp_weight=stepped((TOKENS // 2, 0.3), final=0.1),
    bias_rate=constant(0.02),
)
SENTENCES = (
    "def area(width, height):\n    return width * height\n\n",
    "The rain in Spain, 1234567 drops of it: stays mainly in the plain.\n\n",
    "for name in names:\n    print(f'{name}!');\n\n\n",
)


def write_texts(folder: Path, documents: int = 24) -> Path:
    """Texts of up to a few hundred bytes each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        sentences = [SENTENCES[(number + i) % 3] for i in range(1 + number % 7)]
        (folder / f"{number:02d}.txt").write_text(f"# document {number}\n" + "".join(sentences))
    return folder


def experiment(texts: Path, **changes: Any) -> Experiment:
    """Twenty steps on the texts of a folder with every mechanism at work: MTP, bias, ramped batch, microbatches."""
    base = Experiment(
        model=MODEL,
        tokenizer=TokenizerConfig(vocab_size=VOCABULARY),
        data=DataConfig(
            sources=(TextFiles(path=str(texts)),), sequence_length=LENGTH, heldout_min_documents=3, virtual_shards=2
        ),
        optimizer=OptimizerConfig(peak_lr=1e-2, moment_dtype="bfloat16"),
        schedule=SCHEDULE,
        parallel=ParallelConfig(microbatch_rows=2),
        precision=FLOAT32,
        evaluation=EvaluationConfig(batch_rows=4),
        checkpoint=CheckpointConfig(every_steps=1000),
        logging=LoggingConfig(every_steps=1, tensorboard=False),
    )
    return dataclasses.replace(base, **changes)


@contextlib.contextmanager
def quick_runs() -> Iterator[pytest.MonkeyPatch]:
    """Runs in here share what is compiled, compile it quickly, and measure no matmul."""
    with pytest.MonkeyPatch.context() as patch:
        # Drawing the initial weights compiles a program per shape, which other tests have done.
        patch.setattr(Trainer, "initial_state", lambda self, seed: initial_state(self, seed=seed))
        patch.setattr(loop, "make_trainer", _shared_trainer)
        patch.setattr(loop, "measure_matmul_peak", lambda dtype: 1e9)
        yield patch


_make_trainer = loop.make_trainer


def _shared_trainer(run: Experiment) -> Trainer:
    """What `loop.make_trainer` makes, once for all runs whose compiled step is the same."""
    schedule = dataclasses.replace(SCHEDULE, balance_weight=run.schedule.balance_weight)
    optimizer = dataclasses.replace(run.optimizer, peak_lr=1.0)
    same = Experiment(
        model=run.model,
        schedule=schedule,
        data=DataConfig(sequence_length=run.data.sequence_length),
        tokenizer=TokenizerConfig(path="any"),
        optimizer=optimizer,
        parallel=run.parallel,
        precision=run.precision,
        mask_documents=run.mask_documents,
        balance_from_routed=run.balance_from_routed,
        force_balanced_routing=run.force_balanced_routing,
    )
    trainer = _cached_trainer(same)
    trainer.room, trainer._compiled = RoomControl(), set()  # as if no run had used it
    return trainer


@functools.cache
def _cached_trainer(run: Experiment) -> Trainer:
    return quickly(_make_trainer(run))


def compile_flags() -> str:
    """XLA's flags that say how to compile (`make test` sets some), for processes that have devices of their own."""
    given = os.environ.get("XLA_FLAGS", "").split()
    return " ".join(flag for flag in given if flag.startswith(("--xla_backend_optimization", "--xla_llvm_disable")))


def train(run: Experiment, workdir: Path, **options: Any) -> tuple[loop.RunResult, str]:
    """How a run ended, and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        result = loop.train(run, workdir=str(workdir), **options)
    return result, printed.getvalue()


@contextlib.contextmanager
def after_step(step: int, action: Callable[[Any], Any]) -> Iterator[None]:
    """Calls `action(state)` when a run has taken step `step`; if it returns a state, the run goes on with that."""
    real = Trainer.step

    def stepped(self, state, batch, hyper):
        state, metrics = real(self, state, batch, hyper)
        if int(state.step) == step:
            state = action(state) or state
        return state, metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", stepped)
        yield


def kill(number: int) -> Callable[[Any], None]:
    """An action that sends this process a signal."""
    return lambda state: os.kill(os.getpid(), number)


def judge(evaluator: HeldoutEvaluator, state: TrainState, *, complete: bool = True) -> HeldoutResult:
    """What the evaluator finds on text that is there."""
    result = evaluator(state, complete=complete)
    assert result is not None
    return result


def records(workdir: Path, kind: str) -> list[dict]:
    """The lines of a run's metrics.jsonl of one kind, without what a clock measured."""
    lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    clocks = ("tokens_per_second", "mfu")
    return [{k: v for k, v in line.items() if k not in clocks} for line in lines if line["kind"] == kind]


def checkpoint(workdir: Path, step: int) -> tuple[dict[str, np.ndarray], dict]:
    """Every array of a run's checkpoint, by name, and its documents."""
    store = CheckpointStore(Path(workdir) / "checkpoints")
    arrays = store.restore(step, store.entries(step))
    return {name: np.asarray(array) for name, array in arrays.items()}, store.documents(step)


def checkpoints(workdir: Path) -> list[int]:
    """Steps of a run's checkpoints."""
    return CheckpointStore(Path(workdir) / "checkpoints").steps()


def assert_same_arrays(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """The same names, dtypes and bits."""
    assert sorted(one) == sorted(other)
    for name, array in one.items():
        assert array.dtype == other[name].dtype, name
        assert array.tobytes() == other[name].tobytes(), f"{name} differs"
