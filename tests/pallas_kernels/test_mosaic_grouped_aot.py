"""The grouped Hopper kernels as the compiler makes them for sm_90a without a GPU, and what is predicted of them."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.block_scaled_matmul.config import BARRIERS, BLOCK, MatmulConfig
from pallas_kernels.grouped_matmul import mosaic_gpu
from pallas_kernels.grouped_matmul.config import ArrayConfig
from pallas_kernels.tune.products import BF16, E4M3, EXPERTS, GROUPS, Product
from tools.kernels_aot import CLOCK, SMS, TILE_CYCLES, compile_kernel, on_h200, predict, read_kernel
from tools.kernels_aot_grouped import compile_product, predict_product


def of_experts(name, operands, groups, weights):
    """A grouped product: `groups` are how many and rows of each, `weights` N and K."""
    return Product(name, groups[1], *weights, groups[0], operands)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "operands", "config"),
    [
        ("Fprop", E4M3, MatmulConfig(192, 128, stages=4, cluster=2)),
        ("Fprop", E4M3, MatmulConfig(128, 128, stages=5)),
        ("Wgrad", E4M3, MatmulConfig(192, 64, stages=5, cluster=2, b_tile=(128, 1))),
        ("Wgrad", E4M3, MatmulConfig(128, 128, stages=4, b_tile=(128, 1))),
        ("Wgrad", E4M3, MatmulConfig(128, 64, stages=4, b_tile=(128, 1))),
        ("Fprop", BF16, ArrayConfig(128, 256, stages=3)),
        ("Fprop", BF16, ArrayConfig(192, 128, stages=4, cluster=2)),
        ("Dgrad", BF16, ArrayConfig(128, 128, stages=6, cluster=2)),
        ("Wgrad", BF16, ArrayConfig(192, 128, stages=3, cluster=2)),
        ("Wgrad", BF16, ArrayConfig(128, 128, stages=5)),
    ],
)
def test_tensor_cores_and_tma_are_used_and_nothing_is_spilled(name, operands, config):
    product = of_experts(name, operands, GROUPS[0], EXPERTS[0])
    kernel = compile_product(product, config)
    assert (kernel.spilled_bytes, kernel.serialized) == (0, 0)
    if product.quantized:
        # A loop of several steps at once is followed by one of single steps where their number is not known.
        steps = config.steps_at_once
        assert kernel.wgmma_e4m3 == 4 * (steps + 1 if name == "Wgrad" and steps > 1 else steps)
        assert (kernel.wgmma_bf16, kernel.tma_loads) == (0, 4)
        assert kernel.code_copies == (2 if name == "Wgrad" else 0)  # Transposed, since rows are summed over.
    else:
        assert (kernel.wgmma_bf16, kernel.wgmma_e4m3) == (4, 0)
        assert kernel.tma_loads in (2, 4)  # The compiler may unroll the producer's loop.
    assert (kernel.multicast_loads > 0) == (config.cluster == 2)
    assert kernel.threads == 128 * (config.consumers + 1)
    assert 0 <= config.shared_memory(product.result[2]) - kernel.shared_bytes < BARRIERS
    assert kernel.blocks_per_sm == 1


@pytest.mark.aot
def test_few_steps_along_k_are_not_unrolled_where_a_warpgroup_passes_over_them():
    """16 steps: what the compiler would unroll, and then spill."""
    product = of_experts("Fprop", E4M3, GROUPS[0], EXPERTS[1])
    config = MatmulConfig(192, 128, stages=4, cluster=2)
    kernel = compile_product(product, config)
    assert kernel.spilled_bytes == 0
    assert kernel.remote_arrivals < 16


@pytest.mark.aot
def test_groups_that_start_anywhere_are_the_same_kernel():
    """Two compilations, told apart by their number of groups: alignment is only what the tables say."""
    for groups, alignment in ((3, 1), (5, BLOCK)):
        product = Product("Fprop", 200, 512, 512, groups, E4M3, alignment)
        kernel = compile_product(product, MatmulConfig(128, 128, stages=4))
        assert (kernel.spilled_bytes, kernel.wgmma_e4m3, kernel.code_copies) == (0, 8, 0)


@pytest.mark.aot
def test_the_kernel_compiles_under_vmap():
    def array(*shape, dtype=BF16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=on_h200())

    def product(x, w, sizes):
        return mosaic_gpu.rows_by_matrices(x, w, sizes, 1, BF16, config=ArrayConfig(128, 128, stages=4), sms=SMS)

    shapes = array(2, 384, 128), array(2, 3, 128, 256), array(2, 3, dtype=jnp.int32)
    kernel = read_kernel(*compile_kernel(jax.vmap(product), *shapes))
    assert (kernel.spilled_bytes, kernel.wgmma_e4m3) == (0, 0)
    assert kernel.wgmma_bf16 > 0


def test_a_prediction_by_hand():
    times = predict(2e12, 1e15, 4.8e9, 3, 10, {"multiply": 500.0, "L2": 600.0})
    assert (times.arithmetic, times.memory) == (2e-3, pytest.approx(1e-3))
    assert (times.kernel, times.bound) == (pytest.approx(1e-3), "memory")
    times = predict(2e12, 1e15, 1.0, 3, 10, {"multiply": 500.0, "L2": 600.0})
    assert (times.kernel, times.bound) == (pytest.approx(3 * (10 * 600 + TILE_CYCLES) / CLOCK), "L2")


def test_floors_by_hand_and_no_prediction_below_them():
    product = Product("Wgrad", 8192, 4096, 7168, 4)
    times = predict_product(product, product.default(SMS))
    assert times.arithmetic == pytest.approx(2 * 32768 * 4096 * 7168 / 1979e12)
    codes = 32768 * (4096 + 7168)
    assert times.memory == pytest.approx((codes + 4 * codes / 128 + 4 * 4 * 4096 * 7168) / 4.8e12)
    for name, operands in (("Fprop", E4M3), ("Wgrad", E4M3), ("Fprop", BF16), ("Dgrad", BF16), ("Wgrad", BF16)):
        for groups in GROUPS:
            for weights in EXPERTS:
                product = of_experts(name, operands, groups, weights)
                times = predict_product(product, product.default(SMS))
                assert times.kernel >= max(times.arithmetic, times.memory)
