"""The Hopper kernels of `grouped_matmul` for bfloat16 arrays, run on a CPU by Pallas' interpreter; no data races.

What it does not show is said in test_mosaic_matmul.py. test_mosaic_grouped_aot.py looks at the programs for sm_90a.
"""

import jax
import jax.numpy as jnp
import mosaic_interpreter
import numpy as np
import pytest

from pallas_kernels.block_scaled_matmul import mosaic_gpu as block_scaled
from pallas_kernels.block_scaled_matmul.config import Groups
from pallas_kernels.grouped_matmul import (
    blocked,
    group_starts,
    grouped_matmul,
    grouped_matmul_dw,
    grouped_matmul_dx,
    mosaic_gpu,
    vjp,
)
from pallas_kernels.grouped_matmul.config import ArrayConfig, default_array_config

BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
needs_clusters = pytest.mark.skipif(
    not block_scaled.INTERPRETED_WHOLE, reason=f"the interpreter of jax {jax.__version__} has no clusters; 0.11.2 has"
)


def problem(sizes, alignment, rows, k, n):
    """x `[M, K]`, w `[G, K, N]`, g `[M, N]`, the sizes, and which rows are in a group."""
    rng = np.random.default_rng(0)
    real = np.zeros((rows, 1), bool)
    for start, size in zip(np.asarray(group_starts(jnp.asarray(sizes), alignment)), sizes, strict=True):
        real[start : start + size] = True
    x, w, g = (jnp.asarray(rng.standard_normal(s), BF16) for s in ((rows, k), (len(sizes), k, n), (rows, n)))
    return x, w, g, jnp.asarray(sizes, jnp.int32), real


def assert_close(got, wanted, rounding=0.0):
    """float32 sums in another order, rounded to a dtype whose numbers are `rounding` apart."""
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, np.asarray(wanted, np.float32), rtol=1e-5 + rounding, atol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "alignment", "rows", "config", "sms"),
    [
        # Groups begin and end anywhere: all of a group within a step of 64 rows, steps with rows of two, and of none.
        ([0, 130, 1, 0, 9, 3], 1, 150, ArrayConfig(128, 64, stages=3), 1),
        # Padding between groups; three consumers.
        ([70, 0, 60], 8, 200, ArrayConfig(192, 64, stages=2), 1),
        pytest.param([70, 80], 1, 150, ArrayConfig(128, 64, stages=3, cluster=2), 2, marks=needs_clusters),
    ],
)
def test_value_and_gradients_are_the_references_whatever_padding_holds(sizes, alignment, rows, config, sms):
    """Fprop, Dgrad and Wgrad, by `jax.vjp`; nothing is a multiple of a tile, and other rows are NaN."""
    x, w, g, sizes, real = problem(sizes, alignment, rows, 136, 72)

    def value_and_gradients(multiply, x, w, g):
        y, gradients = jax.vjp(lambda x, w: multiply(x, w), x, w)
        return y, *gradients(g)

    def with_kernels(x, w, g, interpret):
        products = mosaic_gpu.products(config, sms, interpret)
        return value_and_gradients(lambda x, w: vjp.grouped_matmul(x, w, sizes, alignment, BF16, products), x, w, g)

    def reference(x, w):
        return grouped_matmul(x, w, sizes, alignment=alignment, implementation="reference")

    poisoned = (jnp.where(real, a, jnp.nan) for a in (x, g))
    y, dx, dw = mosaic_interpreter.run(lambda x, g, interpret: with_kernels(x, w, g, interpret), *poisoned)
    wanted = value_and_gradients(reference, *(a.astype(F32) for a in (x, w, g)))
    for got, want in zip((y, dx, dw), wanted, strict=True):
        assert_close(got, want, 2**-8)
    assert not y[~real[:, 0]].any()
    assert not dx[~real[:, 0]].any()
    assert not dw[np.asarray(sizes) == 0].any()


def test_a_float32_result_and_its_gradient():
    """Which is rounded to bfloat16 before the kernels read it."""
    x, w, g, sizes, _ = problem([5, 0, 70], 1, 75, 64, 64)

    def gradients(x, w, g, interpret):
        products = mosaic_gpu.products(ArrayConfig(128, 64, stages=2), 1, interpret)
        y, pull = jax.vjp(lambda x, w: vjp.grouped_matmul(x, w, sizes, 1, F32, products), x, w)
        assert y.dtype == F32
        dx, dw = pull(g.astype(F32))
        assert dx.dtype == dw.dtype == BF16
        return y, dx

    y, dx = mosaic_interpreter.run(gradients, x, w, g)
    wide = [a.astype(F32) for a in (x, w, g)]
    wanted, pull = jax.vjp(lambda x: grouped_matmul(x, wide[1], sizes, implementation="reference"), wide[0])
    assert_close(y, wanted)
    assert_close(dx, pull(wide[2])[0], 2**-8)


def test_nothing_of_one_group_reaches_anothers_gradient():
    """Rows of NaN next to others, within one step; and fresh shared memory is NaN."""
    x, _, dy, sizes, _ = problem([30, 20, 78], 1, 128, 64, 64)
    nan = ((np.arange(128) >= 30) & (np.arange(128) < 50))[:, None]
    got = mosaic_interpreter.run(
        mosaic_gpu.rows_by_rows,
        *(jnp.where(nan, jnp.nan, a) for a in (x, dy)),
        sizes,
        1,
        config=ArrayConfig(128, 64, stages=2),
        sms=1,
        uninitialized="nan",
    )
    assert np.isnan(got[1]).all()
    wanted = grouped_matmul_dw(x.astype(F32), dy.astype(F32), sizes, implementation="reference")
    assert_close(got[[0, 2]], wanted[np.asarray([0, 2])])


