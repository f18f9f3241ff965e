"""Grouped matmuls of FP8 rows: Fprop, Dgrad and Wgrad of experts, with groups at multiples of 128."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fp8_oracle import dequantize

from pallas_kernels.grouped_matmul import (
    check_group_sizes,
    group_starts,
    grouped_matmul,
    grouped_matmul_dw,
    grouped_matmul_dx,
)
from pallas_kernels.quantize import Quantized, quantize

ROW, COLUMN, BLOCK = (1, 128), (128, 1), (128, 128)
K, N = 130, 200
SIZES = {
    "uneven, some empty": [0, 130, 1, 0, 255, 7],
    "all in one": [0, 0, 393, 0],
    "all empty": [0, 0, 0],
    "whole tiles": [128, 256],
}


def problem(name, alignment, *, spare=5, padding=0.0):
    """x [M, K], w [G, K, N], dy [M, N] float32, sizes, and the rows of each group; `padding` fills the others."""
    rng = np.random.default_rng(0)
    sizes = np.asarray(SIZES[name], np.int32)
    starts = np.asarray(group_starts(jnp.asarray(sizes), alignment))
    rows = int((-(-sizes // alignment) * alignment).sum()) + spare
    groups = [np.s_[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    real = np.zeros(rows, bool)
    for group in groups:
        real[group] = True
    x, w, dy = (rng.standard_normal(s).astype(np.float32) for s in ((rows, K), (len(sizes), K, N), (rows, N)))
    x[~real], dy[~real] = padding, padding
    return jnp.asarray(x), jnp.asarray(w), jnp.asarray(dy), jnp.asarray(sizes), groups, real


def exact(q):
    return dequantize(np.asarray(q.codes), np.asarray(q.scales), q.tile)


def close(got, wanted):
    assert got.shape == wanted.shape
    error = np.linalg.norm(np.asarray(got, np.float64) - wanted)
    assert error <= 1e-6 * np.linalg.norm(wanted)


@pytest.mark.parametrize("implementation", ["blocked", "reference"])
@pytest.mark.parametrize("alignment", [1, 128])
@pytest.mark.parametrize("name", SIZES)
def test_rows_times_their_matrices(name, alignment, implementation):
    """Fprop and Dgrad, group by group in float64; whatever padding rows hold, NaN included, they give zeros."""
    x, w, dy, sizes, groups, real = problem(name, alignment, padding=np.nan)
    xq, wq, dyq = quantize(x, ROW), quantize(w, BLOCK), quantize(dy, ROW)
    options = {"alignment": alignment, "out_dtype": jnp.float32, "implementation": implementation}
    y, dx = grouped_matmul(xq, wq, sizes, **options), grouped_matmul_dx(dyq, wq, sizes, **options)
    wanted_y, wanted_dx = np.zeros((len(x), N)), np.zeros((len(x), K))
    for g, group in enumerate(groups):
        matrix = exact(jax.tree.map(lambda leaf: leaf[g], wq))  # noqa: B023
        wanted_y[group], wanted_dx[group] = exact(xq)[group] @ matrix, exact(dyq)[group] @ matrix.T
    close(y, wanted_y)
    close(dx, wanted_dx)
    assert not np.asarray(y)[~real].any()
    assert not np.asarray(dx)[~real].any()


@pytest.mark.parametrize("implementation", ["blocked", "reference"])
@pytest.mark.parametrize("name", SIZES)
def test_rows_times_rows(name, implementation):
    """Wgrad: 128×1 tiles, none of which has rows of two groups; an empty group's gradient is exactly zero."""
    x, _, dy, sizes, groups, _ = problem(name, 128)
    xq, dyq = quantize(x, COLUMN), quantize(dy, COLUMN)
    # What lies in tiles of no group does not matter, nor do codes behind a group's last row.
    used = np.zeros(len(x), bool)
    for group in groups:
        used[group] = True
    poison = jnp.where(jnp.asarray(used)[:, None], xq.codes, jnp.asarray(np.nan, xq.codes.dtype))
    xq = Quantized(poison, xq.scales, COLUMN)
    dw = grouped_matmul_dw(xq, dyq, sizes, alignment=128, implementation=implementation)
    assert (dw.shape, dw.dtype) == ((len(groups), K, N), jnp.float32)
    wanted = np.stack([exact(xq)[group].T @ exact(dyq)[group] for group in groups])
    close(dw, wanted)
    assert not np.asarray(dw)[np.asarray(sizes) == 0].any()


@pytest.mark.parametrize("tile", [BLOCK, None])
def test_the_tiles_of_comparisons(tile):
    x, w, dy, sizes, _, _ = problem("uneven, some empty", 128)
    xq, wq, dyq = quantize(x, tile), quantize(w, tile and BLOCK), quantize(dy, tile)
    for f, a, b in ((grouped_matmul, xq, wq), (grouped_matmul_dx, dyq, wq), (grouped_matmul_dw, xq, dyq)):
        blocked, reference = (f(a, b, sizes, alignment=128, implementation=n) for n in ("blocked", "reference"))
        np.testing.assert_allclose(blocked.astype(jnp.float32), reference.astype(jnp.float32), rtol=2.0**-7, atol=1e-4)


