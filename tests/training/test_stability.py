"""The guard against losses that are not finite: it never waits by itself, and then it names the first one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from deepseek_jax.model.targets import Microbatch
from deepseek_jax.training.stability import NonFiniteGuard, NonFiniteLossError
from deepseek_jax.training.step import TrainState
from deepseek_jax.training.step_metrics import StepMetrics
from experiments.run import is_user_error

NAN, INF = float("nan"), float("inf")


def metrics(loss=1.0, grad_norm=1.0) -> StepMetrics:
    """What a step reports, of which the guard looks at two numbers."""
    values = dict.fromkeys(StepMetrics._fields, jnp.zeros(()))
    return StepMetrics(**{**values, "loss": jnp.float32(loss), "grad_norm": jnp.float32(grad_norm)})


def batch(step: int) -> Microbatch:
    return Microbatch(*(np.full((2, 5), 10 * step + i, np.int32) for i in range(4)))


@pytest.fixture
def guard(tmp_path):
    return NonFiniteGuard(epath.Path(tmp_path))


def test_finite_steps_pass_and_are_looked_at_once(guard, monkeypatch):
    waits = []
    real = jax.device_get

    def device_get(tree):
        waits.append(len(tree))
        return real(tree)

    monkeypatch.setattr(jax, "device_get", device_get)
    for step in (1, 2, 3):
        guard.watch(step, metrics(loss=3e38), batch(step))
    assert waits == [], "watching must not wait for the device"
    guard.check()
    guard.check()
    assert waits == [3, 0]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"loss": NAN}, "step 2: loss nan, gradient norm 1.0; "),
        ({"loss": INF}, "step 2: loss inf, gradient norm 1.0; "),
        ({"loss": -INF}, "step 2: loss -inf, gradient norm 1.0; "),
        ({"grad_norm": NAN}, "step 2: loss 1.0, gradient norm nan; "),
        ({"grad_norm": INF}, "step 2: loss 1.0, gradient norm inf; "),
    ],
)
def test_the_first_bad_step_is_named_and_its_batch_saved(guard, tmp_path, bad, message):
    for step in (1, 2, 3):
        guard.watch(step, metrics(**(bad if step > 1 else {})), batch(step))
    with pytest.raises(NonFiniteLossError) as error:
        guard.check()
    text = str(error.value)
    assert text.startswith(message)
    assert f"its batch is saved in {tmp_path}/nonfinite_step_2.npz" in text
    assert "\n" not in text
    assert is_user_error(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["nonfinite_step_2.npz"]
    saved = np.load(tmp_path / "nonfinite_step_2.npz")
    for name, array in batch(2)._asdict().items():
        np.testing.assert_array_equal(saved[name], array)
        assert saved[name].dtype == np.int32


def state(weight=1.0, moment=1.0) -> TrainState:
    """Parameters, biases and moments, of which the numbers stand somewhere in the middle."""
    array = lambda x, dtype=jnp.float32: jnp.ones((2, 5), dtype).at[1, 2].set(x)  # noqa: E731
    moments = {"mu": {"w": array(moment, jnp.bfloat16)}, "count": jnp.int32(3)}
    params = {"head": {"w": array(1.0)}, "dense": {"w": array(weight)}}
    return TrainState(params, {"router": array(0.0)}, moments, jnp.int32(3))


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        ({"weight": NAN}, "params.dense.w not finite after it"),
        ({"weight": -INF}, "params.dense.w not finite after it"),
        ({"moment": INF}, "opt_state.mu.w not finite after it"),
        ({"weight": INF, "moment": NAN}, "params.dense.w and 1 more not finite after it"),
    ],
)
def test_a_state_that_is_not_finite_is_the_fault_of_the_latest_step(guard, tmp_path, bad, what):
    for step in (1, 2):
        guard.watch(step, metrics(), batch(step))
    guard.check()
    guard.check_state(state(weight=3e38))
    with pytest.raises(NonFiniteLossError) as error:
        guard.check_state(state(**bad))
    path = tmp_path / "nonfinite_step_2.npz"
    assert str(error.value).startswith(f"step 2: {what}; its batch is saved in {path}, the checkpoints before it are ")
    np.testing.assert_array_equal(np.load(path)["tokens"], batch(2).tokens)


def test_the_folder_is_made_where_there_is_none_yet(tmp_path):
    """Another host may be the one that makes the run's folder, and on a disk of its own."""
    guard = NonFiniteGuard(epath.Path(tmp_path) / "runs" / "one")
    guard.watch(1, metrics(loss=NAN), batch(1))
    with pytest.raises(NonFiniteLossError, match="step 1: "):
        guard.check()
    assert (tmp_path / "runs" / "one" / "nonfinite_step_1.npz").exists()


def test_each_host_saves_its_own_rows(guard, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    guard.watch(7, metrics(loss=NAN), batch(7))
    with pytest.raises(NonFiniteLossError, match=r"nonfinite_step_7_host_3\.npz"):
        guard.check()
    assert (tmp_path / "nonfinite_step_7_host_3.npz").exists()
