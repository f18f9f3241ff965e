"""Whole runs on several devices: they move between meshes, go on bit for bit, and write what their dispatch cost."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import types
from typing import Any

import jax
import numpy as np
import pytest
from tiny_run import (
    LENGTH,
    SCHEDULE,
    after_step,
    assert_same_arrays,
    checkpoint,
    experiment,
    kill,
    quick_runs,
    records,
    train,
    write_texts,
)

from deepseek_jax.parallel.mesh import ParallelConfig, make_mesh
from deepseek_jax.training import canonical, loop
from deepseek_jax.training.experiment import CheckpointConfig, EvaluationConfig
from deepseek_jax.training.opening import FORCED_BALANCE
from deepseek_jax.training.optimizer import OptimizerConfig
from deepseek_jax.training.schedules import constant
from deepseek_jax.training.step import Trainer

STEPS, ROWS = 9, 6
"""Of the runs on replicas; on eight devices two of them get an empty row."""
EXPERT_STEPS, EXPERT_ROWS = 6, 8


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Experiments on one device, on eight replicas, and with experts on two nodes of two; and a folder for runs."""
    texts = write_texts(tmp_path_factory.mktemp("texts"))

    def first_devices(config):  # so many of the eight that are there
        return make_mesh(config, jax.devices()[: math.prod(config.shape)])

    def lasting(steps, rows, **changes):
        return dataclasses.replace(SCHEDULE, total_tokens=steps * rows * LENGTH, batch_rows=constant(rows), **changes)

    with quick_runs() as patch:
        patch.setattr(loop, "make_mesh", first_devices)
        evaluation = EvaluationConfig(batch_rows=4, samples=("def ",), sample_tokens=4)
        one = experiment(
            texts,
            schedule=lasting(STEPS, ROWS, bias_rate=constant(0.001)),
            optimizer=OptimizerConfig(peak_lr=1e-2),
            parallel=ParallelConfig(),
            checkpoint=CheckpointConfig(keep_last=9),
            evaluation=evaluation,
        )
        eight = dataclasses.replace(one, parallel=ParallelConfig(data=8))
        experts = experiment(
            texts,
            schedule=lasting(EXPERT_STEPS, EXPERT_ROWS),
            parallel=ParallelConfig(node=2, expert=2, capacity=1.0, microbatch_rows=1),
            checkpoint=CheckpointConfig(every_steps=3, keep_last=9),
            evaluation=evaluation,
        )
        root = tmp_path_factory.mktemp("runs")
        yield types.SimpleNamespace(one=one, eight=eight, experts=experts, root=root)


# --- from one device to eight and back ------------------------------------------------------------------------------


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

    stop = kill(signal.SIGTERM)
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


# --- experts on several devices -------------------------------------------------------------------------------------


def test_a_run_writes_what_its_dispatch_cost_and_goes_on_bit_for_bit(runs):
    whole, parts = runs.root / "experts", runs.root / "experts.parts"
    result, printed = train(runs.experts, whole)
    assert result.status == "done"
    assert "mesh node 2 x expert 2; tokens reach experts by two_hop; optimizer state once across data ranks" in printed
    written = records(whole, "train")
    assert len(written) == EXPERT_STEPS
    layers, experts = np.shape(written[0]["load"])
    for record in written:
        room, demand = np.array(record["dispatch_room"]), np.array(record["dispatch_demand"])
        assert room.shape == demand.shape == (3,)
        assert (demand <= room).all()
        assert np.shape(record["dispatch_bytes"]) == (2,)
        assert min(record["dispatch_bytes"]) > 0
        assert np.shape(record["device_load"]) == (layers, 4)
        # Devices hold neighbouring experts: their shares are sums of the experts'.
        by_device = np.reshape(record["load"], (layers, 4, experts // 4)).sum(axis=2)
        np.testing.assert_allclose(record["device_load"], by_device, atol=1e-5)
        assert "forced_balance" not in record
    with after_step(3, kill(signal.SIGTERM)):
        assert train(runs.experts, parts)[0].status == "interrupted"
    assert train(runs.experts, parts, resume=True)[0].status == "done"
    (arrays, documents), (others, other_documents) = checkpoint(whole, EXPERT_STEPS), checkpoint(parts, EXPERT_STEPS)
    assert_same_arrays(arrays, others)
    assert documents["meta"]["room"] == other_documents["meta"]["room"]
    assert "experts of each device computed" in (whole / "report.html").read_text()


def test_forced_balance_is_even_and_cannot_be_overlooked(runs):
    config = dataclasses.replace(runs.experts, force_balanced_routing=True)
    folder = runs.root / "forced"
    _, printed = train(config, folder)
    assert FORCED_BALANCE in printed
    written = records(folder, "train")
    assert all(record["forced_balance"] for record in written)
    assert max(max(record["max_vio"]) for record in written) < 0.2
    assert written[-1]["dispatch_reruns"] == 0
    assert "FORCED BALANCE" in (folder / "report.html").read_text()