def test_vmap_calls_the_kernels_once_for_each_element():
    x, w, _, sizes, _ = problem([5, 3], 1, 8, 64, 64)
    xs, ws, many = jnp.stack([x, -x]), jnp.stack([w, w + 1]), jnp.stack([sizes, sizes[::-1]])

    def products(xs, ws, many, interpret):
        kernels = mosaic_gpu.products(ArrayConfig(128, 64, stages=2), 1, interpret)
        return jax.vmap(lambda x, w, sizes: vjp.grouped_matmul(x, w, sizes, 1, F32, kernels))(xs, ws, many)

    reference = jax.vmap(lambda x, w, sizes: grouped_matmul(x, w, sizes, implementation="reference"))
    assert_close(mosaic_interpreter.run(products, xs, ws, many), reference(xs.astype(F32), ws.astype(F32), many))


@pytest.mark.parametrize("out_dtype", [BF16, F32])
@pytest.mark.parametrize("along", ["rows", "depth"])
def test_the_default_fits(along, out_dtype):
    for m, n in ((64, 2048), (16384, 4096), (7168, 4096)):
        config = default_array_config(m, n, out_dtype, 132, Groups(along, 32))
        config.check_memory(out_dtype)
        assert config.stages >= 3


def test_what_cannot_be_run_says_why():
    x, w, dy, sizes, _ = problem([3, 5], 1, 8, 64, 64)
    with pytest.raises(ValueError, match=r"grouped_matmul: .*needs arrays of bfloat16, not float32 and bfloat16"):
        mosaic_gpu.rows_by_matrices(x.astype(F32), w, sizes, 1, F32, sms=1)
    with pytest.raises(ValueError, match=r"grouped_matmul_dw: .*results of bfloat16 or float32, not float16"):
        mosaic_gpu.rows_by_rows(x, dy, sizes, 1, jnp.dtype(jnp.float16), sms=1)
    with pytest.raises(ValueError, match="192×256 needs more registers than there are; take 128×256 or 192×128"):
        ArrayConfig(192, 256)
    with pytest.raises(ValueError, match="ArrayConfig: tile_n must be one of 64, 128, 256, not 32"):
        ArrayConfig(tile_n=32)


def test_the_api_reaches_the_kernels(monkeypatch):
    """Value and gradients of `implementation="mosaic_gpu"`: on a CPU, with others in the kernels' place."""
    x, w, g, sizes, _ = problem([5, 0, 30], 8, 48, 64, 64)
    calls = []

    def by_matrices(x, w, group_sizes, alignment, out_dtype, contract=1, **_):
        calls.append(f"contract {contract}")
        return blocked.rows_by_matrices(x, w, group_sizes, alignment, out_dtype, contract)

    def by_rows(x, dy, group_sizes, alignment, out_dtype=None, **_):
        calls.append("rows by rows")
        return blocked.rows_by_rows(x, dy, group_sizes, alignment, out_dtype)

    monkeypatch.setattr(mosaic_gpu, "not_hopper", lambda: None)
    monkeypatch.setattr(mosaic_gpu, "rows_by_matrices", by_matrices)
    monkeypatch.setattr(mosaic_gpu, "rows_by_rows", by_rows)
    options = {"alignment": 8, "implementation": "mosaic_gpu"}
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, **options), x, w)
    dx, dw = pull(g)
    assert calls == ["contract 1", "contract 2", "rows by rows"]
    options = {"alignment": 8, "implementation": "blocked"}
    np.testing.assert_array_equal(y, grouped_matmul(x, w, sizes, **options))
    np.testing.assert_array_equal(dx, grouped_matmul_dx(g, w, sizes, **options))
    np.testing.assert_array_equal(dw, grouped_matmul_dw(x, g, sizes, **options).astype(BF16))
    for function, a, b in ((grouped_matmul_dx, g, w), (grouped_matmul_dw, x, g)):
        function(a, b, sizes, alignment=8, implementation="mosaic_gpu")
    assert calls[3:] == ["contract 2", "rows by rows"]
    with pytest.raises(ValueError, match="'mosaic_gpu' cannot run here: it needs arrays of bfloat16, not float32"):
        grouped_matmul(x.astype(F32), w.astype(F32), sizes, implementation="mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("tile", [(192, 128), (128, 256), (128, 64)])
def test_on_a_gpu_value_and_gradients_are_the_references(tile, cluster):
    x, w, g, sizes, real = problem([0, 700, 1, 0, 300, 129], 1, 1200, 1000, 600)
    obstacle = mosaic_gpu.supported(x, w, BF16)
    if obstacle:
        pytest.skip(obstacle)
    poisoned, cotangent = (jnp.where(real, a, jnp.nan) for a in (x, g))
    products = mosaic_gpu.products(ArrayConfig(*tile, stages=3 if tile != (128, 256) else 2, cluster=cluster))
    y, pull = jax.vjp(lambda x, w: vjp.grouped_matmul(x, w, sizes, 1, BF16, products), poisoned, w)
    wanted, pull_wanted = jax.vjp(
        lambda x, w: grouped_matmul(x, w, sizes, implementation="reference"), x.astype(F32), w.astype(F32)
    )
    for got, want in zip((y, *pull(cotangent)), (wanted, *pull_wanted(g.astype(F32))), strict=True):
        np.testing.assert_allclose(got.astype(F32), want, rtol=2**-8, atol=2e-2)
