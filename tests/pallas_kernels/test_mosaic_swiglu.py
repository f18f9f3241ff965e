"""The Hopper kernels that requantise, and that fuse SwiGLU with quantising, run on a CPU by Pallas' interpreter.

What it does not run, and this file does not show: layouts of registers, the transposition in them, the approximate
exponential and quotient of a GPU. The program for sm_90a is looked at in test_mosaic_quantize_aot.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fp8_oracle import wide_range
from mosaic_interpreter import interpret

from pallas_kernels.quantize import (
    Quantized,
    mosaic_gpu_requantize,
    mosaic_gpu_swiglu,
    quantize,
    quantize_swiglu,
    requantize,
    swiglu_backward,
)

ROW, COLUMN = (1, 128), (128, 1)
E4M3 = jnp.dtype(jnp.float8_e4m3fn)


def assert_same_bits(got, want):
    """The same codes and scales; a NaN's sign and payload do not matter."""
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(256, 128), (130, 200)])
def test_requantise_is_the_reference(shape, power_of_two):
    x = jnp.asarray(wide_range(np.random.default_rng(0), shape), jnp.float32).at[3, 5].set(jnp.nan)
    q = quantize(x, ROW, power_of_two=power_of_two)
    codes, scales = interpret(mosaic_gpu_requantize.requantize_columns, q.codes, q.scales, power_of_two, 1e-4)
    want = requantize(q, COLUMN, power_of_two=power_of_two)
    assert_same_bits((codes.T, scales), (want.codes, want.scales))
    assert np.isnan(np.asarray(scales)).sum() == min(128, shape[1])


def swiglu_problem(rows, channels, dtype):
    rng = np.random.default_rng(0)
    gate_up = jnp.asarray(rng.standard_normal((rows, 2 * channels)) * 3, dtype)
    dhidden = jnp.asarray(rng.standard_normal((rows, channels)), dtype)
    return gate_up, dhidden, jnp.asarray(rng.standard_normal(rows), jnp.float32)


@pytest.mark.parametrize(
    ("rows", "channels", "dtype", "weighted"), [(70, 256, jnp.bfloat16, True), (33, 128, jnp.float32, False)]
)
def test_forward_is_the_reference(rows, channels, dtype, weighted):
    gate_up, _, weights = swiglu_problem(rows, channels, dtype)
    weights = weights if weighted else None
    hidden, kept = quantize_swiglu(gate_up, weights)
    got = interpret(mosaic_gpu_swiglu.quantize_swiglu, gate_up, weights, False, 1e-4)
    assert_close_codes(got[:2], hidden)
    assert_same_bits(got[2:], (kept.codes, kept.scales))


def test_backward_is_the_reference():
    """In a process of its own: with as few threads as jax has on two cores, two warpgroups may never meet."""
    root = Path(__file__).parents[2]
    env = dict(os.environ, NPROC="32", JAX_PLATFORMS="cpu", PYTHONPATH=str(root))
    run = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "backward passes agree" in run.stdout


def backward_is_the_reference(rows, channels, dtype, weighted):
    gate_up, dhidden, weights = swiglu_problem(rows, channels, dtype)
    weights = weights if weighted else None
    kept = quantize(gate_up, ROW)
    got = interpret(mosaic_gpu_swiglu.swiglu_backward, kept.codes, kept.scales, dhidden, weights, False, 1e-4)
    want = swiglu_backward(kept, dhidden, weights)
    assert (got[0].shape, got[0].dtype) == (want.gate_up.shape, want.gate_up.dtype)
    tolerance = 2**-7 if dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(
        np.asarray(got[0], np.float32), np.asarray(want.gate_up, np.float32), rtol=tolerance, atol=1e-5
    )
    if weighted:
        np.testing.assert_allclose(got[1], want.weights, rtol=1e-4, atol=1e-4)
    else:
        assert got[1] is None
    assert_close_codes((got[2].T, got[3]), want.hidden)


