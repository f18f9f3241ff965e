"""The Hopper kernel of `block_scaled_matmul`, run on a CPU by Pallas' interpreter, which also looks for data races.

What it does not run, and this file does not show: swizzled layouts, the bits that a `wgmma` keeps, and that blocks of a
cluster write to each other: here each reads all of a. Before jax 0.11.2 the interpreter had neither clusters nor the
`wgmma` with a transposed operand, in whose place the codes are multiplied. The program for sm_90a is looked at in
test_mosaic_aot.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import mosaic_interpreter
import numpy as np
import pytest

from pallas_kernels.block_scaled_matmul import block_scaled_matmul, mosaic_gpu, pipeline
from pallas_kernels.block_scaled_matmul.config import SHARED_MEMORY, MatmulConfig, default_config, rounds
from pallas_kernels.quantize import Quantized, quantize

ROW, COLUMN, BLOCK = (1, 128), (128, 1), (128, 128)
needs_clusters = pytest.mark.skipif(
    not mosaic_gpu.INTERPRETED_WHOLE, reason=f"the interpreter of jax {jax.__version__} has no clusters; 0.11.2 has"
)
V3_WEIGHTS = [(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def operands(m, n, k):
    return quantize(normal(0, m, k), ROW), quantize(normal(1, k, n), BLOCK)


def run(a, b, config, sms, out_dtype=jnp.float32, uninitialized="zero"):
    options = {"config": config, "sms": sms, "uninitialized": uninitialized}
    return mosaic_interpreter.run(mosaic_gpu.block_scaled_matmul, a, b, jnp.dtype(out_dtype), **options)


def wanted(a, b):
    return np.asarray(block_scaled_matmul(a, b, out_dtype=jnp.float32, implementation="reference"))


def assert_equal(got, a, b):
    """Within 1e-6 of the sums of magnitudes, since a sum may cancel: float32 sums in another order."""
    size = np.abs(np.asarray(a.dequantize())) @ np.abs(np.asarray(b.dequantize()))
    assert got.shape == size.shape
    assert (np.abs(got - wanted(a, b)) <= 1e-6 * size).all()


@pytest.mark.parametrize(
    ("sizes", "config", "sms"),
    [
        # Two tiles for each of two SMs, more steps than stages.
        ((256, 64, 512), MatmulConfig(128, 32, stages=3), 2),
        # Nothing is a multiple of anything, tiles that lie half and wholly beyond the last row group; three consumers.
        ((201, 70, 300), MatmulConfig(192, 64, stages=2), 3),
        # A turn of four steps, and one more step; fewer steps in a tile than stages.
        ((64, 16, 640), MatmulConfig(128, 16, stages=8), 1),
        # Columns of several blocks of scales, and an SM without a tile.
        ((5, 300, 129), MatmulConfig(128, 128, stages=4), 4),
        # One row, one column, less than a step.
        ((1, 1, 7), MatmulConfig(128, 16, stages=2), 1),
        # Pairs of blocks, one of which has no columns left in the last pair of tiles. No three consumers here: the
        # interpreter's eight threads are more than jax runs on two cores, and would wait for each other.
        pytest.param((201, 330, 700), MatmulConfig(128, 128, stages=4, cluster=2), 4, marks=needs_clusters),
        pytest.param((300, 40, 640), MatmulConfig(128, 16, stages=2, cluster=2), 2, marks=needs_clusters),
    ],
)
def test_it_is_the_reference(sizes, config, sms):
    a, b = operands(*sizes)
    assert_equal(run(a, b, config, sms), a, b)


def test_dgrad_multiplies_by_the_transposed_blocks():
    dy, w = quantize(normal(0, 40, 160), ROW), quantize(normal(1, 200, 160), BLOCK)
    assert_equal(run(dy, w.T, MatmulConfig(128, 64, stages=2), 2), dy, w.T)


@pytest.mark.parametrize(
    ("tokens", "k", "n", "config"),
    [
        # A pair of steps and one more.
        (260, 70, 40, MatmulConfig(128, 64, stages=4, b_tile=COLUMN)),
        # Fewer columns than the scales that are read; less than a step.
        (70, 5, 7, MatmulConfig(192, 16, stages=2, b_tile=COLUMN)),
    ],
)
def test_wgrad_scales_rows_and_columns(tokens, k, n, config):
    xq, dyq = quantize(normal(0, tokens, k), COLUMN), quantize(normal(1, tokens, n), COLUMN)
    assert_equal(run(xq.T, dyq, config, 1), xq.T, dyq)


def test_nothing_that_was_not_written_is_read():
    """Fresh memory, and what lies beyond an array, is NaN here; only scales beyond the last column may be read."""
    a, b = operands(192, 128, 256)
    assert_equal(run(a, b, MatmulConfig(192, 64, stages=2), 1, uninitialized="nan"), a, b)


def test_nan_stays_in_its_row_and_in_its_block_of_columns():
    x, w = normal(0, 70, 256), normal(1, 256, 160)
    a, b = quantize(x.at[3, 200].set(jnp.nan).at[66, 0].set(jnp.inf), ROW), quantize(w.at[0, 130].set(jnp.nan), BLOCK)
    got = run(a, b, MatmulConfig(128, 64, stages=2), 2)
    poisoned = np.zeros(got.shape, bool)
    poisoned[[3, 66]] = poisoned[:, 128:] = True
    np.testing.assert_array_equal(np.isnan(got), poisoned)
    clean = wanted(*operands(70, 160, 256))
    np.testing.assert_allclose(got[~poisoned], clean[~poisoned], rtol=1e-5, atol=1e-4)


def test_bfloat16_results_are_rounded_once():
    a, b = operands(64, 48, 256)
    wide = run(a, b, MatmulConfig(128, 16, stages=2), 2)
    narrow = run(a, b, MatmulConfig(128, 16, stages=2), 2, jnp.bfloat16)
    np.testing.assert_array_equal(narrow, np.asarray(jnp.asarray(wide).astype(jnp.bfloat16), np.float32))


@pytest.mark.parametrize("sizes", [(0, 5, 7), (5, 0, 7), (5, 7, 0)])
def test_empty_products_are_zeros(sizes):
    m, k, n = sizes
    a, b = quantize(jnp.ones((m, k)), ROW), quantize(jnp.ones((k, n)), BLOCK)
    got = mosaic_gpu.block_scaled_matmul(a, b, jnp.dtype(jnp.bfloat16), sms=1)
    assert (got.shape, got.dtype) == ((m, n), jnp.bfloat16)
    assert not np.asarray(got, np.float32).any()


@pytest.mark.parametrize(("m_tiles", "n_tiles", "swath"), [(1, 1, 8), (7, 3, 4), (16, 5, 8), (3, 9, 8)])
def test_tiles_are_taken_down_the_columns_of_one_swath_of_rows_after_another(m_tiles, n_tiles, swath):
    at = jax.vmap(lambda i: pipeline.tile_at(i, m_tiles, n_tiles, swath))
    order = list(zip(*map(np.asarray, at(jnp.arange(m_tiles * n_tiles, dtype=jnp.int32))), strict=True))
    assert order == [
        (row, column)
        for first in range(0, m_tiles, swath)
        for column in range(n_tiles)
        for row in range(first, min(first + swath, m_tiles))
    ]


@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("m", [4096, 128, 64, 1])
def test_the_default_fits_and_leaves_few_sms_idle(m, out_dtype):
    for n, _ in V3_WEIGHTS:
        config = default_config(m, n, jnp.dtype(out_dtype), 132)
        config.check_memory(out_dtype)
        assert config.stages >= 3
        share = m * n / (rounds(config, m, n, 132) * 132 * min(m, config.tile_m) * config.tile_n)
        assert share > (0.75 if m == 4096 else 0.4)


def test_a_config_that_exceeds_shared_memory_says_by_how_much_and_what_would_fit():
    config = MatmulConfig(192, 128, stages=5)
    needed = config.shared_memory(jnp.bfloat16)
    assert needed > SHARED_MEMORY
    with pytest.raises(ValueError, match=rf"needs {needed} bytes .* of {SHARED_MEMORY}; 4 stages would fit"):
        run(*operands(8, 8, 8), config, 1, jnp.bfloat16)
    dataclasses.replace(config, stages=4).check_memory(jnp.bfloat16)


def test_bad_configs_and_operands_say_what_would_be_valid():
    a, b = operands(8, 8, 8)
    x, w = normal(0, 8, 8), normal(1, 8, 8)
    with pytest.raises(ValueError, match="tile_m must be one of 128, 192, not 256"):
        MatmulConfig(tile_m=256)
    with pytest.raises(ValueError, match="tile_n must be one of 16, 32, 64, 128, not 160"):
        MatmulConfig(tile_n=160)
    with pytest.raises(ValueError, match="cluster must be one of 1, 2, not 4"):
        MatmulConfig(cluster=4)
    with pytest.raises(ValueError, match="stages must be at least 2 and swath at least 1, not 1 and 8"):
        MatmulConfig(stages=1)
    with pytest.raises(ValueError, match=r"a in tiles of 1×128 and b of 128×128 or 128×1, not .* and \(1, 128\)"):
        run(a, quantize(w, ROW), MatmulConfig(), 1)
    with pytest.raises(ValueError, match=r"is for b in tiles of \(128, 128\), not \(128, 1\); set its b_tile"):
        run(a, quantize(w, COLUMN), MatmulConfig(), 1)
    with pytest.raises(ValueError, match="codes of float8_e4m3fn, not float8_e5m2 and float8_e4m3fn"):
        run(quantize(x, ROW, dtype=jnp.float8_e5m2), b, MatmulConfig(), 1)
    if not mosaic_gpu.INTERPRETED_WHOLE:
        with pytest.raises(ValueError, match="interpreter has no clusters; choose a config with cluster=1"):
            run(a, b, MatmulConfig(tile_n=16, cluster=2), 2)


def test_on_another_device_it_says_why_it_cannot_run():
    a, b = operands(8, 8, 8)
    if jax.default_backend() == "gpu":
        pytest.skip("this device may be a Hopper GPU")
    with pytest.raises(ValueError, match=r"'mosaic_gpu' cannot run here: .*compute capability 9\.0.*jax runs on cpu"):
        block_scaled_matmul(a, b, implementation="mosaic_gpu")


def test_on_a_hopper_gpu_operands_decide(monkeypatch):
    class Device:
        compute_capability = "9.0"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    a, b = operands(8, 8, 8)
    assert mosaic_gpu.supported(a, b) is None
    assert mosaic_gpu.supported(a, Quantized(b.codes, b.codes.astype(jnp.float32)[:1], COLUMN)) is None
    assert "1×128" in mosaic_gpu.supported(a, Quantized(b.codes, b.codes.astype(jnp.float32)[:, :1], ROW))
    Device.compute_capability = "10.0"
    assert "not 10.0" in mosaic_gpu.supported(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(1000, 1000, 1000), (64, 2112, 7168), (1, 1, 7)])
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("tile", [(192, 128), (128, 128), (128, 16)])
def test_on_a_gpu_it_is_the_reference_but_for_the_bits_that_tensor_cores_cut_off(sizes, cluster, tile):
    a, b = operands(*sizes)
    if mosaic_gpu.supported(a, b):
        pytest.skip(mosaic_gpu.supported(a, b))
    config = MatmulConfig(*tile, stages=3, cluster=cluster)
    got = np.asarray(mosaic_gpu.block_scaled_matmul(a, b, jnp.dtype(jnp.float32), config=config))
    size = np.abs(np.asarray(a.dequantize())) @ np.abs(np.asarray(b.dequantize()))
    assert (np.abs(got - wanted(a, b)) <= 2e-3 * size).all()


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(1000, 1000, 1000), (2112, 64, 4096), (1, 1, 7)])
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("tile", [(192, 64), (128, 128), (128, 16)])
def test_on_a_gpu_wgrad_is_the_reference_but_for_those_bits(sizes, cluster, tile):
    m, n, tokens = sizes
    a, b = quantize(normal(0, tokens, m), COLUMN).T, quantize(normal(1, tokens, n), COLUMN)
    if mosaic_gpu.supported(a, b):
        pytest.skip(mosaic_gpu.supported(a, b))
    config = MatmulConfig(*tile, stages=3, cluster=cluster, b_tile=COLUMN)
    got = np.asarray(mosaic_gpu.block_scaled_matmul(a, b, jnp.dtype(jnp.float32), config=config))
    size = np.abs(np.asarray(a.dequantize())) @ np.abs(np.asarray(b.dequantize()))
    assert (np.abs(got - wanted(a, b)) <= 2e-3 * size).all()
