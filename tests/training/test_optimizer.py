"""AdamW against optax's, what decays, and the dtype of the moments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_model import small

from deepseek_jax.config import ConfigError
from deepseek_jax.model.parameters import parameter_specs
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.training.optimizer import OptimizerConfig, adamw, map_moments
from deepseek_jax.tree import flatten, map_leaves

MODEL = Transformer(small())
SPECS = parameter_specs(MODEL)
LEARNING_RATE = 1e-2


def draw(seed: int):
    rng = np.random.default_rng(seed)
    return map_leaves(lambda spec: jnp.asarray(rng.normal(size=spec.shape), jnp.float32), SPECS)


def moments(state, params) -> dict:
    """The parts of an optimizer state that are shaped like the parameters, by path."""
    found = {}
    map_moments(lambda name, part: found.update({name: part}), state, params, other=lambda name, leaf: leaf)
    return found


def run(optimizer, learning_rate: float, steps: int = 5):
    """Five steps from the same parameters with the same gradients."""
    params = draw(0)
    state = optimizer.init(params)
    for step in range(steps):
        updates, state = optimizer.update(draw(1 + step), state, params)
        params = map_leaves(lambda p, u: p - learning_rate * u, params, updates)
    return params, state


def test_equals_optax_adamw():
    config = OptimizerConfig(beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1)
    ours, _ = run(adamw(config, SPECS), LEARNING_RATE)
    mask = map_leaves(lambda spec: len(spec.shape) > 1, SPECS)
    # optax's updates are already -learning_rate times the direction.
    reference = optax.adamw(LEARNING_RATE, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=mask)
    expected, _ = run(reference, -1.0)
    for name, value in flatten(ours).items():
        np.testing.assert_allclose(value, flatten(expected)[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_defaults_are_the_papers():
    config = OptimizerConfig()
    constants = (config.peak_lr, config.beta1, config.beta2, config.weight_decay, config.clip_norm)
    assert constants == (2.2e-4, 0.9, 0.95, 0.1, 1.0)


def test_decay_moves_matrices_only():
    optimizer = adamw(OptimizerConfig(weight_decay=0.5), SPECS)
    params = draw(0)
    zeros = map_leaves(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    decayed = set()
    for name, update in flatten(updates).items():
        value = flatten(params)[name]
        np.testing.assert_array_equal(update, 0.5 * value if value.ndim > 1 else 0 * value, err_msg=name)
        decayed |= {name} if value.ndim > 1 else set()
    assert not any("norm" in name for name in decayed)
    assert {"embedding.weight", "head.weight", "moe.ffn.experts.down", "moe.ffn.router.weight"} <= decayed
    assert not any("bias" in name for name in flatten(params))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_both_moments_are_stored_in_the_chosen_dtype(dtype):
    config = OptimizerConfig(moment_dtype=dtype)
    params, state = run(adamw(config, SPECS), LEARNING_RATE, steps=2)
    parts = moments(state, params)
    assert set(parts) == {"0.mu", "0.nu"}
    for tree in parts.values():
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(dtype)}
    # The second step's moment is the rounded first one's, moved on in float32 and rounded again.
    first, second = (flatten(draw(seed))["head.weight"] for seed in (1, 2))
    rounded = (0.1 * first).astype(dtype).astype(jnp.float32)
    expected = (0.9 * rounded + 0.1 * second).astype(dtype)
    np.testing.assert_allclose(
        flatten(parts["0.mu"])["head.weight"].astype(jnp.float32), expected.astype(jnp.float32), rtol=1e-2, atol=1e-6
    )
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_bfloat16_moments_stay_close_to_float32():
    params, _ = run(adamw(OptimizerConfig(moment_dtype="bfloat16"), SPECS), LEARNING_RATE)
    exact, _ = run(adamw(OptimizerConfig(), SPECS), LEARNING_RATE)
    apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params, exact)
    assert 0 < max(jax.tree.leaves(apart)) < 0.1 * 5 * LEARNING_RATE


def test_moments_can_be_mapped_by_name():
    params = draw(0)
    state = adamw(OptimizerConfig(), SPECS).init(params)
    mapped = map_moments(lambda name, part: name, state, params, other=lambda name, leaf: name)
    assert (mapped[0].mu, mapped[0].nu, mapped[0].count) == ("0.mu", "0.nu", "optimizer.0.count")


@pytest.mark.parametrize("field", [{"beta1": 1.0}, {"clip_norm": 0.0}, {"moment_dtype": "float16"}, {"peak_lr": -1.0}])
def test_bad_constants_name_the_field(field):
    with pytest.raises(ConfigError, match=f"optimizer.{next(iter(field))} must"):
        OptimizerConfig(**field)
