"""The Hopper kernels of `grouped_matmul` for FP8 operands, run on a CPU by Pallas' interpreter; no data races.

What it does not show is said in test_mosaic_matmul.py. test_mosaic_grouped_aot.py looks at the programs for sm_90a.
"""

import jax
import jax.numpy as jnp
import mosaic_interpreter
import numpy as np
import pytest

from pallas_kernels.block_scaled_matmul import mosaic_gpu as block_scaled
from pallas_kernels.block_scaled_matmul.config import Groups, MatmulConfig, default_config, rounds
from pallas_kernels.grouped_matmul import (
    group_starts,
    grouped_matmul,
    grouped_matmul_dw,
    grouped_matmul_dx,
    mosaic_gpu,
    reference,
)
from pallas_kernels.grouped_matmul.config import ArrayConfig
from pallas_kernels.grouped_matmul.groups import tile_visits
from pallas_kernels.quantize import Quantized, quantize

ROW, COLUMN, BLOCK = (1, 128), (128, 1), (128, 128)
F32 = jnp.dtype(jnp.float32)
UNEVEN = [0, 130, 1, 0, 9, 3]
needs_clusters = pytest.mark.skipif(
    not block_scaled.INTERPRETED_WHOLE, reason=f"the interpreter of jax {jax.__version__} has no clusters; 0.11.2 has"
)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def real_rows(sizes, alignment, rows):
    """Which rows are in a group, bool `[M, 1]`."""
    real = np.zeros((rows, 1), bool)
    for start, size in zip(np.asarray(group_starts(jnp.asarray(sizes), alignment)), sizes, strict=True):
        real[start : start + size] = True
    return jnp.asarray(real)


def assert_close(got, wanted):
    """float32 sums in another order, none of which is much smaller than its terms."""
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)


def fprop(sizes, alignment, rows, k, n, config, sms):
    """The kernel's y and the reference's, with NaN in all rows of no group."""
    x = jnp.where(real_rows(sizes, alignment, rows), normal(0, rows, k), jnp.nan)
    xq, wq, sizes = quantize(x, ROW), quantize(normal(1, len(sizes), k, n), BLOCK), jnp.asarray(sizes, jnp.int32)
    options = {"alignment": alignment, "out_dtype": F32, "implementation": "reference"}
    got = mosaic_interpreter.run(mosaic_gpu.rows_by_matrices, xq, wq, sizes, alignment, F32, config=config, sms=sms)
    return got, np.asarray(grouped_matmul(xq, wq, sizes, **options))


@pytest.mark.parametrize(
    ("sizes", "alignment", "rows", "k", "n", "config", "sms"),
    [
        # Groups begin and end anywhere, four of them in one tile, and some rows at the end are in none.
        (UNEVEN, 1, 150, 140, 24, MatmulConfig(128, 16, stages=3), 2),
        # Padding between groups; a tile without any; three consumers.
        ([3, 0, 60], 64, 400, 130, 16, MatmulConfig(192, 16, stages=2), 1),
        pytest.param([70, 80], 1, 150, 300, 40, MatmulConfig(128, 16, stages=4, cluster=2), 2, marks=needs_clusters),
    ],
)
def test_fprop_is_the_reference_and_padding_gives_zeros_whatever_it_holds(sizes, alignment, rows, k, n, config, sms):
    got, wanted = fprop(sizes, alignment, rows, k, n, config, sms)
    assert_close(got, wanted)
    assert not got[~np.asarray(real_rows(sizes, alignment, rows))[:, 0]].any()


def test_dgrad_is_the_reference():
    sizes, rows = [5, 0, 120, 10], 140
    dyq, wq = quantize(normal(0, rows, 40), ROW), quantize(normal(1, 4, 150, 40), BLOCK)
    sizes = jnp.asarray(sizes, jnp.int32)
    config = MatmulConfig(128, 64, stages=2)
    got = mosaic_interpreter.run(
        mosaic_gpu.rows_by_matrices, dyq, wq, sizes, 1, jnp.dtype(jnp.bfloat16), 2, config=config, sms=1
    )
    wanted = grouped_matmul_dx(dyq, wq, sizes, out_dtype=F32, implementation="reference")
    np.testing.assert_allclose(got, wanted, rtol=2**-8, atol=1e-4)


