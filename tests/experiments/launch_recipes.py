"""The recipe that `test_launch.py` starts by name in processes of its own, where it compiles quickly.

It writes a digest of every array of the state with which a run goes on to the file RESTORED, as process 0 sees it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import jax
import numpy as np
from array_digest import digest
from jax.experimental import multihost_utils
from tiny_run import LENGTH, experiment, quick_runs

from deepseek_jax.parallel.mesh import ParallelConfig
from deepseek_jax.training import canonical, loop
from deepseek_jax.training.experiment import CheckpointConfig, Experiment
from deepseek_jax.training.optimizer import OptimizerConfig
from deepseek_jax.training.schedules import constant

TEXTS, RESTORED = "DEEPSEEK_JAX_TEST_TEXTS", "DEEPSEEK_JAX_TEST_RESTORED"
ROWS = 8

_restore = loop.restore


def _noted_restore(store, step, trainer, *arguments):
    state, *rest = _restore(store, step, trainer, *arguments)
    if RESTORED not in os.environ:
        return state, *rest
    digests = {name: digest(_whole(array)) for name, array in canonical.to_canonical(trainer, state).items()}
    if jax.process_index() == 0:
        Path(os.environ[RESTORED]).write_text(json.dumps(digests))
    return state, *rest


def _whole(array) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(array, tiled=True) if jax.process_count() > 1 else array)


def small() -> Experiment:
    """Twelve steps of eight rows, saved every four."""
    base = experiment(Path(os.environ[TEXTS]))
    schedule = dataclasses.replace(
        base.schedule,
        total_tokens=12 * ROWS * LENGTH,
        batch_rows=constant(ROWS),
        learning_rate=constant(1.0),
        mtp_weight=constant(0.3),
    )
    return dataclasses.replace(
        base,
        schedule=schedule,
        optimizer=OptimizerConfig(peak_lr=1e-2),
        parallel=ParallelConfig(),
        checkpoint=CheckpointConfig(every_steps=4, keep_last=9),
    )


# For good: this module is imported by processes that end with their run.
_patch = quick_runs().__enter__()
_patch.setattr(loop, "restore", _noted_restore)
_patch.setattr(loop, "finish_run", lambda *arguments, heldout, **settings: heldout)
