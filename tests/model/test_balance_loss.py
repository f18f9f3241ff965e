"""The sequence-wise balance loss, equations 17-20."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import MoEConfig
from deepseek_jax.model.router import sequence_balance_loss

CONFIG = MoEConfig(num_experts=5, experts_per_token=2, num_groups=1, groups_per_token=1)


def top_k(row, k):
    return sorted(range(len(row)), key=lambda e: (-row[e], e))[:k]


def fractions(scores, experts=None):
    """f of equation 18 for one sequence of scores `[T, E]`; `experts` `[T, K]` replaces the top-K of the scores."""
    tokens, num_experts = scores.shape
    k = CONFIG.experts_per_token
    counts = np.zeros(num_experts)
    for t in range(tokens):
        for e in top_k(scores[t], k) if experts is None else experts[t]:
            counts[e] += 1
    return counts * num_experts / (k * tokens)


def loss(scores, f):
    """Σ_i f_i P_i of equation 17, with P of equations 19 and 20."""
    tokens, num_experts = scores.shape
    total = 0.0
    for i in range(num_experts):
        p = sum(scores[t, i] / sum(scores[t]) for t in range(tokens)) / tokens
        total += f[i] * p
    return total


@pytest.fixture(scope="module")
def scores():
    return np.random.default_rng(0).uniform(0.05, 0.95, (3, 7, 5))


def test_value_and_gradient_equal_equations_17_to_20(scores):
    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(lambda s: sequence_balance_loss(s, None, CONFIG))(jnp.asarray(scores))
    np.testing.assert_allclose(value, sum(loss(row, fractions(row)) for row in scores), rtol=1e-12)
    # The gradient flows through P only: finite differences with f frozen.
    for index in np.ndindex(scores.shape):
        moved = [scores.copy(), scores.copy()]
        moved[0][index] += 1e-6
        moved[1][index] -= 1e-6
        row = index[0]
        up, down = (loss(m[row], fractions(scores[row])) for m in moved)
        np.testing.assert_allclose(gradient[index], (up - down) / 2e-6, atol=1e-8)


def test_uniform_routing_of_uniform_scores_costs_one():
    # f_i = 1 and Σ P_i = 1, the least that Σ f_i P_i can be for equal scores.
    experts = jnp.array([[[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]]])
    np.testing.assert_allclose(sequence_balance_loss(jnp.full((1, 5, 5), 0.5), experts, CONFIG), 1, rtol=1e-6)


def test_fractions_can_come_from_the_routed_experts(scores):
    experts = np.random.default_rng(1).permuted(np.tile(np.arange(5), (3, 7, 1)), axis=-1)[..., :2]
    with jax.enable_x64(True):
        routed = float(sequence_balance_loss(jnp.asarray(scores), jnp.asarray(experts), CONFIG))
        raw = float(sequence_balance_loss(jnp.asarray(scores), None, CONFIG))
    expected = sum(loss(row, fractions(row, chosen)) for row, chosen in zip(scores, experts, strict=True))
    np.testing.assert_allclose(routed, expected, rtol=1e-12)
    assert abs(routed - raw) > 1e-3


def test_padding_counts_in_neither_fraction_nor_probability(scores):
    lengths = [7, 4, 0]
    valid = np.arange(7) < np.array(lengths)[:, None]
    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(lambda s: sequence_balance_loss(s, None, CONFIG, jnp.asarray(valid)))(
            jnp.asarray(scores)
        )
    kept = [row[:n] for row, n in zip(scores, lengths, strict=True) if n]
    np.testing.assert_allclose(value, sum(loss(row, fractions(row)) for row in kept), rtol=1e-12)
    np.testing.assert_array_equal(np.asarray(gradient)[~valid], 0)
    assert (np.asarray(gradient)[valid] != 0).any()