def test_nothing_of_one_group_reaches_another():
    """A matrix of NaN, and rows of NaN, in a tile with other groups; what was never written is NaN, too."""
    sizes = jnp.asarray([40, 50, 30], jnp.int32)
    x, w = normal(0, 128, 128), normal(1, 3, 128, 16)
    xq = quantize(x.at[3].set(jnp.nan).at[120:].set(jnp.inf), ROW)
    wq = quantize(w.at[1].set(jnp.nan), BLOCK)
    config = MatmulConfig(128, 16, stages=2)
    got = mosaic_interpreter.run(
        mosaic_gpu.rows_by_matrices, xq, wq, sizes, 1, F32, config=config, sms=1, uninitialized="nan"
    )
    poisoned = np.zeros(128, bool)
    poisoned[3] = poisoned[40:90] = True
    assert np.isnan(got[poisoned]).all()
    clean = grouped_matmul(quantize(x, ROW), quantize(w, BLOCK), sizes, out_dtype=F32, implementation="reference")
    assert_close(got[~poisoned], np.asarray(clean)[~poisoned])


@pytest.mark.parametrize(
    ("sizes", "rows", "k", "n", "config"),
    [
        # Two groups of one step and a bit, pairs of steps and single ones, rows and columns beyond a tile.
        ([0, 130, 0, 129], 530, 140, 40, MatmulConfig(128, 64, stages=4, b_tile=COLUMN)),
        # Three consumers.
        ([1, 0, 128], 260, 10, 130, MatmulConfig(192, 64, stages=2, b_tile=COLUMN)),
    ],
)
def test_wgrad_is_the_reference_and_an_empty_groups_is_zero(sizes, rows, k, n, config):
    """Rows that are in no group hold zeros when they are quantised, and codes of NaN when they are multiplied."""
    real = real_rows(sizes, 128, rows)

    def poisoned(seed, width):
        q = quantize(jnp.where(real, normal(seed, rows, width), 0), COLUMN)
        return Quantized(jnp.where(real, q.codes, jnp.asarray(np.nan, q.codes.dtype)), q.scales, COLUMN)

    xq, dyq, sizes = poisoned(0, k), poisoned(1, n), jnp.asarray(sizes, jnp.int32)
    got = mosaic_interpreter.run(mosaic_gpu.rows_by_rows, xq, dyq, sizes, 128, config=config, sms=2)
    assert_close(got, np.asarray(grouped_matmul_dw(xq, dyq, sizes, alignment=128, implementation="blocked")))
    assert not got[np.asarray(sizes) == 0].any()


def test_vmap_calls_the_kernel_once_for_each_element_and_a_derivative_is_refused():
    sizes = jnp.asarray([[5, 3], [0, 8]], jnp.int32)
    xq, wq = quantize(normal(0, 2, 8, 128), ROW), quantize(normal(1, 2, 2, 128, 16), BLOCK)

    def product(x, w, sizes, interpret):
        config = MatmulConfig(128, 16, stages=2)
        return mosaic_gpu.rows_by_matrices(x, w, sizes, 1, F32, config=config, sms=1, interpret=interpret)

    def both(x, w, sizes, interpret):
        return jax.vmap(lambda *operands: product(*operands, interpret))(x, w, sizes)

    got = mosaic_interpreter.run(both, xq, wq, sizes)
    reference = jax.vmap(lambda *operands: grouped_matmul(*operands, out_dtype=F32, implementation="reference"))
    assert_close(got, np.asarray(reference(xq, wq, sizes)))
    first, interpret = jax.tree.map(lambda leaf: leaf[0], (xq, wq, sizes)), mosaic_interpreter.parameters()

    def loss(scales):
        return product(Quantized(first[0].codes, scales, ROW), *first[1:], interpret).sum()

    with pytest.raises(TypeError, match=r"grouped_matmul_rows: the kernel cannot be differentiated.*Dgrad, Wgrad"):
        jax.grad(loss)(first[0].scales)


