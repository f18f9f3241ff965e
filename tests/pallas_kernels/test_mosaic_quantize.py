"""The Hopper kernels of `quantize`, run on a CPU by Pallas' interpreter, which also looks for data races.

What it does not run, and this file does not show: layouts of registers, the transposition in them, and the inlined
`rcp.rn`, in whose place the interpreted kernel divides. The program for sm_90a is looked at in
test_mosaic_quantize_aot.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic_interpreter import interpret

from pallas_kernels.quantize import (
    GRADIENT_AMAX,
    mosaic_gpu,
    quantize,
    quantize_both,
    quantize_weight,
    reference,
)

ROW, COLUMN, BLOCK = (1, 128), (128, 1), (128, 128)
E4M3 = jnp.dtype(jnp.float8_e4m3fn)


def wide_range(shape, dtype=jnp.float32):
    """Magnitudes over 40 powers of two, both zeros, and rows, columns and blocks of different sizes."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(shape) * 2.0 ** rng.uniform(-30, 10, shape)
    values *= 2.0 ** rng.integers(-20, 20, (shape[0], 1)) * 2.0 ** rng.integers(-20, 20, (1, shape[1]))
    values = np.where(rng.random(shape) < 0.05, np.copysign(0, values), values)
    return jnp.asarray(values, dtype)


def assert_same_bits(got, want):
    """The same codes and scales; a NaN's sign and payload do not matter."""
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a), np.asarray(b)
        nan = np.isnan(b.astype(np.float32))
        np.testing.assert_array_equal(np.isnan(a.astype(np.float32)), nan)
        bits = np.uint8 if a.dtype.itemsize == 1 else np.uint32
        np.testing.assert_array_equal(a.view(bits)[~nan], b.view(bits)[~nan])


def wanted(x, tile, power_of_two=False, smallest_amax=1e-4):
    """The reference's codes and scales, made on a CPU, which rounds 1 / scale to nearest."""
    x = jax.device_put(x, jax.devices("cpu")[0])
    return reference.quantize(x, tile, E4M3, power_of_two, smallest_amax, None)


@pytest.mark.parametrize("tile", [ROW, COLUMN, BLOCK])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), [((256, 256), jnp.bfloat16), ((131, 70), jnp.float32)])
def test_it_is_the_reference(tile, power_of_two, shape, dtype):
    x = wide_range(shape, dtype)
    assert_same_bits(interpret(mosaic_gpu.quantize, x, tile, power_of_two, 1e-4), wanted(x, tile, power_of_two))


@pytest.mark.parametrize(("shape", "dtype"), [((256, 128), jnp.bfloat16), ((130, 200), jnp.float32)])
def test_both_forms_of_a_gradient_are_those_of_the_reference(shape, dtype):
    x = wide_range(shape, dtype)
    got = interpret(mosaic_gpu.quantize_both, x, False, GRADIENT_AMAX)
    want = wanted(x, ROW, False, GRADIENT_AMAX) + wanted(x, COLUMN, False, GRADIENT_AMAX)
    assert_same_bits(got, want)


@pytest.mark.parametrize(("shape", "dtype"), [((128, 256), jnp.bfloat16), ((200, 70), jnp.float32)])
def test_both_layouts_of_a_weight_are_those_of_the_reference(shape, dtype):
    w = wide_range(shape, dtype)
    codes, scales = wanted(w, BLOCK, True)
    assert_same_bits(interpret(mosaic_gpu.quantize_weight, w, True, 1e-4), (codes, scales, codes.T))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tile", [ROW, COLUMN, BLOCK])
def test_what_is_not_finite_makes_its_tile_nan_and_no_other(value, tile):
    x = wide_range((140, 140), jnp.bfloat16).at[3, 131].set(value).at[130, 5].set(value)
    got = interpret(mosaic_gpu.quantize, x, tile, False, 1e-4)
    assert_same_bits(got, wanted(x, tile))
    assert np.isnan(np.asarray(got[1])).sum() == 2


@pytest.mark.parametrize("size", [0.0, 2.0**-130, 2.0**-99, 1e-4, 3e38])
def test_tiny_and_huge_tiles(size):
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (64, 128)) * size, jnp.float32)
    for smallest_amax in (1e-4, GRADIENT_AMAX):
        got = interpret(mosaic_gpu.quantize, x, ROW, False, smallest_amax)
        assert_same_bits(got, wanted(x, ROW, False, smallest_amax))


