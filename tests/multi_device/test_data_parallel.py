"""One and eight data-parallel devices take the same steps."""

import jax
import jax.numpy as jnp
import numpy as np
from small_model import gradient_descent, hyperparameters, initial_state, packed, run_step, small, trainer

from deepseek_jax.training.optimizer import OptimizerConfig
from deepseek_jax.tree import flatten

CONFIG = small()
STEPS = 10
LENGTH = 12


def batches():
    """Rows of packed documents with padding, whose real tokens differ from device to device."""
    for step in range(STEPS):
        documents = [[13], [5, 8], [4, 4], [3, 10], [6], [1, 12], [2], [9, 3]]
        yield packed(CONFIG, documents[step % 8 :] + documents[: step % 8], length=LENGTH, seed=step % 2)


def course(count: int, dtype, optimizer, learning_rate: float):
    """Ten steps on `count` devices: metrics of each, and the last state."""
    runner = trainer(
        CONFIG,
        devices=jax.devices()[:count],
        optimizer=optimizer,
        compute_dtype=dtype,
        balance_weight=0.01,
        clip_norm=1.0,
    )
    state, seen = initial_state(runner, dtype), []
    hyper = hyperparameters(learning_rate=learning_rate, bias_rate=0.01, dtype=dtype)
    for batch in batches():
        state, metrics = run_step(runner, state, batch, hyper)
        seen.append(jax.tree.map(np.asarray, metrics))
    return seen, jax.tree.map(np.asarray, state)


def test_float64_steps_agree_to_rounding():
    """Loads and biases exactly, losses and parameters (so gradients) to 1e-9."""
    with jax.enable_x64(True):
        (one, one_state), (eight, eight_state) = (course(n, jnp.float64, gradient_descent, 0.2) for n in (1, 8))
    for step, (expected, metrics) in enumerate(zip(one, eight, strict=True)):
        np.testing.assert_array_equal(metrics.load, expected.load, err_msg=f"step {step}")
        for name in ("loss", "loss_main", "loss_mtp", "loss_balance", "grad_norm"):
            value, wanted = getattr(metrics, name), getattr(expected, name)
            np.testing.assert_allclose(value, wanted, rtol=1e-9, err_msg=f"{name} of step {step}")
    assert one[-2].loss < one[0].loss - 0.1
    for name, bias in flatten(one_state.router_bias).items():
        np.testing.assert_array_equal(flatten(eight_state.router_bias)[name], bias, err_msg=name)
    for name, value in flatten(one_state.params).items():
        np.testing.assert_allclose(flatten(eight_state.params)[name], value, rtol=1e-9, atol=1e-12, err_msg=name)


def test_float32_losses_of_adamw_agree():
    optimizer = OptimizerConfig().make
    (one, _), (eight, _) = (course(n, jnp.float32, optimizer, 0.01) for n in (1, 8))
    losses = np.array([[float(m.loss) for m in seen] for seen in (one, eight)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert (losses[:, -2] < losses[:, 0] - 0.1).all()


def test_initial_weights_do_not_depend_on_the_mesh():
    one, many = (trainer(CONFIG, devices=jax.devices()[:n]).params_layout.initial(3) for n in (1, 4))
    for name, value in flatten(one).items():
        np.testing.assert_array_equal(flatten(many)[name], value, err_msg=name)
