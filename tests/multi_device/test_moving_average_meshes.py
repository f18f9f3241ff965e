"""The moving average of the weights over stages, replicas and experts: the same numbers on every mesh."""

from __future__ import annotations

import dataclasses
import functools
import math
import signal
import zlib
from collections.abc import Callable

import jax
import numpy as np
import pytest
from small_model import initial_state, small
from tiny_run import LENGTH, SCHEDULE, after_step, checkpoint, experiment, kill, quick_runs, train, write_texts

from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.mesh import ParallelConfig, make_mesh
from deepseek_jax.parallel.placement import KINDS, ParameterLayout, place
from deepseek_jax.training import canonical, loop
from deepseek_jax.training.canonical import MOVING_AVERAGE, OPTIMIZER
from deepseek_jax.training.checkpoint import CheckpointStore
from deepseek_jax.training.experiment import CheckpointConfig, MovingAverageConfig
from deepseek_jax.training.moving_average import MovingAverage, start_average
from deepseek_jax.training.optimizer import OptimizerConfig
from deepseek_jax.training.schedules import constant
from deepseek_jax.training.step import Trainer, TrainState
from deepseek_jax.training.step_config import StepConfig
from deepseek_jax.tree import flatten, unflatten

STEPS, STOPPED_AT, ROWS, DECAY = 4, 2, 8, 0.9
CONFIG = MovingAverageConfig(decay=DECAY)
MODEL = small(num_layers=5)
JOURNEY = (
    ParallelConfig(),
    ParallelConfig(pipe=2, data=2, expert=2, schedule="dualpipe"),
    ParallelConfig(data=2, node=2, expert=2),
    ParallelConfig(pipe=4, data=2, schedule="one_f_one_b", zero=False),
)
"""Meshes and layouts that differ in stages, in stacks, and in what is split over which ranks."""


def first_devices(config: ParallelConfig):
    """A mesh of so many of the eight devices."""
    return make_mesh(config, jax.devices()[: math.prod(config.shape)])


def laid_out(parallel: ParallelConfig) -> Trainer:
    """A trainer of the model on that mesh, whose step is never compiled."""
    placement = place(MODEL, stage_map=parallel.schedule_choice.stage_map)
    config = StepConfig(schedule=parallel.schedule, microbatch_rows=1, zero=parallel.zero)
    return Trainer(Transformer(MODEL), placement, first_devices(parallel), OptimizerConfig().make, config)


def placed(trainer: Trainer, value: Callable[[str, tuple[int, ...]], np.ndarray]) -> TrainState:
    """The state with `value(canonical name, shape)` for each weight and bias, in NumPy until it is on the devices."""

    def array(layout: ParameterLayout, name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
        kind, _, path = name.partition(".")
        if kind not in KINDS:
            return jax.device_put(value(name, like.shape), like.sharding)
        stack = np.zeros(like.shape, np.float32)
        for rank, slot, _, canonical_name in layout.placement.arrays(kind, [path]):
            stack[rank, slot] = value(canonical_name, like.shape[2:])
        return jax.device_put(stack, like.sharding)

    params, router_bias = (
        unflatten({name: array(layout, name, like) for name, like in flatten(layout.abstract()).items()})
        for layout in (trainer.params_layout, trainer.bias_layout)
    )
    return TrainState(params, router_bias, None, None)


def drawn(step: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """What an array is after a step: drawn by its name, so the same in any layout."""
    return np.random.default_rng([step, zlib.crc32(name.encode())]).normal(size=shape).astype(np.float32)


def moved(average: np.ndarray, towards: np.ndarray, update: int) -> np.ndarray:
    """a + r (w - a) in float32, r = (1 - d) / (1 - d^(t+1))."""
    return average + np.float32((1 - DECAY) / (1 - DECAY ** (update + 1))) * (towards - average)


def test_it_moves_between_layouts_bit_for_bit(tmp_path):
    """It goes on from the checkpoint of another mesh, and to the last bit is what one device makes of the weights.

    What an evaluation gets is that average, on the devices as the weights are.
    """
    expected: dict[str, np.ndarray] = {}
    with CheckpointStore(tmp_path) as store:
        for step, parallel in enumerate(JOURNEY):
            trainer = laid_out(parallel)
            state = placed(trainer, functools.partial(drawn, step))
            average, line = start_average(CONFIG, trainer, state, store, store.latest_step())
            assert average is not None
            assert line is not None
            assert line.endswith(f"after {step - 1} updates" if step else "new")
            if step:
                average.update(step, state)
            entries = average.entries()
            for name, array in entries.items():
                new = drawn(step, name.removeprefix(MOVING_AVERAGE), array.shape)
                expected[name] = moved(expected[name], new, step) if step else new
                np.testing.assert_array_equal(array, expected[name], err_msg=f"{name} in {parallel}")
            assert set(entries) == set(expected)
            store.save(step, entries, {"meta": {"moving_average": {"updates": average.updates}}}, wait=True)
            judged = average.in_place_of(state)
            wanted = placed(trainer, lambda name, shape: expected[MOVING_AVERAGE + name])
            for one, other in zip(jax.tree.leaves(judged), jax.tree.leaves(wanted), strict=True):
                assert one.sharding == other.sharding
                np.testing.assert_array_equal(one, other)
            average.close()


@pytest.mark.parametrize("zero", [True, False])
def test_a_process_holds_every_part_once(zero):
    """However many replicas there are: as many bytes on the host as the model has numbers, times four."""
    trainer = laid_out(ParallelConfig(data=8, zero=zero))
    arrays = jax.tree.leaves((trainer.params_layout.abstract(), trainer.bias_layout.abstract()))
    assert MovingAverage(CONFIG, trainer).nbytes == 4 * sum(math.prod(like.shape) for like in arrays)


def test_a_run_keeps_it_on_one_device_and_on_four(tmp_path, tmp_path_factory):
    """Two steps on one device and two on four: a_t of the weights in each checkpoint, to the last bit."""
    with quick_runs() as patch:
        patch.setattr(loop, "make_mesh", first_devices)
        patch.setattr(loop, "finish_run", lambda *arguments, heldout, **settings: heldout)
        base = experiment(write_texts(tmp_path_factory.mktemp("texts")))
        run = dataclasses.replace(
            base,
            model=dataclasses.replace(base.model, num_layers=1, num_dense_layers=0, mtp_depth=0),
            data=dataclasses.replace(base.data, heldout_fraction=0, heldout_min_documents=0),
            schedule=dataclasses.replace(SCHEDULE, total_tokens=STEPS * ROWS * LENGTH, batch_rows=constant(ROWS)),
            parallel=ParallelConfig(),
            checkpoint=CheckpointConfig(every_steps=1, keep_last=9),
            moving_average=CONFIG,
        )
        trainer = loop.make_trainer(run)
        first = canonical.to_canonical(trainer, initial_state(trainer, seed=run.seed))
        with after_step(STOPPED_AT, kill(signal.SIGTERM)):
            assert train(run, tmp_path)[0].step == STOPPED_AT
        four = dataclasses.replace(run, parallel=ParallelConfig(data=4))
        assert train(four, tmp_path, resume=True)[0].step == STEPS
    saved = [checkpoint(tmp_path, step)[0] for step in range(1, STEPS + 1)]
    for name in (name for name in first if not name.startswith(OPTIMIZER)):
        average = np.array(first[name])
        for step, arrays in enumerate(saved, 1):
            average = moved(average, arrays[name], step)
            np.testing.assert_array_equal(arrays[MOVING_AVERAGE + name], average, err_msg=f"{name} after step {step}")
