"""A run changes its number of devices on the way, from one to eight and back, and hardly notices."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import types
from typing import Any

import jax
import numpy as np
import pytest
from tiny_run import (
    LENGTH,
    after_step,
    assert_same_arrays,
    checkpoint,
    experiment,
    quick_runs,
    records,
    train,
    write_texts,
)

from deepseek_jax.parallel.mesh import ParallelConfig, make_mesh
from deepseek_jax.training import canonical, loop
from deepseek_jax.training.experiment import CheckpointConfig, EvaluationConfig
from deepseek_jax.training.optimizer import OptimizerConfig
from deepseek_jax.training.schedules import constant
from deepseek_jax.training.step import Trainer

ROWS = 6
"""On eight devices two of them get an empty row."""
STEPS = 9


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory):
    """Experiments by number of devices; each runs on so many of the eight that are there."""
    texts = write_texts(tmp_path_factory.mktemp("texts"))

    def first_devices(config):
        return make_mesh(config, jax.devices()[: math.prod(config.shape)])

    with quick_runs() as patch:
        patch.setattr(loop, "make_mesh", first_devices)
        base = experiment(texts)
        schedule = dataclasses.replace(
            base.schedule, total_tokens=STEPS * ROWS * LENGTH, batch_rows=constant(ROWS), bias_rate=constant(0.001)
        )
        base = dataclasses.replace(
            base,
            schedule=schedule,
            optimizer=OptimizerConfig(peak_lr=1e-2),
            checkpoint=CheckpointConfig(keep_last=9),
            evaluation=EvaluationConfig(batch_rows=4, samples=("def ",), sample_tokens=4),
        )
        one, eight = (dataclasses.replace(base, parallel=ParallelConfig(data=n)) for n in (1, 8))
        yield types.SimpleNamespace(one=one, eight=eight, root=tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(runs):
    """The uninterrupted run, on one device."""
    train(runs.one, runs.root / "whole")
    return runs.root / "whole"


@pytest.fixture(scope="module")
def moved(runs):
    """Three steps on one device, three on eight, the rest on one; and the state that each part began with."""
    folder = runs.root / "moved"
    began: dict[Any, Any] = {}
    real = Trainer.step

    def step(self, state, batch, hyper):
        number = int(state.step)
        if number in (3, 6):
            arrays = canonical.to_canonical(self, state)
            began[number] = {name: np.array(array) for name, array in arrays.items()}
            began[number, "devices"] = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)}
        return real(self, state, batch, hyper)

    def stop(state):
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with after_step(3, stop):
            assert train(runs.one, folder)[0].step == 3
        with after_step(6, stop):
            assert train(runs.eight, folder, resume=True)[0].step == 6
        assert train(runs.one, folder, resume=True)[0].status == "done"
    return types.SimpleNamespace(folder=folder, began=began)


@pytest.mark.parametrize(("step", "devices"), [(3, 8), (6, 1)])
def test_the_state_is_bit_exact_at_each_switch(moved, step, devices):
    """Weights, biases, moments and count: as they were saved, on the devices that go on."""
    saved, _ = checkpoint(moved.folder, step)
    assert moved.began[step, "devices"] == {devices}
    assert_same_arrays(moved.began[step], saved)


def test_the_losses_are_those_of_the_uninterrupted_run(whole, moved):
    lines, expected = records(moved.folder, "train"), records(whole, "train")
    assert [line["step"] for line in lines] == [line["step"] for line in expected] == list(range(1, STEPS + 1))
    assert lines[:3] == expected[:3]
    for name in ("loss", "loss_main", "loss_mtp", "loss_balance"):
        np.testing.assert_allclose([x[name] for x in lines], [x[name] for x in expected], rtol=1e-5, err_msg=name)
    assert [line["load"] for line in lines] == [line["load"] for line in expected], "every token chose as it did"
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.5


def test_the_data_and_the_biases_end_where_they_would_have(whole, moved):
    (arrays, documents), (expected, expected_documents) = checkpoint(moved.folder, STEPS), checkpoint(whole, STEPS)
    assert documents["data"] == expected_documents["data"]
    for name, array in expected.items():
        if name.endswith("router.bias"):
            np.testing.assert_array_equal(arrays[name], array, err_msg=name)


def test_eight_devices_evaluate_speak_and_report_as_one(runs, whole):
    """The whole run on eight devices, to its last word."""
    folder = runs.root / "eight"
    result, printed = train(runs.eight, folder)
    ours, theirs = (json.loads((f / "result.json").read_text()) for f in (folder, whole))
    np.testing.assert_allclose(ours["heldout_bits_per_byte"], theirs["heldout_bits_per_byte"], rtol=1e-5)
    assert result.heldout_bits_per_byte == ours["heldout_bits_per_byte"]
    assert ours["parameters"] == theirs["parameters"]
    greedy = [json.loads((f / "samples.jsonl").read_text().splitlines()[0])["text"] for f in (folder, whole)]
    assert greedy[0] == greedy[1]
    assert (folder / "report.html").exists()
    assert " x cpu" in printed
    losses, expected = ([line["loss"] for line in records(f, "train")] for f in (folder, whole))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