def backward_keeps_what_is_not_finite_in_its_tiles():
    """And reads nothing that was not written."""
    gate_up, dhidden, weights = swiglu_problem(128, 128, jnp.bfloat16)
    kept = quantize(gate_up.at[3, 7].set(jnp.nan), ROW)
    got = interpret(
        mosaic_gpu_swiglu.swiglu_backward, kept.codes, kept.scales, dhidden, weights, False, 1e-4, uninitialized="nan"
    )
    np.testing.assert_array_equal(np.argwhere(np.isnan(got[1])), [[3]])
    assert np.isnan(np.asarray(got[3])).all()  # Tiles of 128×1 all have a value of that row.
    assert not np.isnan(np.asarray(got[0], np.float32)[np.arange(128) != 3]).any()


def assert_close_codes(got, want):
    """Nearly all codes the same, and the others next to them: the sigmoid may differ in its last bit."""
    codes, scales = got
    assert (codes.shape, codes.dtype, scales.shape) == (want.codes.shape, want.codes.dtype, want.scales.shape)
    np.testing.assert_allclose(scales, want.scales, rtol=2**-7)
    steps = np.abs(ordered(codes) - ordered(want.codes))
    assert steps.max() <= 1
    assert (steps == 0).mean() > 0.99


def ordered(codes):
    """Integers that follow each other as E4M3 numbers do."""
    bits = np.asarray(codes).view(np.uint8).astype(int)
    return np.where(bits < 128, bits, 128 - bits)


def test_what_is_not_finite_makes_its_tiles_nan_and_no_other():
    gate_up, _, weights = swiglu_problem(64, 128, jnp.bfloat16)
    gate_up = gate_up.at[3, 7].set(jnp.nan)  # The gate's: hidden's tile too.
    _, hidden_scales, _, kept_scales = interpret(
        mosaic_gpu_swiglu.quantize_swiglu, gate_up, weights, False, 1e-4, uninitialized="nan"
    )
    for scales in (hidden_scales, kept_scales):
        np.testing.assert_array_equal(np.argwhere(np.isnan(scales)), [[3, 0]])


def test_vmap_adds_a_dimension_to_the_grid():
    gate_up, _, _ = swiglu_problem(32, 128, jnp.float32)
    several = jnp.stack([gate_up, -gate_up])

    def run(x, **how):
        return jax.vmap(lambda x: mosaic_gpu_swiglu.quantize_swiglu(x, None, False, 1e-4, **how))(x)

    hidden, scales, _, _ = interpret(run, several)
    want, _ = quantize_swiglu(several[1])
    assert_close_codes((hidden[1], scales[1]), want)


