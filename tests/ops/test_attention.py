"""`ops.attention`: every implementation means the reference, and none but it holds `[S, S]`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import ops
from deepseek_jax.ops import attention as attention_function


def inputs(length, *, batch=2, heads=3, qk=8, value=5, dtype=jnp.float64, seed=0):
    """q, k, v, a cotangent, and segment ids that are sorted runs."""
    rng = np.random.default_rng(seed)
    q, k, v, g = (jnp.asarray(rng.standard_normal((batch, length, heads, d)), dtype) for d in (qk, qk, value, value))
    return q, k, v, g, jnp.asarray(np.sort(rng.integers(0, 5, (batch, length)), axis=1), jnp.int32)


def value_and_gradients(name, q, k, v, g, segment_ids):
    def f(q, k, v):
        out = ops.attention(q, k, v, scale=0.4, segment_ids=segment_ids, implementation=name)
        return (out * g).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return out, *gradients


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("length", [1, 128, 300])
def test_blockwise_is_the_reference(length, segmented):
    with jax.enable_x64(True):
        q, k, v, g, segments = inputs(length)
        segments = segments if segmented else None
        for wanted, got in zip(
            value_and_gradients("reference", q, k, v, g, segments),
            value_and_gradients("blockwise", q, k, v, g, segments),
            strict=True,
        ):
            np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-12)


def test_reference_by_hand():
    q, k, v, _, segments = inputs(9, batch=1, heads=1, dtype=jnp.float32)
    out = ops.attention(q, k, v, scale=0.4, segment_ids=segments, implementation="reference")
    for i in range(9):
        seen = [j for j in range(i + 1) if segments[0, j] == segments[0, i]]
        scores = np.exp([0.4 * float(q[0, i, 0] @ k[0, j, 0]) for j in seen])
        wanted = sum(s * np.asarray(v[0, j, 0]) for s, j in zip(scores, seen, strict=True)) / scores.sum()
        np.testing.assert_allclose(out[0, i, 0], wanted, rtol=1e-5)


def test_large_scores_stay_finite():
    q, k, v, g, segments = inputs(200, dtype=jnp.float32)
    results = value_and_gradients("blockwise", q * 300, k * 300, v, g, segments)
    assert all(bool(jnp.isfinite(x).all()) for x in results)


def test_bfloat16_keeps_its_dtype_and_float32_statistics():
    q, k, v, g, segments = inputs(200, dtype=jnp.bfloat16)
    got = value_and_gradients("blockwise", q, k, v, g, segments)
    wanted = value_and_gradients("reference", *(x.astype(jnp.float32) for x in (q, k, v, g)), segments)
    assert all(x.dtype == jnp.bfloat16 for x in got)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.05 * float(jnp.abs(b).max()))


def test_rows_in_several_groups_equal_rows_at_once(monkeypatch):
    q, k, v, g, segments = inputs(150, batch=6, dtype=jnp.float32)
    once = value_and_gradients("blockwise", q, k, v, g, segments)
    monkeypatch.setattr(module(), "_TILE_SCORES", 1)
    for a, b in zip(once, value_and_gradients("blockwise", q, k, v, g, segments), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def module():
    import sys

    return sys.modules[attention_function.__module__]


def compiled(length):
    def loss(q, k, v):
        return ops.attention(q, k, v, scale=0.1, implementation="blockwise").sum()

    shapes = [jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)] * 3
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes).compile()


@pytest.mark.parametrize("length", [1031, 2048])
def test_no_tensor_has_two_sequence_dimensions(length):
    padded = -(-length // 8) * 8
    for shape in re.findall(r"\w\d+\[([\d,]+)\]", compiled(length).as_text()):
        sizes = [int(s) for s in shape.split(",")]
        assert sum(s >= length for s in sizes) <= 1, f"[S, S] in {shape}"
        assert np.prod(sizes) < length * padded, f"as many elements as [S, S] in {shape}"


def test_temporary_memory_is_linear_and_the_program_does_not_grow():
    programs = [compiled(length) for length in (1024, 2048, 4096)]
    temporary = [p.memory_analysis().temp_size_in_bytes for p in programs]
    assert temporary[1] <= 2.1 * temporary[0]
    assert temporary[2] <= 2.1 * temporary[1]
    lines = [len(p.as_text().splitlines()) for p in programs]
    assert max(lines) <= 1.25 * min(lines)


def test_bad_arguments_say_what_would_be_valid():
    q, k, v, _, segments = inputs(8, dtype=jnp.float32)
    with pytest.raises(ValueError, match="cudnn, blockwise, reference"):
        ops.attention(q, k, v, scale=1.0, implementation="flash")
    with pytest.raises(ValueError, match=r"\[B, S, H, K\]"):
        ops.attention(q, k[:, :4], v, scale=1.0)
    with pytest.raises(ValueError, match="positive scale"):
        ops.attention(q, k, v, scale=0.0)
    with pytest.raises(ValueError, match="segment_ids"):
        ops.attention(q, k, v, scale=1.0, segment_ids=segments[:1])
