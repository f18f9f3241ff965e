"""Runs in FP8: stopped and resumed bit for bit, and gone on with under another precision."""

from __future__ import annotations

import dataclasses
import signal

import numpy as np
import pytest
from tiny_run import (
    STEPS,
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

from deepseek_jax.precision.policy import FLOAT32, Fp8Config, PrecisionPolicy

IN_FP8 = PrecisionPolicy(compute="float32", fp8=Fp8Config())
STOPPED = 7


@pytest.fixture(scope="module", autouse=True)
def base(tmp_path_factory):
    """A run of twenty steps in FP8, with MTP, bias updates, a growing batch and moments in BF16."""
    with quick_runs():
        yield experiment(write_texts(tmp_path_factory.mktemp("texts")), precision=IN_FP8)


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """Its folder, never stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(base, folder)
    return folder


def stopped(run, folder):
    """The folder of a run that was stopped after a few steps."""
    with after_step(STOPPED, kill(signal.SIGTERM)):
        assert train(run, folder)[0].status == "interrupted"
    return folder


def losses(folder):
    return [line["loss"] for line in records(folder, "train")]


def test_a_stopped_run_goes_on_bit_for_bit(base, whole, tmp_path):
    """Nothing of FP8 is saved: the quantised weights of a step are made of the masters."""
    folder = stopped(base, tmp_path / "stopped")
    train(base, folder, resume=True)
    assert records(folder, "train") == records(whole, "train")
    assert_same_arrays(checkpoint(folder, STEPS)[0], checkpoint(whole, STEPS)[0])
    assert not any("codes" in name or "scales" in name for name in checkpoint(whole, STEPS)[0])


def test_a_run_goes_on_under_another_precision(base, whole, tmp_path):
    """A checkpoint has the same arrays under each: the first steps are in float32, the others in FP8."""
    wide = dataclasses.replace(base, precision=FLOAT32)
    folder = stopped(wide, tmp_path / "changed")
    arrays, _ = checkpoint(folder, STOPPED)
    train(base, folder, resume=True)
    assert arrays.keys() == checkpoint(whole, STEPS)[0].keys()
    in_float32 = train(wide, tmp_path / "float32")[0] and losses(tmp_path / "float32")
    mixed = losses(folder)
    assert mixed[:STOPPED] == in_float32[:STOPPED]
    # The first step after the change sees the same weights, rounded to E4M3.
    assert mixed[STOPPED] != in_float32[STOPPED]
    np.testing.assert_allclose(mixed[STOPPED], in_float32[STOPPED], rtol=1e-2)
    assert mixed[STOPPED:] != losses(whole)[STOPPED:]
    assert mixed[-1] < mixed[0]
