"""Evaluations and checkpoints in a run's cost."""

from __future__ import annotations

import dataclasses

import pytest

from deepseek_jax.parallel.mesh import ParallelConfig
from deepseek_jax.planning.calibration import deepseek_job
from deepseek_jax.planning.devices import H800
from deepseek_jax.planning.job import Job
from deepseek_jax.planning.parameters import total_parameters
from deepseek_jax.planning.pauses import BYTES_PER_TOKEN, Pauses, checkpoint_seconds, evaluation_seconds
from deepseek_jax.planning.plan import Segment, cell_times, make_plan
from deepseek_jax.precision.policy import BF16
from deepseek_jax.zoo import tiny


@pytest.fixture(scope="module")
def plan():
    return make_plan(deepseek_job(), H800, 2048)


def test_an_evaluation_is_forward_passes():
    """On one device: as many as the text has sequences, each as long as the model's forward pass."""
    job = Job(model=tiny(), parallel=ParallelConfig(microbatch_rows=1), precision=BF16, length=256, rows=8)
    (stage,) = cell_times(job, H800).stages
    text = 20 * 256 * BYTES_PER_TOKEN
    assert evaluation_seconds(make_plan(job, H800), text, 4) == pytest.approx(20 * stage.forward)
    assert evaluation_seconds(make_plan(job, H800), text, 8) == pytest.approx(24 * stage.forward), "the last is filled"
    whole = dataclasses.replace(job, parallel=ParallelConfig())  # a batch is one microbatch, of 8 sequences in training
    (stage,) = cell_times(whole, H800).stages
    assert evaluation_seconds(make_plan(whole, H800), text, 4) == pytest.approx(5 * stage.forward / 2)


def test_batches_are_as_large_as_the_schedule_needs(plan):
    """128 replicas in DualPipe over 16 ranks take 32 sequences each or more, whatever the recipe says: 4096 of them, in
    M + P - 1 ticks (`docs/pipeline.md`, forward only)."""
    slowest = max(one.forward + one.forward_exchange for one in cell_times(plan.job, H800).stages)
    text = 4096 * 4096 * BYTES_PER_TOKEN
    for rows in (16, 4096):
        assert evaluation_seconds(plan, text, rows) == pytest.approx((32 + 16 - 1) * slowest)
    assert evaluation_seconds(plan, 1.5 * text, 16) == pytest.approx(2 * (32 + 16 - 1) * slowest)


def test_a_checkpoint_waits_for_the_host_and_for_a_slow_disk(plan):
    """8 bytes a parameter: the master and two moments of two. ZeRO-1 has each of them on one device. The moving average
    is in the host's memory already, and written with the rest."""
    parameters = total_parameters(plan.job.model) / 2048
    copying = checkpoint_seconds(plan, 500)
    assert copying == pytest.approx(8 * parameters / 63e9, rel=0.03)
    in_three_steps = 8 * 8 * parameters / (3 * plan.step.total)  # of a node of eight
    slow = checkpoint_seconds(plan, 1, storage=in_three_steps)
    assert slow == pytest.approx(copying + 2 * plan.step.total, rel=0.03), "the next one is due after one"
    with_average = checkpoint_seconds(plan, 1, storage=in_three_steps, average=True)
    assert with_average == pytest.approx(copying + 3.5 * plan.step.total, rel=0.03)
    replicated = dataclasses.replace(plan.job, parallel=dataclasses.replace(plan.job.parallel, zero=False))
    assert checkpoint_seconds(make_plan(replicated, H800), 500) > 1.9 * copying


def test_pauses_cost_gpu_hours(plan):
    pauses = Pauses(evaluations=10, evaluation_seconds=30.0, checkpoints=100, checkpoint_seconds=0.6)
    assert pauses.seconds == 360
    course = [Segment(1e12, 15_360)]
    more = plan.cost(course, pauses.seconds).gpu_hours - plan.cost(course).gpu_hours
    assert more == pytest.approx(2048 * 0.1)