def test_products_of_experts_point_where_the_unquantised_ones_do():
    rng = np.random.default_rng(0)
    sizes = jnp.asarray([256, 0, 300], jnp.int32)
    x, w, dy = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((640, 256), (3, 256, 384), (640, 384)))
    real = np.r_[np.arange(256), np.arange(256, 556)]
    x, dy = (jnp.zeros_like(a).at[real].set(a[real]) for a in (x, dy))
    wq = quantize(w, BLOCK)
    for f, a, b, exact_operands in (
        (grouped_matmul, quantize(x, ROW), wq, (x, w)),
        (grouped_matmul_dx, quantize(dy, ROW), wq, (dy, w)),
        (grouped_matmul_dw, quantize(x, COLUMN), quantize(dy, COLUMN), (x, dy)),
    ):
        got = np.asarray(f(a, b, sizes, alignment=128), np.float64).ravel()
        wanted = np.asarray(f(*exact_operands, sizes, alignment=128), np.float64).ravel()
        assert 1e-4 < 1 - got @ wanted / (np.linalg.norm(got) * np.linalg.norm(wanted)) < 1e-3


def test_the_result_is_bfloat16_unless_asked_otherwise():
    x, w, dy, sizes, _, _ = problem("whole tiles", 128)
    xq, wq = quantize(x, ROW), quantize(w, BLOCK)
    wide = grouped_matmul(xq, wq, sizes, out_dtype=jnp.float32)
    for y in (grouped_matmul(xq, wq, sizes), grouped_matmul(xq, wq, sizes, out_dtype=jnp.bfloat16)):
        np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))
    assert grouped_matmul_dx(quantize(dy, ROW), wq, sizes).dtype == jnp.bfloat16
    assert grouped_matmul(x, w, sizes, out_dtype=jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("implementation", ["blocked", "reference"])
def test_grouped_under_jit_vmap_and_shard_map(implementation):
    x, w, dy, sizes, _, _ = problem("uneven, some empty", 128)
    operands = (quantize(x, ROW), quantize(w, BLOCK), quantize(x, COLUMN), quantize(dy, COLUMN), sizes)

    def products(xq, wq, xc, dyc, sizes):
        options = {"alignment": 128, "implementation": implementation}
        return grouped_matmul(xq, wq, sizes, **options), grouped_matmul_dw(xc, dyc, sizes, **options)

    wanted = products(*operands)
    twice = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), operands)
    mesh = jax.make_mesh((1,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.P("expert")
    sharded = jax.shard_map(products, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=True)
    for got in (
        jax.jit(products)(*operands),
        jax.tree.map(lambda leaf: leaf[1], jax.vmap(products)(*twice)),
        jax.jit(sharded)(*operands),
    ):
        for a, b in zip(got, wanted, strict=True):
            np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=2.0**-7, atol=1e-3)


@pytest.mark.parametrize("implementation", ["blocked", "reference"])
def test_no_rows_at_all(implementation):
    x, w, sizes = jnp.zeros((0, 130)), jnp.zeros((2, 130, 8)), jnp.zeros(2, jnp.int32)
    for xq, wq, xc in ((x, w, x), (quantize(x, ROW), quantize(w, BLOCK), quantize(x, COLUMN))):
        assert grouped_matmul(xq, wq, sizes, implementation=implementation).shape == (0, 8)
        dw = grouped_matmul_dw(xc, xc, sizes, alignment=128, implementation=implementation)
        assert dw.shape == (2, 130, 130)
        assert not dw.any()


def test_bad_groups_and_tiles_say_what_would_be_valid():
    x, w, dy, sizes, _, _ = problem("whole tiles", 128)
    xq, wq, xc, dyc = quantize(x, ROW), quantize(w, BLOCK), quantize(x, COLUMN), quantize(dy, COLUMN)
    with pytest.raises(ValueError, match="tiles of 128 rows could straddle groups that start at multiples of 64"):
        grouped_matmul_dw(xc, dyc, sizes, alignment=64)
    with pytest.raises(ValueError, match="needs x in tiles of 1×128 or 128×128 or one scale"):
        grouped_matmul(xc, wq, sizes)
    with pytest.raises(ValueError, match="needs w in tiles of 128×128 or one scale"):
        grouped_matmul(xq, quantize(w, ROW), sizes)
    with pytest.raises(ValueError, match="needs dy in tiles of 128×1 or 128×128 or one scale"):
        grouped_matmul_dw(xc, quantize(dy, ROW), sizes, alignment=128)
    with pytest.raises(ValueError, match="both operands Quantized, but one is an array"):
        grouped_matmul(xq, w, sizes)
    with pytest.raises(ValueError, match=r"dy \[M, N\], w \[G, K, N\] and group_sizes \[G\]"):
        grouped_matmul_dx(xq, wq, sizes)
    with pytest.raises(ValueError, match=r"x \[M, K\], dy \[M, N\] and group_sizes \[G\]"):
        grouped_matmul_dw(xc, quantize(dy[:-1], COLUMN), sizes, alignment=128)
    with pytest.raises(ValueError, match="bfloat16 or float32, not float8_e4m3fn"):
        grouped_matmul(xq, wq, sizes, out_dtype=jnp.float8_e4m3fn)


def test_group_sizes_are_checked_on_the_host():
    check_group_sizes([3, 0, 5], 8)
    check_group_sizes(jnp.asarray([3, 0, 5], jnp.int32), 128 + 128, 128)
    check_group_sizes(np.zeros(0, int), 0)
    with pytest.raises(ValueError, match="need 9 rows with every group rounded up to 1, but there are 8"):
        check_group_sizes([3, 0, 6], 8)
    with pytest.raises(ValueError, match="need 256 rows with every group rounded up to 128, but there are 250"):
        check_group_sizes([3, 5, 0], 250, 128)
    with pytest.raises(ValueError, match="group 1 has -2 rows"):
        check_group_sizes([3, -2], 8)
    with pytest.raises(ValueError, match=r"\[G\] integers, not \(2,\) of float64"):
        check_group_sizes([3.0, 1.0], 8)
