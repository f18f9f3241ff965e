"""Blocks of 128×128 in FP8 against NumPy, edges included, and what survives a way through BF16."""

import ml_dtypes
import numpy as np
import pytest

from deepseek_jax.interop.fp8 import E4M3, E4M3_MAX, dequantise, quantise, scale_shape

SHAPES = [(128, 128), (256, 384), (576, 300), (1, 1), (130, 127), (64, 512)]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def random(shape, seed=0, spread=1.0):
    """Numbers whose blocks differ in size by orders of magnitude."""
    rng = np.random.default_rng(seed)
    blocks = np.exp(spread * rng.standard_normal(scale_shape(shape)))
    return (rng.standard_normal(shape) * each(blocks, shape)).astype(np.float32)


def each(scales, shape, block=(128, 128)):
    """Each block's scale at each of its elements."""
    rows, columns = np.arange(shape[0]) // block[0], np.arange(shape[1]) // block[1]
    return np.asarray(scales, np.float32)[rows][:, columns]


def test_576_rows_are_five_blocks():
    assert scale_shape((576, 7168)) == (5, 56)
    assert scale_shape((7168, 18432)) == (56, 144)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=["float32", "bfloat16"])
def test_a_value_is_its_code_times_the_scale_of_its_block(shape, dtype):
    rng = np.random.default_rng(1)
    codes = np.clip(rng.standard_normal(shape) * 150, -448, 448).astype(E4M3)
    scales = rng.random(scale_shape(shape), np.float32)
    expected = (codes.astype(np.float32) * each(scales, shape)).astype(dtype)
    found = dequantise(codes, scales, dtype)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize("shape", SHAPES)
def test_quantise_is_the_formula(shape):
    """scale = amax / 448 over the block, code = round(x / scale); edge blocks see their own elements only."""
    weights = random(shape)
    codes, scales = quantise(weights)
    assert (codes.dtype, scales.dtype, scales.shape) == (E4M3, np.float32, scale_shape(shape))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = weights[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            np.testing.assert_allclose(scales[i, j], np.abs(block).max() / 448, rtol=1e-6)
    expected = np.clip(weights / each(scales, shape), -448, 448).astype(E4M3)
    np.testing.assert_array_equal(codes.view(np.uint8), expected.view(np.uint8))
    assert np.abs(codes.astype(np.float32)).max() == E4M3_MAX


@pytest.mark.parametrize("shape", SHAPES)
def test_powers_of_two_are_the_next_above(shape):
    weights = random(shape)
    exact, rounded = quantise(weights)[1], quantise(weights, powers_of_two=True)[1]
    np.testing.assert_array_equal(np.exp2(np.ceil(np.log2(exact.astype(np.float64)))), rounded)


def test_a_power_of_two_stays_as_it_is():
    weights = np.full((128, 128), 448 * 2.0**-7, np.float32)
    assert quantise(weights, powers_of_two=True)[1].item() == 2.0**-7


def test_a_block_of_zeros_stays_zero_and_is_no_nan():
    weights = random((128, 256))
    weights[:, :128] = 0
    codes, scales = quantise(weights)
    assert scales[0, 0] == 1
    assert (codes[:, :128].astype(np.float32) == 0).all()


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_very_small_and_very_large_weights_keep_their_digits(size):
    weights = (random((128, 128)) * size).astype(np.float32)
    codes, scales = quantise(weights)
    back = dequantise(codes, scales, np.float32)
    assert np.abs(back - weights).max() <= np.abs(weights).max() / 16


@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_through_bfloat16_keeps_codes_and_nearly_the_scales(shape):
    codes, scales = quantise(random(shape, 2))
    again, new = quantise(dequantise(codes, scales, BFLOAT16))
    np.testing.assert_array_equal(again.view(np.uint8), codes.view(np.uint8))
    assert np.abs(new / scales - 1).max() <= 2**-8


@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_with_power_of_two_scales_through_bfloat16_is_exact(shape):
    codes, scales = quantise(random(shape, 3), powers_of_two=True)
    values = dequantise(codes, scales, BFLOAT16)
    np.testing.assert_array_equal(values.astype(np.float32), dequantise(codes, scales, np.float32))
    again = quantise(values, powers_of_two=True)
    np.testing.assert_array_equal(dequantise(*again, np.float32), values.astype(np.float32))


def test_e8m0_scales_are_powers_of_two():
    codes, scales = quantise(random((200, 200)), powers_of_two=True)
    stored = scales.astype(ml_dtypes.float8_e8m0fnu)
    np.testing.assert_array_equal(dequantise(codes, stored, np.float32), dequantise(codes, scales, np.float32))
