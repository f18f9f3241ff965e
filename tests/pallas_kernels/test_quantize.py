"""`quantize`: DeepSeek-V3's tiles and scales (tech report, section 3.3.2), bit for bit, with their bounds and edges."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fp8_oracle import E4M3, E5M2, dequantize, tiles_of, wide_range
from fp8_oracle import quantize as oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.quantize import Quantized, quantize, requantize

TILES = [(1, 128), (128, 1), (128, 128), None]
SHAPES = [(1, 1), (3, 130), (130, 3), (128, 128), (200, 300)]
HALF_ULP = {E4M3: (2.0**-4, 2.0**-10), E5M2: (2.0**-3, 2.0**-17)}
"""Of a format: relative to a normal number, and of its subnormal ones."""

some_matrix = st.builds(
    lambda seed, shape, low, high: wide_range(np.random.default_rng(seed), shape, low, low + high),
    st.integers(0, 2**31), st.sampled_from(SHAPES), st.integers(-40, 20), st.integers(0, 40),
)  # fmt: skip


def same_bits(got, wanted):
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(got.view(f"u{got.itemsize}"), wanted.view(f"u{got.itemsize}"))


@settings(max_examples=40)
@given(some_matrix, st.sampled_from(TILES), st.sampled_from([E4M3, E5M2]), st.booleans())
def test_codes_and_scales_are_those_of_numpy(x, tile, dtype, power_of_two):
    q = quantize(jnp.asarray(x), tile, dtype=dtype, power_of_two=power_of_two)
    codes, scales = oracle(x, tile, dtype, power_of_two)
    same_bits(q.scales, scales)
    same_bits(q.codes, codes)
    same_bits(q.dequantize(), dequantize(codes, scales, tile, np.float32))


@settings(max_examples=40)
@given(some_matrix, st.sampled_from(TILES), st.sampled_from([E4M3, E5M2]), st.booleans())
def test_values_stay_within_half_a_unit_in_the_last_place(x, tile, dtype, power_of_two):
    q = quantize(jnp.asarray(x), tile, dtype=dtype, power_of_two=power_of_two)
    error = np.abs(np.asarray(q.dequantize(), np.float64) - x)
    relative, subnormal = HALF_ULP[dtype]
    for index, where in tiles_of(x.shape, tile):
        bound = np.maximum(relative * np.abs(x[where]), subnormal * float(q.scales[index]))
        assert (error[where] <= bound * (1 + 1e-6)).all()


@settings(max_examples=20)
@given(some_matrix, st.sampled_from(TILES))
def test_a_power_of_two_as_scale_makes_scaling_exact(x, tile):
    q = quantize(jnp.asarray(x), tile, power_of_two=True)
    mantissa, _ = np.frexp(np.asarray(q.scales))
    assert (mantissa == 0.5).all()
    exact = dequantize(np.asarray(q.codes), np.asarray(q.scales), tile, np.float64)
    np.testing.assert_array_equal(np.asarray(q.dequantize(), np.float64), exact)
    # A code has four bits, so even bfloat16 holds it.
    np.testing.assert_array_equal(np.asarray(q.dequantize(jnp.bfloat16), np.float64), exact)
    # The least power that keeps the largest within the format.
    for index, where in tiles_of(x.shape, tile):
        amax = max(np.abs(x[where]).max(), 1e-4)
        assert 224 * (1 - 1e-6) < amax / float(q.scales[index]) <= 448 * (1 + 1e-6)


def test_the_largest_of_a_tile_becomes_the_largest_number():
    x = np.zeros((2, 256), np.float32)
    x[0, 5], x[0, 200], x[1, 7] = 3.0, -1e4, 448 * 2.0**-3
    q = quantize(jnp.asarray(x), (1, 128))
    assert [float(q.codes[i]) for i in ((0, 5), (0, 200), (1, 7))] == [448, -448, 448]
    np.testing.assert_allclose(q.scales, [[3 / 448, 1e4 / 448], [2.0**-3, 1e-4 / 448]], rtol=1e-7)
    assert float(quantize(jnp.asarray(x), (1, 128), power_of_two=True).scales[1, 0]) == 2.0**-3


def test_small_tiles_are_measured_against_1e_4():
    q = quantize(jnp.full((1, 128), 1e-5), (1, 128))
    np.testing.assert_allclose(q.scales, 1e-4 / 448, rtol=1e-7)
    assert float(q.codes[0, 0]) == 44, "a tenth of the range: 44.8, rounded to four bits"
    assert not np.asarray(quantize(jnp.zeros((5, 130)), (128, 128)).dequantize()).any()


def test_nothing_overflows():
    """A cast beyond the range gives NaN, so values are clipped first: no finite input, however large, ends as NaN."""
    x = np.random.default_rng(0).uniform(0.5, 1, (64, 1024)).astype(np.float32)
    for scale in (1, 1e30, np.finfo(np.float32).max):
        for dtype in (E4M3, E5M2):
            codes = np.asarray(quantize(jnp.asarray(x * np.float32(scale)), (1, 128), dtype=dtype).codes, np.float32)
            assert np.abs(codes).max() == ml_dtypes.finfo(dtype).max


def test_a_given_scale_follows_nothing():
    """A plain cast, which comparisons have: clipped above, zero below half the least number, NaN where it was."""
    x = jnp.asarray([[1000.0, -3.3, 2.0**-10, 2.0**-11, 0.0]])
    q = quantize(x, None, scale=1.0)
    np.testing.assert_array_equal(q.scales, [[1.0]])
    np.testing.assert_array_equal(q.dequantize(), [[448.0, -3.25, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(quantize(x, None, scale=0.5).dequantize(), [[224.0, -3.25, 2.0**-10, 0.0, 0.0]])
    assert np.isnan(np.asarray(quantize(jnp.asarray([[1.0, np.inf]]), None, scale=1.0).dequantize())).all()
    for tile, scale in (((1, 128), 1.0), (None, 0.0), (None, float("nan")), (None, float("inf"))):
        with pytest.raises(ValueError, match="a given scale is positive, and for tile None"):
            quantize(x, tile, scale=scale)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("tile", TILES)
def test_what_is_not_finite_makes_its_tile_nan_and_no_other(tile, power_of_two, bad):
    x = np.random.default_rng(0).standard_normal((200, 300)).astype(np.float32)
    x[130, 255] = bad
    q = quantize(jnp.asarray(x), tile, power_of_two=power_of_two)
    values = np.asarray(q.dequantize())
    for index, where in tiles_of(x.shape, tile):
        hit = np.isnan(values[where])
        assert hit.all() == np.isnan(q.scales[index]) == (not np.isfinite(x[where]).all())
        assert hit.all() or not hit.any()
        assert np.isnan(np.asarray(q.codes, np.float32)[where]).all() == hit.all()


@pytest.mark.parametrize("shape", [(0, 128), (128, 0), (0, 0), (2, 0, 5), (0, 3, 4)])
@pytest.mark.parametrize("tile", TILES)
def test_an_empty_matrix_is_a_matrix(shape, tile):
    q = quantize(jnp.zeros(shape), tile)
    assert q.shape == q.dequantize().shape == shape
    assert q.T.dequantize().shape == (*shape[:-2], shape[-1], shape[-2])


@pytest.mark.parametrize("tile", TILES)
def test_leading_dimensions_are_separate_matrices(tile):
    x = jnp.asarray(wide_range(np.random.default_rng(0), (2, 3, 130, 200)))
    q = quantize(x, tile)
    mapped = jax.vmap(jax.vmap(lambda m: quantize(m, tile)))(x)
    one = quantize(x[1, 2], tile)
    assert mapped.tile == tile
    for got in (q, mapped):
        same_bits(got.codes, q.codes)
        same_bits(got.scales, q.scales)
        same_bits(got.codes[1, 2], one.codes)
        same_bits(got.scales[1, 2], one.scales)
    same_bits(jax.vmap(jax.vmap(lambda m: m.dequantize()))(q), q.dequantize())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_any_float_is_quantised_in_float32(dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((130, 200)), dtype)
    a, b = quantize(x, (1, 128)), quantize(x.astype(jnp.float32), (1, 128))
    same_bits(a.codes, b.codes)
    same_bits(a.scales, b.scales)


def test_float64_is_quantised_in_float32_and_dequantised_exactly():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).standard_normal((130, 200))
        q = quantize(jnp.asarray(x), (1, 128))
        codes, scales = oracle(x.astype(np.float32), (1, 128))
        same_bits(q.codes, codes)
        np.testing.assert_array_equal(q.dequantize(jnp.float64), dequantize(codes, scales, (1, 128)))


@pytest.mark.parametrize("tile", TILES)
def test_transposing_keeps_every_value(tile):
    q = quantize(jnp.asarray(wide_range(np.random.default_rng(0), (2, 130, 300))), tile)
    assert q.T.tile == (None if tile is None else tile[::-1])
    assert q.T.shape == (2, 300, 130)
    same_bits(q.T.dequantize(), q.dequantize().mT)
    same_bits(q.T.T.codes, q.codes)


def test_other_tiles_are_made_of_the_dequantised_values():
    q = quantize(jnp.asarray(np.random.default_rng(0).standard_normal((300, 200)), jnp.float32), (1, 128), dtype=E5M2)
    codes, scales = oracle(np.asarray(q.dequantize()), (128, 1), E5M2)
    got = requantize(q, (128, 1))
    same_bits(got.codes, codes)
    same_bits(got.scales, scales)


def test_other_tiles_lose_nothing_with_powers_of_two():
    """Why the paper has them where activations are re-tiled (section 3.3.2): within the normal range all bits stay."""
    x = np.random.default_rng(0).uniform(1, 16, (256, 256)).astype(np.float32)
    q = quantize(jnp.asarray(x), (1, 128), power_of_two=True)
    same_bits(requantize(q, (128, 1), power_of_two=True).dequantize(), q.dequantize())
    arbitrary = quantize(jnp.asarray(x), (1, 128))
    assert not np.array_equal(requantize(arbitrary, (128, 1)).dequantize(), arbitrary.dequantize())


def test_it_is_a_pytree_of_two_leaves():
    q = quantize(jnp.ones((2, 130, 200)), (1, 128))
    leaves, structure = jax.tree.flatten(q)
    assert [leaf.shape for leaf in leaves] == [(2, 130, 200), (2, 130, 2)]
    jax.tree.unflatten(structure, ["whatever", None])  # jax does so now and then
    assert jax.tree.map(lambda leaf: leaf[0], q).shape == (130, 200)
    assert jax.eval_shape(lambda q: q.T, q).tile == (128, 1)
    _, sums = jax.lax.scan(lambda _, m: (None, m.dequantize().sum()), None, q)
    np.testing.assert_allclose(sums, 130 * 200, rtol=1e-5)


def test_bad_arguments_say_what_would_be_valid():
    x = jnp.ones((130, 200))
    q = quantize(x, (1, 128))
    with pytest.raises(ValueError, match=r"\(1, 128\), \(128, 1\), \(128, 128\) or None, not \(1, 64\)"):
        quantize(x, (1, 64))
    with pytest.raises(ValueError, match="float8_e4m3fn or float8_e5m2, not int8"):
        quantize(x, (1, 128), dtype=jnp.int8)
    with pytest.raises(ValueError, match=r"\[..., M, N\] of a float dtype, not \(130, 200\) of int32"):
        quantize(x.astype(jnp.int32), (1, 128))
    with pytest.raises(ValueError, match=r"not \(3,\) of float32"):
        quantize(jnp.ones(3), (1, 128))
    with pytest.raises(ValueError, match="it has mosaic_gpu, reference"):
        quantize(x, (1, 128), implementation="mosaic")
    with pytest.raises(ValueError, match=r"need scales \(130, 2\), not \(2, 200\)"):
        Quantized(q.codes, jnp.ones((2, 200)), (1, 128))
    with pytest.raises(ValueError, match=r"need scales codes|\[..., M, N\]"):
        Quantized(jnp.ones(3, E4M3), jnp.ones(3), (1, 128))
