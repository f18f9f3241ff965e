"""Whole runs with experts on several devices: what they write, and that they go on bit for bit."""

from __future__ import annotations

import dataclasses
import math
import signal
import types

import jax
import numpy as np
import pytest
from tiny_run import (
    LENGTH,
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
from deepseek_jax.training import loop
from deepseek_jax.training.experiment import CheckpointConfig, EvaluationConfig
from deepseek_jax.training.opening import FORCED_BALANCE
from deepseek_jax.training.schedules import constant

STEPS, ROWS = 6, 8


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One recipe on two nodes of two devices, and a folder for its runs."""
    texts = write_texts(tmp_path_factory.mktemp("texts"))

    def first_devices(config):
        return make_mesh(config, jax.devices()[: math.prod(config.shape)])

    with quick_runs() as patch:
        patch.setattr(loop, "make_mesh", first_devices)
        base = experiment(texts)
        schedule = dataclasses.replace(base.schedule, total_tokens=STEPS * ROWS * LENGTH, batch_rows=constant(ROWS))
        base = dataclasses.replace(
            base,
            schedule=schedule,
            parallel=ParallelConfig(node=2, expert=2, capacity=1.0, microbatch_rows=1),
            checkpoint=CheckpointConfig(every_steps=3, keep_last=9),
            logging=dataclasses.replace(base.logging, every_steps=1),
            evaluation=EvaluationConfig(batch_rows=4, samples=("def ",), sample_tokens=4),
        )
        yield types.SimpleNamespace(base=base, root=tmp_path_factory.mktemp("runs"))


def test_a_run_writes_what_its_dispatch_cost_and_goes_on_bit_for_bit(runs):
    whole, parts = runs.root / "whole", runs.root / "parts"
    result, printed = train(runs.base, whole)
    assert result.status == "done"
    assert "mesh node 2 x expert 2; tokens reach experts by two_hop; optimizer state once across data ranks" in printed
    written = records(whole, "train")
    assert len(written) == STEPS
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
        assert train(runs.base, parts)[0].status == "interrupted"
    assert train(runs.base, parts, resume=True)[0].status == "done"
    (arrays, documents), (others, other_documents) = checkpoint(whole, STEPS), checkpoint(parts, STEPS)
    assert_same_arrays(arrays, others)
    assert documents["meta"]["room"] == other_documents["meta"]["room"]
    assert "experts of each device computed" in (whole / "report.html").read_text()


def test_forced_balance_is_even_and_cannot_be_overlooked(runs):
    config = dataclasses.replace(runs.base, force_balanced_routing=True)
    folder = runs.root / "forced"
    _, printed = train(config, folder)
    assert FORCED_BALANCE in printed
    written = records(folder, "train")
    assert all(record["forced_balance"] for record in written)
    assert max(max(record["max_vio"]) for record in written) < 0.2
    assert written[-1]["dispatch_reruns"] == 0
    assert "FORCED BALANCE" in (folder / "report.html").read_text()
