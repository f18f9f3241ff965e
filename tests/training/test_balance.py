"""The router bias update and MaxVio, by hand (section 2.1.2; arXiv 2408.15664)."""

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.training.balance import bias_step, max_violation, update_bias


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        ([2, 4, 6, 4], [1, 0, -1, 0]),  # mean 4
        ([1, 2, 3, 4], [1, 1, -1, -1]),  # mean 2.5, not an integer: 2 is below it, 3 above
        ([3, 3, 3, 4], [1, 1, 1, -1]),  # mean 3.25
        ([4, 4, 4, 3], [-1, -1, -1, 1]),  # mean 3.75
        ([5, 5, 5, 5], [0, 0, 0, 0]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),
        ([0, 0, 0, 1], [1, 1, 1, -1]),
    ],
)
def test_direction_by_hand(load, expected):
    assert bias_step(jnp.array(load, jnp.int32)).tolist() == expected


def test_large_counts_are_compared_exactly():
    # 2^25 + 1 equals 2^25 in float32, and 4 * 2^29 overflows int32: the mean of both rows is exact all the same.
    big = 2**25
    assert bias_step(jnp.array([big + 1, big, big - 1, big], jnp.int32)).tolist() == [-1, 0, 1, 0]
    assert bias_step(jnp.array([big + 1, big, big, big], jnp.int32)).tolist() == [-1, 1, 1, 1]
    # A total just below 2^31.
    near = 2**29 - 1
    assert bias_step(jnp.array([near, near, near, near + 1], jnp.int32)).tolist() == [1, 1, 1, -1]
    assert bias_step(jnp.array([2**31 - 1, 0, 0, 0], jnp.int32)).tolist() == [-1, 1, 1, 1]


def test_update_moves_each_layer_by_its_own_load():
    bias = jnp.array([[0.5, 0.5], [0.0, -0.25]], jnp.float32)
    load = jnp.array([[3, 1], [2, 2]], jnp.int32)
    moved = update_bias(bias, load, jnp.float32(0.125))
    np.testing.assert_array_equal(moved, [[0.375, 0.625], [0.0, -0.25]])
    np.testing.assert_array_equal(update_bias(bias, load, jnp.float32(0)), bias)


def test_the_bias_is_not_recentred():
    # Three below the mean and one above: the sum of the biases grows, as DeepSeek's has.
    moved = update_bias(jnp.zeros(4), jnp.array([1, 1, 1, 9]), jnp.float32(0.001))
    np.testing.assert_allclose(moved.sum(), 0.002, rtol=1e-6)


def test_max_violation_by_hand():
    load = jnp.array([[2, 4, 6, 4], [8, 0, 0, 0], [5, 5, 5, 5], [0, 0, 0, 0]], jnp.int32)
    np.testing.assert_allclose(max_violation(load), [0.5, 3.0, 0.0, 0.0], rtol=1e-6)
