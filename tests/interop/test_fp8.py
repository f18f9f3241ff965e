"""Blocks of 128×128 in FP8 against NumPy, edges included, and what survives a way through BF16."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from deepseek_jax.interop.fp8 import E4M3, dequantise, quantise, scale_shape
from deepseek_jax.precision.fp8 import quantize_weight
from deepseek_jax.precision.policy import Fp8Config

SHAPES = [(128, 128), (256, 384), (576, 300), (1, 1), (130, 127), (64, 512)]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SMALLEST_SCALE = np.float32(1e-4) * np.float32(1 / 448)


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
    assert np.abs(codes.astype(np.float32)).max() == 448


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
    assert scales[0, 0] == SMALLEST_SCALE
    assert (codes[:, :128].astype(np.float32) == 0).all()


@pytest.mark.parametrize("largest", [1e-4, 1e30])
def test_small_and_very_large_weights_keep_their_digits(largest):
    weights = random((128, 128))
    weights *= np.float32(largest) / np.abs(weights).max()
    back = dequantise(*quantise(weights), np.float32)
    assert np.abs(back - weights).max() <= largest / 28  # half of the spacing, 32, between 256 and 448


@pytest.mark.parametrize("powers_of_two", [False, True])
def test_no_scale_is_smaller_than_that_of_a_block_up_to_1e_4(powers_of_two):
    """As public quantisers have it, and training: what is smaller is rounded as beside a weight of 1e-4."""
    weights = np.array([[3e-6, -1e-7, 1e-12]], np.float32)
    codes, scales = quantise(weights, powers_of_two=powers_of_two)
    expected = np.exp2(np.ceil(np.log2(SMALLEST_SCALE))) if powers_of_two else SMALLEST_SCALE
    assert scales == np.float32(expected)
    np.testing.assert_array_equal(codes.view(np.uint8), (weights / scales).astype(E4M3).view(np.uint8))


def test_a_weight_that_is_not_finite_leaves_its_block_without_a_scale():
    weights = random((128, 256))
    weights[3, 200] = np.inf
    codes, scales = quantise(weights)
    assert np.isnan(scales).tolist() == [[False, True]]
    assert np.isfinite(codes[:, :128].astype(np.float32)).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("powers_of_two", [False, True])
def test_codes_and_scales_are_those_that_training_reads(shape, powers_of_two):
    """Bit for bit, of the transposed matrix: blocks are square."""
    weights = random(shape, 4)
    codes, scales = quantise(weights, powers_of_two=powers_of_two)
    trained = quantize_weight(jnp.asarray(weights.T), Fp8Config(power_of_two_scales=powers_of_two))
    np.testing.assert_array_equal(codes.view(np.uint8), np.asarray(trained.codes).T.view(np.uint8))
    np.testing.assert_array_equal(scales, np.asarray(trained.scales).T)


def test_other_blocks_are_decoded_too():
    """Some folders of others have them."""
    rng = np.random.default_rng(5)
    codes, scales = rng.standard_normal((100, 70)).astype(E4M3), rng.random((2, 3), np.float32)
    expected = codes.astype(np.float32) * each(scales, codes.shape, (64, 32))
    np.testing.assert_array_equal(dequantise(codes, scales, np.float32, (64, 32)), expected)


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
