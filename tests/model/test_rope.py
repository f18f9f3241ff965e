"""Rotary embedding and YaRN: the constants of DeepSeek-V3, and what rotation means."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import zoo
from deepseek_jax.config import AttentionConfig, YarnConfig
from deepseek_jax.model.rope import apply_rope, rope_frequencies, rope_tables, softmax_scale, yarn_mscale, yarn_ramp

V3_LONG = zoo.deepseek_v3(long_context=True).attention
SMALL = AttentionConfig(qk_rope_head_dim=8)
INTERLEAVED = np.array([0, 2, 4, 6, 1, 3, 5, 7])
"""Where each half-split dimension sits in the published layout, whose neighbours are pairs."""


def test_yarn_ramp_of_v3():
    assert yarn_ramp(YarnConfig(), 64, 10_000.0) == (10, 23)


def test_softmax_scales():
    assert softmax_scale(V3_LONG) == pytest.approx(0.135234, abs=5e-7)
    assert softmax_scale(zoo.deepseek_v3().attention) == pytest.approx(192**-0.5, rel=1e-12)
    lite = zoo.deepseek_v2_lite(long_context=True).attention
    assert softmax_scale(lite) * 192**0.5 == pytest.approx(1.58963, abs=5e-6)


def test_yarn_temperatures():
    assert yarn_mscale(40, 1.0) == pytest.approx(1.36889, abs=5e-6)
    assert yarn_mscale(40, 0.707) == pytest.approx(1.26080, abs=5e-6)
    assert yarn_mscale(1, 1.0) == 1


def test_yarn_keeps_fast_frequencies_and_divides_slow_ones():
    plain = rope_frequencies(dataclasses.replace(V3_LONG, yarn=None))
    extended = rope_frequencies(V3_LONG)
    np.testing.assert_allclose(plain, 10_000.0 ** (-np.arange(32) / 32), rtol=1e-12)
    np.testing.assert_array_equal(extended[:11], plain[:11])
    np.testing.assert_allclose(extended[23:], plain[23:] / 40, rtol=1e-12)
    # Half-way at index 16.5: between them at 16, by 6/13 of the ramp.
    np.testing.assert_allclose(extended[16], plain[16] * (7 / 13 + 6 / 13 / 40), rtol=1e-12)


@pytest.mark.parametrize(("mscale", "all_dim", "expected"), [(1.0, 1.0, 1.0), (1.0, 0.707, 1.36889 / 1.26080)])
def test_rotary_tables_carry_the_ratio_of_mscales(mscale, all_dim, expected):
    config = dataclasses.replace(V3_LONG, yarn=YarnConfig(mscale=mscale, mscale_all_dim=all_dim))
    cos, sin = rope_tables(config, jnp.zeros((1,), jnp.int32))
    np.testing.assert_allclose(cos, np.full((1, 32), expected), rtol=1e-5)
    np.testing.assert_array_equal(sin, np.zeros((1, 32)))


def test_half_split_rotation_equals_complex_rotation_after_the_permutation():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 8))
    positions = np.array([0, 1, 5, 31, 400, 4095])
    # Published layout: (x_2i, x_2i+1) is a complex number, turned by position * frequency i.
    turned = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * positions[:, None] * 10_000.0 ** (-np.arange(4) / 4))
    published = np.stack([turned.real, turned.imag], axis=-1).reshape(6, 8)
    with jax.enable_x64(True):
        cos, sin = rope_tables(SMALL, jnp.asarray(positions), jnp.float64)
        ours = apply_rope(jnp.asarray(x[:, INTERLEAVED]), cos, sin)
    np.testing.assert_allclose(ours, published[:, INTERLEAVED], atol=1e-12)


def test_dot_products_depend_on_the_distance_only():
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        q, k = jnp.asarray(rng.normal(size=(2, 8)))

        def score(i, j):
            tables = [rope_tables(SMALL, jnp.asarray(p), jnp.float64) for p in (i, j)]
            return float(apply_rope(q, *tables[0]) @ apply_rope(k, *tables[1]))

        assert score(7, 3) == pytest.approx(score(1004, 1000), abs=1e-12)
        assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-3)
        assert score(5, 5) == pytest.approx(float(q @ k), abs=1e-12)


def test_tables_are_float32_and_rotation_keeps_the_dtype():
    cos, sin = rope_tables(SMALL, jnp.arange(3), jnp.bfloat16)
    assert cos.dtype == sin.dtype == jnp.float32
    assert apply_rope(jnp.ones((3, 8), jnp.bfloat16), cos, sin).dtype == jnp.bfloat16