@pytest.mark.parametrize("seed", range(8))
def test_visits_are_the_groups_with_rows_in_each_tile(seed):
    rng = np.random.default_rng(seed)
    count, alignment, tile = rng.integers(1, 9), int(rng.choice([1, 8, 128])), int(rng.choice([128, 192]))
    sizes = rng.integers(0, 300, count) * rng.integers(0, 2, count)
    starts = np.asarray(group_starts(jnp.asarray(sizes), alignment))
    rows = int(starts[-1] + sizes[-1] + rng.integers(1, 300))
    spans, groups = map(np.asarray, tile_visits(jnp.asarray(sizes), alignment, rows, tile))
    assert len(spans) == -(-rows // tile)
    for i, (begin, end) in enumerate(spans):
        wanted = [
            (g, start, start + size)
            for g, (start, size) in enumerate(zip(starts, sizes, strict=True))
            if size and start < (i + 1) * tile and start + size > i * tile
        ]
        assert list(map(tuple, groups[begin:end])) == wanted


def test_no_rows_no_groups_no_columns():
    for m, k, n, count in ((0, 130, 8, 2), (5, 130, 8, 0), (5, 130, 0, 2), (5, 0, 8, 2)):
        xq, wq, sizes = quantize(jnp.ones((m, k)), ROW), quantize(jnp.ones((count, k, n)), BLOCK), jnp.zeros(count, int)
        y = mosaic_gpu.rows_by_matrices(xq, wq, sizes, 1, F32, sms=1)
        dw = mosaic_gpu.rows_by_rows(
            quantize(jnp.ones((m, k)), COLUMN), quantize(jnp.ones((m, n)), COLUMN), sizes, 128, sms=1
        )
        assert (y.shape, dw.shape) == ((m, n), (count, k, n))
        assert not y.any()
        assert not dw.any()


def test_groups_cost_a_tile_each_unless_they_start_where_tiles_do():
    config = MatmulConfig(128, 128)
    aligned, anywhere = Groups("rows", 32, 128), Groups("rows", 32, 1)
    assert rounds(config, 16384, 128, 1, aligned) == rounds(config, 16384, 128, 1) == 128
    assert rounds(config, 16384, 128, 1, anywhere) == 128 + 31
    assert rounds(config, 256, 128, 1, Groups("depth", 32)) == 64
    assert default_config(16384, 4096, F32, 132, groups=aligned).tile_m == 128


def test_what_cannot_be_run_says_why():
    x, w, dy, sizes = normal(0, 256, 128), normal(1, 2, 128, 16), normal(2, 256, 16), jnp.asarray([128, 3], jnp.int32)
    xq, wq, xc, dyc = quantize(x, ROW), quantize(w, BLOCK), quantize(x, COLUMN), quantize(dy, COLUMN)

    def rows(x, w, **options):
        return mosaic_gpu.rows_by_matrices(x, w, sizes, 1, F32, sms=1, **options)

    with pytest.raises(ValueError, match=r"grouped_matmul: .*needs a in tiles of 1×128 and b of 128×128 or 128×1"):
        rows(quantize(x, BLOCK), wq)
    with pytest.raises(ValueError, match="codes of float8_e4m3fn, not float8_e5m2"):
        rows(quantize(x, ROW, dtype=jnp.float8_e5m2), wq)
    with pytest.raises(ValueError, match=r"is for b in tiles of \(128, 1\), not \(128, 128\); set its b_tile"):
        rows(xq, wq, config=MatmulConfig(128, 16, b_tile=COLUMN))
    with pytest.raises(ValueError, match="needs a config that is a MatmulConfig for these operands, not ArrayConfig"):
        rows(xq, wq, config=ArrayConfig(128, 128))
    with pytest.raises(ValueError, match=r"of 232448; 3 stages would fit"):
        rows(xq, wq, config=MatmulConfig(192, 128, stages=6))
    with pytest.raises(ValueError, match="steps of 128 rows would straddle groups at multiples of 64"):
        mosaic_gpu.rows_by_rows(xc, dyc, sizes, 64, sms=1)
    with pytest.raises(ValueError, match="192×128 would spill registers; take 128×128 or 192×64"):
        MatmulConfig(192, 128, b_tile=COLUMN)
    with pytest.raises(ValueError, match=r"b_tile must be \(128, 128\) or \(128, 1\), not \(1, 128\)"):
        MatmulConfig(b_tile=ROW)
    if jax.default_backend() != "gpu":
        for call in (
            lambda name: grouped_matmul(xq, wq, sizes, implementation=name),
            lambda name: grouped_matmul_dx(xq, wq.T, sizes, implementation=name),
            lambda name: grouped_matmul_dw(xc, dyc, sizes, alignment=128, implementation=name),
        ):
            with pytest.raises(ValueError, match=r"'mosaic_gpu' cannot run here: .*compute capability 9\.0"):
                call("mosaic_gpu")


def test_the_api_reaches_the_kernels(monkeypatch):
    """`implementation="mosaic_gpu"` of all three functions: on a CPU, with others in the kernels' place."""
    x, w, dy, sizes = normal(0, 256, 130), normal(1, 2, 130, 16), normal(2, 256, 16), jnp.asarray([120, 3], jnp.int32)
    wq, xc, dyc = quantize(w, BLOCK), quantize(x, COLUMN), quantize(dy, COLUMN)
    calls = {grouped_matmul: (quantize(x, ROW), wq), grouped_matmul_dx: (quantize(dy, ROW), wq)}
    calls[grouped_matmul_dw] = (xc, dyc)
    wanted = {f: f(*ab, sizes, alignment=128, implementation="reference") for f, ab in calls.items()}
    monkeypatch.setattr(mosaic_gpu, "not_hopper", lambda: None)
    monkeypatch.setattr(mosaic_gpu, "rows_by_matrices", reference.rows_by_matrices)
    monkeypatch.setattr(mosaic_gpu, "rows_by_rows", reference.rows_by_rows)
    for function, operands in calls.items():
        got = function(*operands, sizes, alignment=128, implementation="mosaic_gpu")
        assert got.dtype == wanted[function].dtype
        np.testing.assert_array_equal(got, wanted[function])
    with pytest.raises(ValueError, match="'mosaic_gpu' cannot run here: it needs a in tiles of 1×128"):
        grouped_matmul(quantize(x, None), wq, sizes, implementation="mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("tile", [(192, 64), (128, 128), (128, 16)])
def test_on_a_gpu_they_are_the_reference_but_for_the_bits_that_tensor_cores_cut_off(tile, cluster):
    sizes, rows, k, n = [0, 700, 1, 0, 300, 129], 1600, 1000, 600
    real = real_rows(sizes, 128, rows)
    x, dy = (jnp.where(real, normal(seed, rows, width), 0) for seed, width in ((0, k), (1, n)))
    w, sizes = quantize(normal(2, len(sizes), k, n), BLOCK), jnp.asarray(sizes, jnp.int32)
    xc, dyc = quantize(x, COLUMN), quantize(dy, COLUMN)
    obstacle = mosaic_gpu.supported(quantize(x, ROW), w, F32)
    if obstacle:
        pytest.skip(obstacle)

    def assert_within_the_bits(got, wanted, size):
        assert (np.abs(np.asarray(got) - np.asarray(wanted)) <= 2e-3 * np.asarray(size)).all()

    config = MatmulConfig(*tile, stages=3, cluster=cluster)
    for q, contract, other in ((quantize(x, ROW), 1, grouped_matmul), (quantize(dy, ROW), 2, grouped_matmul_dx)):
        options = {"alignment": 128, "out_dtype": F32}
        got = mosaic_gpu.rows_by_matrices(q, w, sizes, 128, F32, contract, config=config)
        size = other(jnp.abs(q.dequantize()), jnp.abs(w.dequantize()), sizes, **options)
        assert_within_the_bits(got, other(q, w, sizes, **options), size)
    config = MatmulConfig(*tile, stages=3, cluster=cluster, b_tile=COLUMN)
    got = mosaic_gpu.rows_by_rows(xc, dyc, sizes, 128, config=config)
    size = grouped_matmul_dw(jnp.abs(xc.dequantize()), jnp.abs(dyc.dequantize()), sizes, alignment=128)
    assert_within_the_bits(got, grouped_matmul_dw(xc, dyc, sizes, alignment=128), size)
