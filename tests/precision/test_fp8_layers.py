"""Linear layers in FP8: each product reads the tiles of section 3.3.2, and what is kept is what the policy says."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.ad_checkpoint import saved_residuals

from deepseek_jax import ops
from deepseek_jax.precision import fp8
from deepseek_jax.precision.policy import Fp8Config
from pallas_kernels.quantize import Quantized, quantize, quantize_e5m6, requantize

TOKENS, WIDTH, OUT = 200, 192, 320
V3 = Fp8Config()


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def product(a: Quantized, b: Quantized) -> jax.Array:
    return a.dequantize() @ b.dequantize()


def close(value, expected):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max()))


def cosine_difference(a, b) -> float:
    a, b = (np.asarray(x, np.float64).ravel() for x in (a, b))
    return 1 - 2 * (a @ b) / (a @ a + b @ b)


def plain(config: Fp8Config = V3):
    """x, w, its copy, dy; and the layer's output and gradients."""
    x, w, dy = normal(0, TOKENS, WIDTH), normal(1, WIDTH, OUT), normal(2, TOKENS, OUT)
    copy = fp8.quantize_weight(w, config)
    y, pull = jax.vjp(lambda x, w: fp8.linear(x, w, copy, config), x, w)
    return x, w, copy, dy, y, *pull(dy)


def test_the_three_products_read_the_tiles_of_the_table():
    """Fprop 1×128 by 128×128, Dgrad 1×128 by the same, Wgrad 128×1 by 128×1: x again from its tiles, dy from itself."""
    x, w, _, dy, y, dx, dw = plain()
    blocks = quantize(w, (128, 128))
    close(y, product(quantize(x, (1, 128)), blocks))
    close(dx, product(quantize(dy, (1, 128)), blocks.T))
    close(dw, product(requantize(quantize(x, (1, 128)), (128, 1)).T, quantize(dy, (128, 1))))


