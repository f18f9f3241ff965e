"""`matmul_14_bits`: why FP8 sums are promoted to float32 every 128 of K (section 3.3.2 of the report)."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_scaled_matmul import block_scaled_matmul, matmul_14_bits
from pallas_kernels.quantize import quantize


def codes(seed, *shape, positive=False):
    rng = np.random.default_rng(seed)
    x = rng.random(shape) if positive else rng.standard_normal(shape)
    return quantize(jnp.asarray(x, jnp.float32), None).codes


def worst_error(a, b, promote_every):
    """The largest error of any element, relative to the root mean square of all."""
    exact = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    got = np.asarray(matmul_14_bits(a, b, promote_every=promote_every), np.float64)
    return np.abs(got - exact).max() / np.sqrt(np.square(exact).mean())


def test_about_2_percent_without_promotion_at_k_4096():
    """The paper does not say of what size its matrices are; the worst of more elements is worse."""
    a, b = codes(0, 128, 4096), codes(1, 4096, 128)
    alone = worst_error(a, b, None)
    assert 0.01 < alone < 0.03
    assert worst_error(a, b, 128) < alone / 15


def test_sums_of_one_sign_are_worse_since_all_that_is_cut_off_has_it_too():
    a, b = codes(0, 32, 4096, positive=True), codes(1, 4096, 32, positive=True)
    alone, promoted = worst_error(a, b, None), worst_error(a, b, 128)
    assert 0.05 < alone < 0.1
    assert promoted < alone / 50


def by_hand(a, b, promote_every):
    """One element in plain Python, with exact integers and fractions of the accumulator's unit."""
    total = accumulator = 0.0
    for start in range(0, len(a), 32):
        addends = [accumulator, *(a[start : start + 32] * b[start : start + 32])]
        unit = 2.0 ** (np.frexp(max(map(abs, addends)))[1] - 14)
        accumulator = sum(int(x / unit) for x in addends) * unit
        unit = 2.0 ** (np.frexp(abs(accumulator))[1] - 14)
        accumulator = int(accumulator / unit) * unit
        if promote_every and (start + 32) % promote_every == 0:
            total, accumulator = float(np.float32(total + accumulator)), 0.0
    return total + accumulator


@pytest.mark.parametrize("promote_every", [None, 32, 128])
def test_every_addend_is_cut_to_14_bits_of_the_largest(promote_every):
    a, b = codes(0, 3, 300), codes(1, 300, 4)
    got = matmul_14_bits(a, b, promote_every=promote_every)
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_array_equal(got, [[by_hand(row, column, promote_every) for column in b.T] for row in a])


def test_short_sums_of_small_integers_are_exact():
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.integers(-8, 9, s), jnp.float8_e4m3fn) for s in ((5, 64), (64, 7)))
    np.testing.assert_array_equal(matmul_14_bits(a, b), np.asarray(a, np.float32) @ np.asarray(b, np.float32))


def test_what_lies_below_the_14_bits_is_lost():
    """1 is 2^-14 of 2^14 = 128²: kept if added among its like first, cut off beside it."""
    a = jnp.zeros((1, 64), jnp.float8_e4m3fn).at[0, 0].set(128).at[0, 32:].set(1)
    b = jnp.ones((64, 1), jnp.float8_e4m3fn).at[0, 0].set(128)
    assert float(matmul_14_bits(a, b, promote_every=None)[0, 0]) == 128 * 128
    assert float(matmul_14_bits(a, b, promote_every=32)[0, 0]) == 128 * 128 + 32


def test_as_an_implementation_of_the_scaled_product():
    """Never promoted, with scales in the operands: the negative control of a training run."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((8, 2048), (2048, 8)))
    a, b = quantize(x, (1, 128)), quantize(w, (128, 128))
    got = block_scaled_matmul(a, b, out_dtype=jnp.float32, implementation="14_bits")
    wanted = np.asarray(block_scaled_matmul(a, b, out_dtype=jnp.float32, implementation="reference"))
    error = np.abs(got - wanted).max() / np.sqrt(np.square(wanted).mean())
    assert 1e-3 < error < 3e-2


def test_bad_arguments_are_refused():
    a, b = codes(0, 2, 64), codes(1, 64, 2)
    with pytest.raises(ValueError, match="a positive multiple of 32, not 48"):
        matmul_14_bits(a, b, promote_every=48)
    with pytest.raises(ValueError, match=r"\[M, K\] and \[K, N\], not \(2, 64\) and \(2, 64\)"):
        matmul_14_bits(a, a)
