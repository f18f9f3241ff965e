"""E5M6: the 12 bits in which DeepSeek-V3 keeps the input of attention's output projection (section 3.3.3)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fp8_oracle import wide_range
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.quantize import PackedE5M6, pack_e5m6, quantize_e5m6, unpack_e5m6

LARGEST = 65024.0
NUMBERS = (np.arange(0x7C0, dtype=np.uint16) << 4).view(np.float16).astype(np.float64)
"""Every number of the format that is not negative, in order: those of float16 whose last four bits are zero."""


def nearest(x):
    """Each of x, float64, rounded to `NUMBERS` and their negatives: nearest, then the even code; saturating."""
    magnitude = np.minimum(np.abs(x), LARGEST)
    above = np.clip(np.searchsorted(NUMBERS, magnitude), 1, len(NUMBERS) - 1)
    down, up = magnitude - NUMBERS[above - 1], NUMBERS[above] - magnitude
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, above - 1)
    return np.copysign(NUMBERS[code], x)


def test_largest_is_that_of_six_bits():
    assert NUMBERS[-1] == LARGEST == (2 - 2.0**-6) * 2**15


def test_every_code_comes_back():
    values = np.concatenate([NUMBERS, -NUMBERS]).astype(np.float32)
    packed = pack_e5m6(jnp.asarray(values))
    assert packed.shape == (len(values) * 3 // 2,)
    np.testing.assert_array_equal(unpack_e5m6(packed, jnp.float32), values)


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from([0, 1, 2, 3, 128, 301]))
def test_rounding_is_to_nearest_even_and_saturates(seed, count):
    rng = np.random.default_rng(seed)
    x = wide_range(rng, (2, count), -24, 18)
    # Half of them exactly between two numbers, where a second rounding, by way of float16, would go astray.
    code = rng.integers(0, len(NUMBERS) - 1, x.shape)
    x = np.where(rng.random(x.shape) < 0.5, (NUMBERS[code] + NUMBERS[code + 1]) / 2, x).astype(np.float32)
    packed = pack_e5m6(jnp.asarray(x))
    assert packed.shape == (2, -(-3 * count // 2))
    got = np.asarray(unpack_e5m6(packed, jnp.float32), np.float64)
    np.testing.assert_array_equal(got, nearest(x.astype(np.float64)))
    normal = (np.abs(x) >= 2.0**-14) & (np.abs(x) <= LARGEST)
    assert (np.abs(got - x)[normal] <= 2.0**-7 * np.abs(x)[normal]).all()


def test_just_beside_a_tie_the_nearer_one_wins():
    """Rounding to float16 first would make these ties, and then even: 1 instead of 1 + 2^-6."""
    x = jnp.asarray([1 + 2.0**-7 + 2.0**-20, 1 + 2.0**-7, 1 + 2.0**-7 - 2.0**-20], jnp.float32)
    assert unpack_e5m6(pack_e5m6(x), jnp.float32).tolist() == [1 + 2.0**-6, 1, 1]


def test_bytes_are_packed_as_documented():
    a, b = 0b0_01111_000001, 0b1_10000_100000  # 1 + 2^-6 and -3
    packed = pack_e5m6(jnp.asarray([1 + 2.0**-6, -3.0, 1 + 2.0**-6]))
    assert packed.tolist() == [a & 255, (a >> 8) | ((b & 15) << 4), b >> 4, a & 255, a >> 8]


def test_beyond_the_range():
    x = jnp.asarray([np.inf, -np.inf, 1e30, -65100, np.nan, np.finfo(np.float32).max], jnp.float32)
    got = unpack_e5m6(pack_e5m6(x), jnp.float32)
    np.testing.assert_array_equal(got, [LARGEST, -LARGEST, LARGEST, -LARGEST, np.nan, LARGEST])


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from([(3, 128), (2, 5, 301), (4, 1), (0, 7), (3, 0)]), st.integers(-60, 60))
def test_tiles_keep_seven_bits_over_29_powers_of_two(seed, shape, power):
    x = wide_range(np.random.default_rng(seed), shape, power - 10, power)
    q = quantize_e5m6(jnp.asarray(x))
    assert isinstance(q, PackedE5M6)
    assert q.shape == shape
    assert (q.packed.shape, q.packed.dtype) == ((*shape[:-1], -(-3 * shape[-1] // 2)), jnp.uint8)
    assert (q.scales.shape, q.scales.dtype) == ((*shape[:-1], -(-shape[-1] // 128)), jnp.float32)
    assert (np.frexp(np.asarray(q.scales))[0] == 0.5).all()
    scales = np.repeat(np.asarray(q.scales, np.float64), 128, -1)[..., : shape[-1]]
    values = np.asarray(q.dequantize(), np.float64)
    np.testing.assert_array_equal(values, nearest(x / scales) * scales)
    error, size = np.abs(values - x), np.abs(x)
    assert (error <= np.maximum(2.0**-7 * size, 2.0**-21 * scales)).all()
    np.testing.assert_array_equal(np.asarray(q.dequantize(jnp.bfloat16), np.float64), values)


def test_the_largest_of_a_tile_is_near_the_top_of_the_range():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 128)) * 1e-2, jnp.float32)
    top = jnp.abs(x).max(-1, keepdims=True) / quantize_e5m6(x).scales
    assert LARGEST / 2 < float(top.min()) < float(top.max()) <= LARGEST


def test_a_value_takes_12_bits_and_a_part_of_its_scale():
    q = quantize_e5m6(jnp.ones((4, 256)))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(q)) == 4 * 256 * (1.5 + 4 / 128)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_makes_its_e5m6_tile_nan_and_no_other(bad):
    x = np.ones((2, 300), np.float32)
    x[1, 130] = bad
    hit = np.isnan(quantize_e5m6(jnp.asarray(x)).dequantize())
    assert hit[1, 128:256].all()
    assert hit.sum() == 128


def test_under_jit_and_vmap():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5, 131)), jnp.bfloat16)
    plain = quantize_e5m6(x)
    for got in (jax.jit(quantize_e5m6)(x), jax.vmap(quantize_e5m6)(x)):
        np.testing.assert_array_equal(got.packed, plain.packed)
        np.testing.assert_array_equal(got.scales, plain.scales)
    np.testing.assert_array_equal(jax.vmap(lambda q: q.dequantize())(plain), plain.dequantize())


def test_only_matrices_of_floats():
    with pytest.raises(ValueError, match=r"of a float dtype, not \(2, 2\) of int32"):
        quantize_e5m6(jnp.ones((2, 2), jnp.int32))
