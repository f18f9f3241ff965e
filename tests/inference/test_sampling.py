import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.inference.sampling import Sampling, draw, greedy, top_p_mask

# Few distinct values, so that ties are common; of one size, so that one program is compiled.
_logits = st.lists(st.integers(-8, 8).map(lambda i: i / 2), min_size=9, max_size=9)


_mask = jax.jit(top_p_mask)


@given(logits=_logits, top_p=st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_set_with_enough_mass(logits, top_p):
    mask = np.asarray(_mask(jnp.asarray(logits, jnp.float32), top_p))
    p = np.exp(np.asarray(logits, np.float64))
    p /= p.sum()
    assert p[mask].sum() >= top_p - 1e-5
    # Smallest: without its least likely member it would not do; a set of most likely tokens: none left out is likelier.
    assert top_p == 1 or p[mask].sum() - p[mask].min() < top_p + 1e-5
    assert mask.all() or p[mask].min() >= p[~mask].max() - 1e-12
    # Of equals the lower ids are kept.
    cut = np.isclose(p, p[mask].min(), rtol=1e-9)
    assert (np.diff(mask[cut].astype(int)) <= 0).all()


@pytest.mark.parametrize(("top_p", "kept"), [(0.49, [1]), (0.6, [1, 2]), (0.85, [0, 1, 2]), (1.0, [0, 1, 2, 3])])
def test_top_p_by_hand(top_p, kept):
    logits = jnp.log(jnp.array([0.2, 0.5, 0.25, 0.05]))
    assert np.flatnonzero(top_p_mask(logits, top_p)).tolist() == kept


def test_top_p_of_one_keeps_what_rounding_would_lose():
    """In float32 the first token alone has probability 1, yet nothing is cut off."""
    assert top_p_mask(jnp.array([0.0, -30.0, -40.0]), 1.0).all()


def test_draws_follow_the_distribution_within_the_kept_set():
    p = jnp.array([0.2, 0.5, 0.25, 0.05])
    keys = jax.random.split(jax.random.key(0), 4000)
    logits = jnp.broadcast_to(jnp.log(p), (4000, 4))
    frequencies = np.bincount(draw(logits, keys, jnp.float32(1), jnp.float32(0.9)), minlength=4) / 4000
    np.testing.assert_allclose(frequencies, np.array([0.2, 0.5, 0.25, 0]) / 0.95, atol=0.03)
    # At temperature 1/2 probabilities are squared, then top-p is taken of those: 0.04, 0.25, 0.0625, 0.0025.
    frequencies = np.bincount(draw(logits, keys, jnp.float32(0.5), jnp.float32(0.85)), minlength=4) / 4000
    np.testing.assert_allclose(frequencies, np.array([0, 0.25, 0.0625, 0]) / 0.3125, atol=0.03)


@pytest.mark.parametrize("temperature", [1e-30, 1e-37])
def test_a_tiny_temperature_draws_the_most_likely_token(temperature):
    """Logits of 40 over 1e-37 are past the largest float32; the answer still is the largest, or one of equals."""
    logits = jnp.array([[3.0, 40.0, 7.0, -2.0], [-5.0, -4.0, -7.0, -4.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    for top_p in (0.9, 1.0):
        drawn = draw(logits, keys, jnp.float32(temperature), jnp.float32(top_p)).tolist()
        assert drawn[0] == 1
        assert drawn[1] in (1, 3)


@pytest.mark.parametrize(("temperature", "expected"), [(0.0, True), (1e-50, True), (1e-40, True), (1e-37, False)])
def test_what_float32_cannot_tell_from_zero_is_greedy(temperature, expected):
    """1e-50 is 0 in float32, and 1e-40 is subnormal, which a device may take for 0."""
    assert Sampling(temperature=temperature).greedy is expected


def test_greedy_takes_the_first_of_equals():
    assert greedy(jnp.array([[0.0, 2.0, 2.0], [3.0, 1.0, 2.0]])).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", -0.1), ("temperature", float("nan")), ("top_p", 0.0), ("seed", -1)]
)
def test_bad_values_are_named(field, value):
    with pytest.raises(ValueError, match=rf"^sampling\.{field} must be .*, not {value}$"):
        Sampling(**{field: value})