def test_nothing_that_was_not_written_is_read():
    x = wide_range((128, 128), jnp.bfloat16)
    got = interpret(mosaic_gpu.quantize_both, x, False, 1e-4, uninitialized="nan")
    assert_same_bits(got, wanted(x, ROW) + wanted(x, COLUMN))


@pytest.mark.parametrize("shape", [(0, 200), (200, 0)])
def test_empty_matrices(shape):
    x = jnp.zeros(shape, jnp.bfloat16)
    for tile in (ROW, COLUMN, BLOCK):
        assert_same_bits(mosaic_gpu.quantize(x, tile, False, 1e-4), wanted(x, tile))
    codes, scales = wanted(x, BLOCK)
    assert_same_bits(mosaic_gpu.quantize_weight(x, False, 1e-4), (codes, scales, codes.T))


def test_on_another_device_it_says_why_it_cannot_run():
    if jax.default_backend() == "gpu":
        pytest.skip("this device may be a Hopper GPU")
    x = jnp.ones((8, 8))
    message = r"'mosaic_gpu' cannot run here: .*compute capability 9\.0.*jax runs on cpu"
    with pytest.raises(ValueError, match=f"quantize: implementation {message}"):
        quantize(x, ROW, implementation="mosaic_gpu")
    for function in (quantize_both, quantize_weight):
        with pytest.raises(ValueError, match=f"{function.__name__}: implementation {message}"):
            function(x, implementation="mosaic_gpu")


def test_on_a_hopper_gpu_arguments_decide(monkeypatch):
    class Device:
        compute_capability = "9.0"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    x = jnp.ones((8, 8))
    assert mosaic_gpu.supported(x, E4M3, ROW, GRADIENT_AMAX) is None
    assert "(2, 8, 8)" in mosaic_gpu.supported(jnp.ones((2, 8, 8)), E4M3, ROW, 1e-4)
    assert "float16" in mosaic_gpu.supported(x.astype(jnp.float16), E4M3, ROW, 1e-4)
    assert "float8_e5m2" in mosaic_gpu.supported(x, jnp.dtype(jnp.float8_e5m2), ROW, 1e-4)
    assert "None" in mosaic_gpu.supported(x, E4M3, None, 1e-4)
    assert "2^-100" in mosaic_gpu.supported(x, E4M3, ROW, 2.0**-101)
    Device.compute_capability = "10.0"
    assert "not 10.0" in mosaic_gpu.supported(x, E4M3, ROW, 1e-4)


def test_the_portable_forms_are_those_of_quantize():
    x = wide_range((130, 140))
    rows, columns = quantize_both(x, smallest_amax=GRADIENT_AMAX)
    blocks, transposed = quantize_weight(x, power_of_two=True)
    assert_same_bits((rows.codes, rows.scales), wanted(x, ROW, False, GRADIENT_AMAX))
    assert_same_bits((columns.codes, columns.scales), wanted(x, COLUMN, False, GRADIENT_AMAX))
    assert_same_bits((blocks.codes, blocks.scales), wanted(x, BLOCK, True))
    assert_same_bits((transposed.codes, transposed.scales), (blocks.codes.T, blocks.scales.T))
    assert (rows.tile, columns.tile, blocks.tile, transposed.tile) == (ROW, COLUMN, BLOCK, BLOCK)
    with pytest.raises(ValueError, match=r"quantize_both needs a matrix of a float dtype, not \(2, 3, 4\)"):
        quantize_both(jnp.ones((2, 3, 4)))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4096, 7168), (1000, 1000), (1, 7)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_on_a_gpu_it_is_the_reference(shape, dtype):
    x = wide_range(shape, dtype)
    obstacle = mosaic_gpu.supported(x, E4M3, ROW, 1e-4)
    if obstacle:
        pytest.skip(obstacle)
    for smallest_amax in (1e-4, GRADIENT_AMAX):
        for tile in (ROW, COLUMN, BLOCK):
            assert_same_bits(mosaic_gpu.quantize(x, tile, False, smallest_amax), wanted(x, tile, False, smallest_amax))
        rows, columns = wanted(x, ROW, True, smallest_amax), wanted(x, COLUMN, True, smallest_amax)
        assert_same_bits(mosaic_gpu.quantize_both(x, True, smallest_amax), rows + columns)
        codes, scales = wanted(x, BLOCK, False, smallest_amax)
        assert_same_bits(mosaic_gpu.quantize_weight(x, False, smallest_amax), (codes, scales, codes.T))
