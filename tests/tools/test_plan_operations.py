"""The microbenchmarks behind `tools.plan --measure`: every operation of the planner has one."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import pytest

from deepseek_jax import zoo
from deepseek_jax.config import ConfigError
from deepseek_jax.parallel.mesh import ParallelConfig
from deepseek_jax.planning.job import Job
from deepseek_jax.planning.plan import step_time
from deepseek_jax.planning.roofline import Roofline
from deepseek_jax.precision.policy import BF16, FLOAT32
from deepseek_jax.training.optimizer import OptimizerConfig
from tools import plan_measure, plan_operations

TWO_MOE_LAYERS = dataclasses.replace(zoo.tiny(), num_layers=3)


@pytest.fixture(scope="module")
def job():
    return Job(model=TWO_MOE_LAYERS, parallel=ParallelConfig(), precision=FLOAT32, length=32, rows=2)


@pytest.fixture(scope="module")
def device(job):
    with pytest.MonkeyPatch.context() as quickly:
        quickly.setattr(plan_operations, "REPEATS", 3)
        quickly.setattr(plan_operations, "LEAST_SECONDS", 0.002)
        return plan_operations.measured_device(job, OptimizerConfig())


def operations(job, device):
    roofline = Roofline(job, device)
    layers = [one for dense in (True, False) for one in (*roofline.layer(dense=dense), *roofline.copies(dense=dense))]
    return (*layers, *roofline.mtp_join(), *roofline.head(), *roofline.embedding())


def test_every_operation_of_the_planner_is_measured(job, device):
    """But copies of weights, which go at the rate of large arrays. And nothing is measured that no plan has."""
    counted = {(op.name, op.of) for op in operations(job, device) if op.name != "slicing weights"}
    assert set(device.efficiency.measured) == counted | {("optimizer", "W")}


def test_a_plan_is_made_of_what_was_measured(job, device):
    """Twice the seconds of each operation are twice the step's, less what copies of weights take."""
    measured = {key: 2 * value for key, value in device.efficiency.measured.items()}
    efficiency = dataclasses.replace(device.efficiency, measured=measured)
    slower = dataclasses.replace(device, efficiency=efficiency, memory_bandwidth=device.memory_bandwidth / 2)
    assert step_time(job, slower).total == pytest.approx(2 * step_time(job, device).total)


def test_a_gradient_that_computes_again_costs_its_forward_pass_too(monkeypatch):
    """Of a long chain of products, whose backward pass without it is as long as its forward pass."""
    monkeypatch.setattr(plan_operations, "REPEATS", 5)
    x, w = jnp.full((256, 256), 0.01), jnp.eye(256)

    def chain(x, w):
        for _ in range(4):
            x = jnp.sin(x @ w)
        return x

    forward, kept = plan_operations.both_ways(chain, x, fixed=(w,))
    _, again = plan_operations.both_ways(chain, x, fixed=(w,), again=True)
    assert 0.4 < (again - kept) / forward < 2.5


def test_the_report_has_every_operation(device):
    text = plan_measure.report([plan_measure.Measured("tiny.pretrain", 1.3, 1.0, device)])
    assert "+30.0%" in text
    assert "missed" in text
    for name, _ in device.efficiency.measured:
        assert f"| {name} " in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"precision": BF16}, "in float32, not as 1 in bfloat16"),
        ({"parallel": ParallelConfig(data=2)}, "as one device in float32, not as 2"),
    ],
)
def test_another_job_is_refused_before_anything_is_measured(job, changes, words):
    with pytest.raises(ConfigError, match=words):
        plan_operations.measured_device(dataclasses.replace(job, **changes), OptimizerConfig())
