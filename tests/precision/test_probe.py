"""What the probe says of quantised tensors, and that it says and costs nothing while nobody asks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.precision import fp8, probe
from deepseek_jax.precision.policy import Fp8Config
from pallas_kernels.quantize import Quantized, quantize, quantize_e5m6

V3 = Fp8Config()
TOKENS, WIDTH, OUT = 130, 144, 96


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def reading_of(exact, rounded) -> probe.Reading:
    with probe.collecting() as readings:
        probe.report("x", (1,), exact, rounded)
    (reading,) = readings
    return reading


def test_underflow_counts_what_becomes_zero_and_was_not():
    """With a scale of 1, E4M3's least number is 2^-9: half of it and less rounds to zero. Zeros are not counted."""
    x = jnp.array([[448.0, 1.0, 2.0**-9, 2.0**-10, -(2.0**-11), 1e-20, 0.0, 0.0]])
    counts = reading_of(x, quantize(x, (1, 128))).counts
    assert (int(counts.nonzero), int(counts.underflow), int(counts.clipped), int(counts.not_finite)) == (6, 3, 0, 0)


def test_clipped_is_what_lies_beyond_the_largest_number_of_its_own_tile():
    """Of two tiles with scales of 1 and 2, the first ends at 448, the second at 896."""
    x = jnp.zeros((1, 256)).at[0, jnp.array([0, 1, 128, 129])].set(jnp.array([448.0, 500.0, 500.0, 1000.0]))
    rounded = Quantized(jnp.zeros((1, 256), jnp.float8_e4m3fn), jnp.array([[1.0, 2.0]]), (1, 128))
    assert int(reading_of(x, rounded).counts.clipped) == 2


@pytest.mark.parametrize("tile", [(1, 128), (128, 1), (128, 128), None])
def test_scales_that_follow_the_values_clip_nothing(tile):
    x = normal(0, 200, 300) * jnp.exp(3 * normal(1, 200, 300))
    reading = reading_of(x, quantize(x, tile))
    assert int(reading.counts.clipped) == 0
    assert (reading.tile, reading.format) == (tile, "E4M3")


def test_the_relative_error_is_the_root_of_the_mean_square():
    x = normal(0, 64, 256)
    for rounded, name in ((quantize(x, (1, 128), dtype=jnp.float8_e5m2), "E5M2"), (quantize_e5m6(x), "E5M6")):
        reading = reading_of(x, rounded)
        exact, got = np.asarray(x, np.float64), np.asarray(rounded.dequantize(), np.float64)
        expected = np.sqrt(np.square(got - exact).sum() / np.square(exact).sum())
        np.testing.assert_allclose(reading.counts.relative_error, expected, rtol=1e-5)
        assert reading.format == name
    assert reading_of(jnp.zeros((2, 2)), quantize(jnp.zeros((2, 2)), None)).counts.relative_error == 0


def test_what_is_not_finite_is_counted_and_left_out_of_the_error():
    """One NaN makes its tile NaN; the rest of the tensor still has an error."""
    x = normal(0, 2, 256).at[0, 3].set(jnp.nan).at[0, 5].set(jnp.inf)
    counts = reading_of(x, quantize(x, (1, 128))).counts
    assert int(counts.not_finite) == 2
    assert 0 < counts.relative_error < 0.05


def pulled(x, w, dy, config: Fp8Config = V3):
    """Forward and backward pass of a layer in one program, with its readings."""
    with probe.collecting() as readings:
        copy = fp8.quantize_weight(w, config)
        y, pull = jax.vjp(lambda x, w: fp8.linear(x, w, copy, config), x, w)
        return y, pull(dy), readings


def test_a_layer_reports_the_tensors_of_its_three_products():
    """x and dy, each in the tiles of both products that read it (section 3.3.2), from inside a jitted function."""
    x, w, dy = normal(0, TOKENS, WIDTH), normal(1, WIDTH, OUT), normal(2, TOKENS, OUT)
    _, _, readings = jax.jit(pulled)(x, w, dy)
    rows = quantize(x, (1, 128))
    expected = {
        "x for Fprop": ((1, 128), x, rows),
        "dy for Dgrad": ((1, 128), dy, quantize(dy, (1, 128))),
        "dy for Wgrad": ((128, 1), dy, quantize(dy, (128, 1))),
        "x for Wgrad": ((128, 1), rows.dequantize(), quantize(rows.dequantize(), (128, 1))),
    }
    assert [reading.role for reading in readings] == list(expected)
    for reading, (tile, exact, rounded) in zip(readings, expected.values(), strict=True):
        assert (reading.tile, reading.matrix) == (tile, (WIDTH, OUT))
        np.testing.assert_allclose(reading.counts, reading_of(exact, rounded).counts, rtol=1e-5)


def test_swiglu_and_attention_report_what_they_keep():
    gate_up, w = normal(0, TOKENS, 2 * WIDTH), normal(1, WIDTH, OUT)
    with probe.collecting() as readings:
        copy = fp8.quantize_weight(w, V3)
        jax.vjp(lambda g, w: fp8.swiglu_linear(g, w, copy, V3), gate_up, w)
        q, k, v = (normal(seed, 1, 16, 2, WIDTH // 2) for seed in range(3))
        jax.vjp(lambda q, k, v, w: fp8.attention_output(q, k, v, w, copy, V3, scale=0.1), q, k, v, w)
    assert [(r.role, r.format) for r in readings] == [
        ("x for Fprop", "E4M3"),
        ("SwiGLU's input, kept", "E4M3"),
        ("x for Fprop", "E4M3"),
        ("attention's output, kept", "E5M6"),
    ]


def test_nobody_collects_nothing_is_computed(monkeypatch):
    """The program of a training step is the same as without the probe, to the letter."""
    x, w, dy = normal(0, TOKENS, WIDTH), normal(1, WIDTH, OUT), normal(2, TOKENS, OUT)

    def program(collect: bool) -> str:
        def run(x, w, dy):  # a new function each time, so that no trace is used again
            if collect:
                return pulled(x, w, dy)
            copy = fp8.quantize_weight(w, V3)
            y, pull = jax.vjp(lambda x, w: fp8.linear(x, w, copy, V3), x, w)
            return y, pull(dy)

        return jax.jit(run).lower(x, w, dy).as_text()

    off = program(False)
    assert program(True) != off
    monkeypatch.setattr(probe, "report", lambda *arguments: None)
    assert program(False) == off


def test_collecting_ends_with_its_block():
    with probe.collecting() as readings:
        pass
    probe.report("x", (1,), normal(0, 2, 2), quantize(normal(0, 2, 2), None))
    assert readings == []