def test_the_weight_itself_is_never_read():
    """It is there for its gradient alone, so a step need not keep it beside its copy."""
    x, w, copy, dy, y, dx, dw = plain()
    other, pull = jax.vjp(lambda x, w: fp8.linear(x, w, copy, V3), x, jnp.full_like(w, jnp.nan))
    for ours, theirs in zip((y, dx, dw), (other, *pull(dy)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_products_are_close_to_those_of_full_precision():
    x, w, _, dy, y, dx, dw = plain()
    assert cosine_difference(y, x @ w) < 1e-3
    assert cosine_difference(dx, dy @ w.T) < 1e-3
    assert cosine_difference(dw, x.T @ dy) < 1.5e-3


def test_gradients_may_be_as_small_as_those_of_a_mean_over_millions_of_tokens():
    """Scaled by 2^-30, nothing but exponents changes."""
    x, w, copy, dy, _, dx, dw = plain()
    _, pull = jax.vjp(lambda x, w: fp8.linear(x, w, copy, V3), x, w)
    for small, whole in zip(pull(dy * 2.0**-30), (dx, dw), strict=True):
        np.testing.assert_allclose(small * 2.0**30, whole, rtol=1e-6, atol=1e-6)
        assert float(jnp.abs(small).max()) < 1e-6


COMPARISONS = {
    "weights": ("tensor", lambda x, dy, w: (quantize(x, (1, 128)), quantize(dy, (1, 128)), quantize(w, None))),
    "activations": ("tensor", lambda x, dy, w: (quantize(x, None), quantize(dy, (1, 128)), quantize(w, (128, 128)))),
    "gradients": ("tensor", lambda x, dy, w: (quantize(x, (1, 128)), quantize(dy, None), quantize(w, (128, 128)))),
    "gradient_format": (
        "e5m2",
        lambda x, dy, w: (
            quantize(x, (1, 128)),
            quantize(dy, (1, 128), dtype=jnp.float8_e5m2),
            quantize(w, (128, 128)),
        ),
    ),
    "power_of_two_scales": (
        True,
        lambda x, dy, w: tuple(
            quantize(a, tile, power_of_two=True) for a, tile in ((x, (1, 128)), (dy, (1, 128)), (w, (128, 128)))
        ),
    ),
}


@pytest.mark.parametrize("field", COMPARISONS)
def test_every_switch_changes_what_it_says(field):
    value, quantised = COMPARISONS[field]
    x, w, _, dy, y, dx, _ = plain(dataclasses.replace(V3, **{field: value}))
    of_x, of_dy, of_w = quantised(x, dy, w)
    close(y, product(of_x, of_w))
    close(dx, of_dy.dequantize() @ of_w.dequantize().T)


def test_gradients_in_blocks_have_one_scale_for_128_tokens_and_128_channels():
    _, w, _, dy, _, dx, _ = plain(dataclasses.replace(V3, gradients="block"))
    close(dx, quantize(dy, (128, 128)).dequantize() @ quantize(w, (128, 128)).dequantize().T)


def test_without_promotion_sums_lose_what_14_bits_lose():
    _, _, _, _, y, _, _ = plain()
    _, _, _, _, short, _, _ = plain(dataclasses.replace(V3, promote=False))
    error = float(jnp.abs(short - y).max() / jnp.abs(y).max())
    assert 1e-5 < error < 2e-2


# --- SwiGLU, attention ------------------------------------------------------------------------------------------------


def test_swiglu_is_made_again_from_its_input_in_fp8():
    """Forward reads the input as it is, backward the copy in FP8 (section 3.3.3)."""
    gate_up, w, dy = normal(0, TOKENS, 2 * WIDTH), normal(1, WIDTH, OUT), normal(2, TOKENS, OUT)
    copy = fp8.quantize_weight(w, V3)
    y, pull = jax.vjp(lambda g, w: fp8.swiglu_linear(g, w, copy, V3), gate_up, w)
    dgate_up, dw = pull(dy)
    close(y, product(quantize(ops.swiglu(gate_up), (1, 128)), copy))
    hidden, pull_hidden = jax.vjp(ops.swiglu, quantize(gate_up, (1, 128)).dequantize())
    close(dgate_up, pull_hidden(product(quantize(dy, (1, 128)), copy.T))[0])
    close(dw, product(quantize(hidden, (128, 1)).T, quantize(dy, (128, 1))))


def test_attention_and_its_projection_keep_one_e5m6_array():
    """Forward: attention's output in E4M3 with powers of two. Backward: of both, its E5M6 copy."""
    heads, head = 2, 64
    q, k, v = (normal(seed, 2, 100, heads, head) for seed in range(3))
    w, dy = normal(3, heads * head, OUT), normal(4, 2, 100, OUT)
    copy = fp8.quantize_weight(w, V3)
    run = lambda q, k, v, w: fp8.attention_output(q, k, v, w, copy, V3, scale=0.1)  # noqa: E731
    y, pull = jax.vjp(run, q, k, v, w)
    dq, dk, dv, dw = pull(dy)
    out, pull_attention = jax.vjp(functools.partial(ops.attention, scale=0.1), q, k, v)
    flat, dy = out.reshape(-1, heads * head), dy.reshape(-1, OUT)
    close(y.reshape(-1, OUT), product(quantize(flat, (1, 128), power_of_two=True), copy))
    rounded = quantize_e5m6(flat).dequantize(jnp.float32)
    close(dw, product(quantize(rounded, (128, 1), power_of_two=True).T, quantize(dy, (128, 1))))
    dout = product(quantize(dy, (1, 128)), copy.T).reshape(out.shape)
    for ours, exact in zip((dq, dk, dv), pull_attention(dout), strict=True):
        assert cosine_difference(ours, exact) < 1e-4  # six bits of fraction in one term


# --- routed experts ---------------------------------------------------------------------------------------------------

SIZES = np.array([200, 0, 1, 128], np.int32)
ROWS = 640  # 256 + 0 + 128 + 128, and as many more that belong to none


def rows_of(seed: int, width: int) -> jax.Array:
    """Random rows, zero between groups."""
    starts = ops.group_starts(jnp.asarray(SIZES), fp8.ALIGNMENT)
    row = np.arange(ROWS)[:, None]
    mine = ((row >= np.asarray(starts)) & (row < np.asarray(starts) + SIZES)).any(axis=1)
    return jnp.where(mine[:, None], normal(seed, ROWS, width), 0)


def each_group(function):
    """`function(slice of rows, expert)` for every group that has rows."""
    starts = np.asarray(ops.group_starts(jnp.asarray(SIZES), fp8.ALIGNMENT))
    return [function(slice(s, s + n), e) for e, (s, n) in enumerate(zip(starts, SIZES, strict=True)) if n]


def test_routed_rows_are_those_of_each_expert_alone():
    """Tiles restart with each expert; powers of two for what travels; no rows, no gradient."""
    x, w, dy = rows_of(0, WIDTH), normal(1, 4, WIDTH, OUT), rows_of(2, OUT)
    copy = fp8.quantize_weight(w, V3)
    y, pull = jax.vjp(lambda x, w: fp8.routed_linear(x, w, copy, jnp.asarray(SIZES), V3), x, w)
    dx, dw = pull(dy)

    def check(rows, expert):
        tiles, blocks = quantize(x[rows], (1, 128), power_of_two=True), quantize(w[expert], (128, 128))
        close(y[rows], product(tiles, blocks))
        close(dx[rows], product(quantize(dy[rows], (1, 128)), blocks.T))
        columns = requantize(tiles, (128, 1), power_of_two=True)
        close(dw[expert], product(columns.T, quantize(dy[rows], (128, 1))))

    each_group(check)
    assert not dw[1].any()


def test_the_down_projection_gets_gradients_that_travelled():
    """dy has nothing but its 1×128 tiles, with powers of two; the combine weight multiplies the hidden activations."""
    gate_up, w, dy = rows_of(0, 2 * WIDTH), normal(1, 4, WIDTH, OUT), rows_of(2, OUT)
    weights = jnp.where(gate_up.any(axis=1), jnp.abs(normal(3, ROWS)), 0)
    copy = fp8.quantize_weight(w, V3)
    run = lambda g, c, w: fp8.routed_swiglu_linear(g, c, w, copy, jnp.asarray(SIZES), V3)  # noqa: E731
    y, pull = jax.vjp(run, gate_up, weights, w)
    dgate_up, dweights, dw = pull(dy)

    def check(rows, expert):
        def hidden(g, c):
            return ops.swiglu(g) * c[:, None]

        blocks, tiles = quantize(w[expert], (128, 128)), quantize(dy[rows], (1, 128), power_of_two=True)
        close(y[rows], product(quantize(hidden(gate_up[rows], weights[rows]), (1, 128)), blocks))
        again, back = jax.vjp(hidden, quantize(gate_up[rows], (1, 128)).dequantize(), weights[rows])
        expected = back(product(tiles, blocks.T))
        close(dgate_up[rows], expected[0])
        close(dweights[rows], expected[1])
        columns = requantize(tiles, (128, 1), power_of_two=True)
        close(dw[expert], product(quantize(again, (128, 1)).T, columns))

    each_group(check)


# --- what is kept -----------------------------------------------------------------------------------------------------


def kept(function, *arguments) -> list[tuple[str, tuple[int, ...]]]:
    """dtype and shape of what a function keeps for its backward pass and is no argument of it."""
    found = [(aval, source) for aval, source in saved_residuals(function, *arguments) if "argument" not in source]
    return sorted((aval.dtype.name, aval.shape) for aval, _ in found)


def test_a_linear_layer_keeps_codes_and_scales():
    x, w = normal(0, 256, 256), normal(1, 256, 128)
    copy = fp8.quantize_weight(w, V3)
    found = kept(lambda x, w: fp8.linear(x, w, copy, V3).sum(), x, w)
    assert ("float8_e4m3fn", (256, 256)) in found
    assert ("float32", (256, 2)) in found
    assert not [one for one in found if one[0] == "float32" and np.prod(one[1]) >= x.size]


def test_swiglu_keeps_its_input_in_fp8_and_no_output():
    gate_up, w = normal(0, 256, 512), normal(1, 256, 128)
    copy = fp8.quantize_weight(w, V3)
    found = kept(lambda g, w: fp8.swiglu_linear(g, w, copy, V3).sum(), gate_up, w)
    assert ("float8_e4m3fn", (256, 512)) in found
    assert not [one for one in found if one[0] == "float32" and np.prod(one[1]) >= 256 * 256]


def test_attention_keeps_twelve_bits_of_each_output():
    q, k, v = (normal(seed, 1, 256, 2, 128) for seed in range(3))
    w = normal(3, 256, 128)
    copy = fp8.quantize_weight(w, V3)
    found = kept(lambda q, k, v, w: fp8.attention_output(q, k, v, w, copy, V3, scale=0.1).sum(), q, k, v, w)
    assert ("uint8", (256, 384)) in found
    assert not [one for one in found if one[0] == "float32" and np.prod(one[1]) >= q.size]