@pytest.mark.parametrize("shape", [(0, 256), (200, 0)])
def test_empty_matrices(shape):
    gate_up, weights, (rows, both) = jnp.zeros(shape, jnp.bfloat16), jnp.ones(shape[0]), shape
    hidden, kept = quantize_swiglu(gate_up, weights)
    got = mosaic_gpu_swiglu.quantize_swiglu(gate_up, weights, False, 1e-4)
    assert_same_bits(got, (hidden.codes, hidden.scales, kept.codes, kept.scales))
    dhidden = jnp.zeros((rows, both // 2), jnp.bfloat16)
    got = mosaic_gpu_swiglu.swiglu_backward(kept.codes, kept.scales, dhidden, weights, False, 1e-4)
    want = swiglu_backward(kept, dhidden, weights)
    assert_same_bits(got, (want.gate_up, want.weights, want.hidden.codes.T, want.hidden.scales))
    columns = requantize(kept, COLUMN)
    got = mosaic_gpu_requantize.requantize_columns(kept.codes, kept.scales, False, 1e-4)
    assert_same_bits(got, (columns.codes.T, columns.scales))


def test_on_another_device_they_say_why_they_cannot_run():
    if jax.default_backend() == "gpu":
        pytest.skip("this device may be a Hopper GPU")
    x = jnp.ones((4, 256))
    hidden, kept = quantize_swiglu(x)
    message = r"'mosaic_gpu' cannot run here: .*compute capability 9\.0.*jax runs on cpu"
    for name, call in {
        "quantize_swiglu": lambda how: quantize_swiglu(x, implementation=how),
        "swiglu_backward": lambda how: swiglu_backward(kept, x[:, :128], implementation=how),
        "requantize": lambda how: requantize(hidden, COLUMN, implementation=how),
    }.items():
        with pytest.raises(ValueError, match=f"{name}: implementation {message}"):
            call("mosaic_gpu")


def test_on_a_hopper_gpu_arguments_decide(monkeypatch):
    for module in (mosaic_gpu_requantize, mosaic_gpu_swiglu):
        monkeypatch.setattr(module, "not_hopper", lambda: None)
    x, codes = jnp.ones((4, 256)), jnp.ones((4, 512), E4M3)
    swiglu, requantise = mosaic_gpu_swiglu.supported, mosaic_gpu_requantize.supported
    assert swiglu(x, 1e-4) is None
    assert swiglu(x, 1e-4, codes) is None
    assert "multiples of 128, so that no tile has channels of gate and up, not 100" in swiglu(x[:, :200], 1e-4)
    assert "not float16" in swiglu(x.astype(jnp.float16), 1e-4)
    assert "codes of float8_e5m2" in swiglu(x, 1e-4, codes.astype(jnp.float8_e5m2))
    assert "2^-100" in swiglu(x, 2.0)
    assert requantise(codes, ROW, COLUMN, E4M3, 1e-4) is None
    assert "not (1, 128) from (128, 1)" in requantise(codes, COLUMN, ROW, E4M3, 1e-4)
    assert "to float8_e5m2" in requantise(codes, ROW, COLUMN, jnp.dtype(jnp.float8_e5m2), 1e-4)
    assert "(2, 4, 512)" in requantise(jnp.stack([codes, codes]), ROW, COLUMN, E4M3, 1e-4)
    with pytest.raises(ValueError, match="quantize_swiglu: implementation 'mosaic_gpu' cannot run here: it needs F in"):
        mosaic_gpu_swiglu.quantize_swiglu(x[:, :200], None, False, 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "channels"), [(4096, 18432), (1000, 2048)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_on_a_gpu_they_are_the_reference(rows, channels, dtype):
    gate_up, dhidden, weights = swiglu_problem(rows, channels, dtype)
    obstacle = mosaic_gpu_swiglu.supported(gate_up, 1e-4)
    if obstacle:
        pytest.skip(obstacle)
    got, kept = quantize_swiglu(gate_up, weights, implementation="mosaic_gpu")
    want, _ = quantize_swiglu(gate_up, weights, implementation="reference")
    assert_close_codes((got.codes, got.scales), want)
    got = swiglu_backward(kept, dhidden, weights, implementation="mosaic_gpu")
    want = swiglu_backward(kept, dhidden, weights, implementation="reference")
    assert_close_codes((got.hidden.codes, got.hidden.scales), want.hidden)
    np.testing.assert_allclose(
        np.asarray(got.gate_up, np.float32), np.asarray(want.gate_up, np.float32), rtol=2**-7, atol=1e-4
    )
    np.testing.assert_allclose(got.weights, want.weights, rtol=1e-3, atol=1e-3)
    q = jax.device_put(kept, jax.devices("cpu")[0])  # A CPU rounds 1 / scale to nearest.
    columns = requantize(kept, COLUMN, implementation="mosaic_gpu")
    want = requantize(Quantized(q.codes, q.scales, q.tile), COLUMN, implementation="reference")
    assert_same_bits((columns.codes, columns.scales), (want.codes, want.scales))


if __name__ == "__main__":
    for problem in ((192, 128, jnp.bfloat16, True), (70, 128, jnp.float32, False)):
        backward_is_the_reference(*problem)
    backward_keeps_what_is_not_finite_in_its_tiles()
    print("backward passes agree")
