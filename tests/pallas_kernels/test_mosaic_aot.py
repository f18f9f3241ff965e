"""The Hopper kernel as the compiler makes it for sm_90a without a GPU, what is read of it and predicted from it."""

import jax.numpy as jnp
import pytest

from pallas_kernels.block_scaled_matmul.config import BARRIERS, MatmulConfig, default_config
from pallas_kernels.tune.products import ROWS, TOKENS, WEIGHTS
from tools.kernels_aot import (
    SMS,
    CompiledKernel,
    compile_matmul,
    compile_wgrad,
    predict_matmul,
    read_kernel,
)

BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("config", "out_dtype"),
    [
        (MatmulConfig(192, 128, stages=4, cluster=2), BF16),
        (MatmulConfig(128, 128, stages=4, cluster=2), BF16),
        (MatmulConfig(128, 128, stages=4), F32),
        (MatmulConfig(128, 16, stages=8), BF16),
    ],
)
def test_tensor_cores_and_tma_are_used_and_nothing_is_spilled(config, out_dtype):
    kernel = compile_matmul(4096, 4096, 7168, out_dtype, config)
    assert (kernel.spilled_bytes, kernel.serialized) == (0, 0)
    assert kernel.wgmma_e4m3 == 4 * config.steps_at_once
    assert kernel.tma_loads == 4
    assert kernel.multicast_loads == config.cluster - 1
    # When a step is done, and for every stage before the first.
    assert kernel.remote_arrivals == (config.steps_at_once + config.stages if config.cluster == 2 else 0)
    assert kernel.threads == 128 * (config.consumers + 1)
    assert 0 <= config.shared_memory(out_dtype) - kernel.shared_bytes < BARRIERS
    assert kernel.blocks_per_sm == 1


@pytest.mark.aot
@pytest.mark.parametrize(
    "config",
    [
        MatmulConfig(128, 128, stages=4, b_tile=(128, 1)),
        MatmulConfig(192, 64, stages=5, cluster=2, b_tile=(128, 1)),
        MatmulConfig(128, 16, stages=8, b_tile=(128, 1)),
    ],
)
def test_wgrad_spills_nothing_and_has_both_operands_transposed(config):
    kernel = compile_wgrad(TOKENS, 4096, 7168, config)
    assert (kernel.spilled_bytes, kernel.serialized, kernel.code_copies, kernel.tma_loads) == (0, 0, 2, 4)
    assert kernel.wgmma_e4m3 == 4 * config.steps_at_once
    assert 0 <= config.shared_memory(F32) - kernel.shared_bytes < BARRIERS


@pytest.mark.aot
def test_a_weight_is_copied_only_where_its_codes_lie_the_other_way():
    """Dgrad reads w as it is stored; Fprop transposes it, unless it is given a transposed copy."""
    config = MatmulConfig(128, 64, stages=4)
    assert compile_matmul(128, 256, 512, BF16, config).code_copies == 0
    assert compile_matmul(128, 320, 512, BF16, config, k_major=False).code_copies == 1


@pytest.mark.aot
def test_only_what_the_layout_cannot_have_is_padded():
    """Codes of a and b, to 8 rows and to whole steps along K; tiles that end beyond an array need nothing."""
    assert compile_matmul(1, 1, 7, F32, MatmulConfig(128, 16, stages=2)).code_copies == 2
    assert compile_matmul(1000, 1000, 1000, BF16, MatmulConfig(192, 128, stages=4)).code_copies == 2
    assert compile_matmul(1000, 1000, 1152, BF16, MatmulConfig(192, 128, stages=4)).code_copies == 0


PTX = """
.maxntid 384, 1, 1
cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r1], [%rd1, {%r2}];
cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%rd2, {%r4}], [%r5];
cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%rd3, {%r6}], [%r7];
@%p16 mbarrier.arrive.shared::cluster.b64 _, [mapped_addr];
mbarrier.arrive.release.cta.shared::cta.b64 %rd6, [%r8], 1;
{ .reg .pred p; wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {%f1}, %rd4, %rd5, p, 1, 1; }
{ .reg .pred p; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1}, %rd4, %rd5, p, 1, 1, 0, 0; }
"""
PTXAS = """ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to a wait
ptxas info    : Function properties for kernel
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""
LAUNCH = "%1 = gpu.launch async blocks(%2) in (%3 = %c132) dynamic_shared_memory_size %c200000_i32 {"
PROGRAM = """
%fused (p: f8e4m3fn[8,8]) -> f8e4m3fn[8,8] {
  ROOT %t = f8e4m3fn[8,8]{1,0} transpose(%p), dimensions={1,0}
}
ENTRY %main (a: f8e4m3fn[8,8]) -> bf16[8,8] {
  %f = f8e4m3fn[8,8]{1,0} fusion(%a), kind=kInput, calls=%fused
  %s = f32[8,8]{1,0} transpose(%c), dimensions={1,0}
  ROOT %k = bf16[8,8]{1,0} custom-call(%f, %s), custom_call_target="mosaic_gpu_v2"
}
"""


def test_what_is_read_of_the_compilers_output():
    assert read_kernel(PTX, PTXAS, LAUNCH, PROGRAM) == CompiledKernel(
        threads=384,
        registers=168,
        spilled_bytes=16,
        shared_bytes=200_000,
        wgmma_e4m3=1,
        tma_loads=2,
        multicast_loads=1,
        remote_arrivals=1,
        code_copies=1,
        wgmma_bf16=1,
        serialized=1,
    )
    with pytest.raises(ValueError, match="the compiler's output has no"):
        read_kernel(PTX, "ptxas info: nothing", LAUNCH, PROGRAM)


def test_blocks_per_sm_are_what_shared_memory_registers_and_threads_allow():
    kernel = CompiledKernel(128, 64, 0, 50_000, 4, 4, 0, 0, 0)
    assert (kernel.blocks_per_sm, kernel.occupancy) == (4, 0.25)  # 233472 / 51024
    kernel = CompiledKernel(256, 168, 0, 1_000, 4, 4, 0, 0, 0)
    assert (kernel.blocks_per_sm, kernel.occupancy) == (1, 0.125)  # 65536 / (168 * 256)


def test_floors_by_hand_and_no_prediction_below_them():
    times = predict_matmul(4096, 7168, 16384, BF16, MatmulConfig())
    assert times.arithmetic == pytest.approx(2 * 4096 * 7168 * 16384 / 1979e12)
    moved = 4096 * 16384 + 7168 * 16384 + 4 * 128 * (4096 + 56) + 2 * 4096 * 7168
    assert times.memory == pytest.approx(moved / 4.8e12)
    for m in ROWS:
        for n, k in WEIGHTS:
            times = predict_matmul(m, n, k, BF16, default_config(m, n, BF16, SMS))
            assert times.kernel >= max(times.arithmetic, times.memory)
