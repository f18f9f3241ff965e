"""`quantize_swiglu` and `swiglu_backward`: what training in FP8 makes of SwiGLU, and its backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import ops
from pallas_kernels.quantize import quantize, quantize_swiglu, requantize, swiglu_backward

ROW, COLUMN = (1, 128), (128, 1)


def problem(rows=70, channels=200, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    gate_up, dhidden, weights = (
        jnp.asarray(rng.standard_normal(s) * 2, d)
        for s, d in (((rows, 2 * channels), dtype), ((rows, channels), dtype), (rows, jnp.float32))
    )
    return gate_up, dhidden, weights


def assert_same(got, want):
    np.testing.assert_array_equal(np.asarray(got.codes, np.float32), np.asarray(want.codes, np.float32))
    np.testing.assert_array_equal(got.scales, want.scales)
    assert got.tile == want.tile


@pytest.mark.parametrize("weighted", [True, False])
def test_the_forward_pass_is_swiglu_then_quantise(weighted):
    gate_up, _, weights = problem()
    output, kept = quantize_swiglu(gate_up, weights if weighted else None, power_of_two=True)
    hidden = ops.swiglu(gate_up) * (weights[:, None] if weighted else 1)
    assert_same(output, quantize(hidden, ROW, power_of_two=True))
    assert_same(kept, quantize(gate_up, ROW, power_of_two=True))


@pytest.mark.parametrize("weighted", [True, False])
def test_the_backward_pass_is_that_of_swiglu_at_what_was_kept(weighted):
    gate_up, dhidden, weights = problem()
    weights = weights if weighted else None
    _, kept = quantize_swiglu(gate_up, weights)

    def hidden(gate_up, weights):
        return ops.swiglu(gate_up) if weights is None else ops.swiglu(gate_up) * weights[:, None]

    value, pull = jax.vjp(hidden, kept.dequantize(), weights)
    dgate_up, dweights = pull(dhidden)
    got = swiglu_backward(kept, dhidden, weights, smallest_amax=1e-3)
    np.testing.assert_allclose(got.gate_up, dgate_up, rtol=1e-6, atol=1e-6)
    assert_same(got.hidden, quantize(value, COLUMN, smallest_amax=1e-3))
    if weighted:
        np.testing.assert_allclose(got.weights, dweights, rtol=1e-5, atol=1e-5)
    else:
        assert got.weights is None


def test_derivatives_by_differences():
    """In float64, where what was kept is FP8 and exact: scales are powers of two."""
    with jax.enable_x64(True):
        gate_up, dhidden, weights = (x.astype(jnp.float64) for x in problem(5, 128))
        _, kept = quantize_swiglu(gate_up, weights, power_of_two=True)
        got = swiglu_backward(kept, dhidden, weights)
        x = np.asarray(kept.dequantize(jnp.float64))

        def loss(x, weights):
            gate, up = np.split(x, 2, axis=1)
            return (gate / (1 + np.exp(-gate)) * up * np.asarray(weights)[:, None] * np.asarray(dhidden)).sum(1)

        for column in (3, 130):  # One of the gate, one of up.
            step = np.zeros_like(x)
            step[:, column] = 1e-6
            slope = (loss(x + step, weights) - loss(x - step, weights)) / 2e-6
            np.testing.assert_allclose(got.gate_up[:, column], slope, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(got.weights, loss(x, np.ones(5)), rtol=1e-9)


def test_values_are_rounded_once():
    """bfloat16 in, float32 between: no rounding of the sigmoid, of silu, or before the weight."""
    gate_up, dhidden, weights = problem(dtype=jnp.bfloat16)
    output, kept = quantize_swiglu(gate_up, weights)
    exact = ops.swiglu(gate_up.astype(jnp.float32)) * weights[:, None]
    assert_same(output, quantize(exact.astype(jnp.bfloat16), ROW))
    got = swiglu_backward(kept, dhidden, weights)
    assert (got.gate_up.dtype, got.weights.dtype) == (jnp.bfloat16, jnp.float32)


def test_vmap_and_requantise():
    gate_up, dhidden, weights = problem(4, 128)
    both = jnp.stack([gate_up, -gate_up])
    output, kept = jax.vmap(lambda x: quantize_swiglu(x, weights))(both)
    got = jax.vmap(lambda kept, dy: swiglu_backward(kept, dy, weights))(kept, jnp.stack([dhidden, dhidden]))
    output_1, kept_1 = quantize_swiglu(-gate_up, weights)
    np.testing.assert_array_equal(output.scales[1], output_1.scales)
    want = swiglu_backward(kept_1, dhidden, weights)
    np.testing.assert_allclose(got.gate_up[1], want.gate_up, rtol=1e-6, atol=1e-6)
    columns = jax.vmap(lambda q: requantize(q, COLUMN))(output)
    np.testing.assert_array_equal(columns.scales[1], requantize(output_1, COLUMN).scales)


@pytest.mark.parametrize("shape", [(0, 256), (3, 0)])
def test_empty_matrices(shape):
    gate_up, weights = jnp.zeros(shape), jnp.ones(shape[0])
    output, kept = quantize_swiglu(gate_up, weights)
    assert (output.shape, kept.shape) == ((shape[0], shape[1] // 2), shape)
    got = swiglu_backward(kept, jnp.zeros(output.shape), weights)
    assert (got.gate_up.shape, got.weights.shape, got.hidden.shape) == (shape, shape[:1], output.shape)


def test_bad_arguments():
    x, w = jnp.ones((4, 256)), jnp.ones(4)
    _, kept = quantize_swiglu(x)
    for message, call in {
        r"quantize_swiglu needs gate_up \[T, 2F\] of floats, not \(4, 5\)": lambda: quantize_swiglu(x[:, :5]),
        r"not \(4, 256\) of int32": lambda: quantize_swiglu(x.astype(jnp.int32)),
        r"quantize_swiglu needs weights \[4\] of a float dtype, not \(3,\)": lambda: quantize_swiglu(x, w[:3]),
        r"needs kept \[T, 2F\] in tiles of 1×128 and dhidden \[T, F\]": lambda: swiglu_backward(kept, x),
        r"not \(4, 256\) in \(128, 1\)": lambda: swiglu_backward(quantize(x, COLUMN), x[:, :128]),
        r"swiglu_backward needs weights \[4\]": lambda: swiglu_backward(kept, x[:, :128], x[:, 0] > 0),
        "quantize_swiglu has no implementation 'fast'": lambda: quantize_swiglu(x, implementation="fast"),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
