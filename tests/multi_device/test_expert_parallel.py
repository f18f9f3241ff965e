"""Every mesh and every portable dispatcher take the steps of one device: losses, gradients, loads and biases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from small_model import gradient_descent, hyperparameters, initial_state, packed, quickly, small, trainer

from deepseek_jax.parallel.mesh import ParallelConfig
from deepseek_jax.parallel.sharding import BATCH_SPEC
from deepseek_jax.tree import flatten, unflatten

CONFIG = small(num_layers=2, moe={"num_experts": 16, "experts_per_token": 4})
STEPS, LENGTH, RATE = 10, 12, 0.2

MESHES = {
    "replicas": (ParallelConfig(data=8), None),
    "experts": (ParallelConfig(expert=8), "all_to_all"),
    "experts, two hops": (ParallelConfig(expert=8), "two_hop"),
    "replicas of experts": (ParallelConfig(data=2, expert=4), "all_to_all"),
    "many replicas of experts": (ParallelConfig(data=4, expert=2), "all_to_all"),
    "nodes": (ParallelConfig(node=2, expert=4), "all_to_all"),
    "nodes, two hops": (ParallelConfig(node=2, expert=4), "two_hop"),
}


def routing(kind: str) -> np.ndarray:
    """A router bias `[E]` that makes routing random, or the same for all tokens, or leaves most experts empty."""
    bias = np.zeros(16)
    chosen = {"random": range(16), "skewed": (0, 1, 4, 5), "empty": (0, 2, 3, 9, 10)}[kind]
    bias[[e for e in range(16) if e not in chosen]] = -100.0
    return bias


def batches():
    """Rows of packed documents with padding, other ones on each device; the last batch is mostly empty."""
    documents = [[13], [5, 8], [4, 4], [3, 10], [6], [1, 12], [2], [9, 3]]
    for step in range(STEPS):
        rows = documents[step % 8 :] + documents[: step % 8]
        yield packed(CONFIG, rows if step < STEPS - 1 else [[7], *[[]] * 7], length=LENGTH, seed=step % 2)


@functools.cache
def runner(mesh: str | None, dtype, optimizer=gradient_descent, **changes):
    parallel, dispatcher = MESHES[mesh] if mesh else (ParallelConfig(), None)
    return quickly(
        trainer(
            CONFIG,
            parallel=parallel,
            optimizer=optimizer,
            compute_dtype=dtype,
            dispatcher=dispatcher,
            balance_weight=0.01,
            clip_norm=1.0,
            **changes,
        )
    )


@functools.cache
def course(mesh: str | None, kind: str, dtype=jnp.float64, optimizer=gradient_descent):
    """Ten steps: metrics of each, and the last state."""
    run = runner(mesh, dtype, optimizer)
    state = initial_state(run, dtype)
    bias = {name: jnp.broadcast_to(routing(kind), leaf.shape) for name, leaf in flatten(state.router_bias).items()}
    placed = jax.tree.map(
        lambda b, old: jax.device_put(b.astype(dtype), old.sharding), unflatten(bias), state.router_bias
    )
    state = state.__class__(state.params, placed, state.opt_state, state.step)
    hyper = hyperparameters(learning_rate=RATE, bias_rate=0.01, dtype=dtype)
    seen = []
    for batch in batches():
        state, metrics = run.step(state, jax.device_put(batch, NamedSharding(run.mesh, BATCH_SPEC)), hyper)
        seen.append(jax.tree.map(np.asarray, metrics))
    return seen, jax.tree.map(np.asarray, state)


@pytest.mark.parametrize("kind", ["random", "skewed", "empty"])
@pytest.mark.parametrize("mesh", MESHES)
def test_float64_steps_equal_those_of_one_device(mesh, kind):
    """Loads and biases exactly, losses, norms and parameters (so gradients) to 1e-9."""
    with jax.enable_x64(True):
        one, one_state = course(None, kind)
        many, many_state = course(mesh, kind)
    for step, (expected, metrics) in enumerate(zip(one, many, strict=True)):
        np.testing.assert_array_equal(metrics.load, expected.load, err_msg=f"step {step}")
        np.testing.assert_array_equal(metrics.received.sum(axis=1), metrics.load.sum(axis=1), err_msg=f"step {step}")
        for name in ("loss", "loss_main", "loss_mtp", "loss_balance", "grad_norm"):
            value, wanted = getattr(metrics, name), getattr(expected, name)
            np.testing.assert_allclose(value, wanted, rtol=1e-9, err_msg=f"{name} of step {step}")
    assert one[-3].loss < one[0].loss - 0.1
    for name, bias in flatten(one_state.router_bias).items():
        np.testing.assert_array_equal(flatten(many_state.router_bias)[name], bias, err_msg=name)
    for name, value in flatten(one_state.params).items():
        np.testing.assert_allclose(flatten(many_state.params)[name], value, rtol=1e-9, atol=1e-12, err_msg=name)
    assert many_state.step == STEPS
