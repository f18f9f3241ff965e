"""The Hopper kernels of `quantize` as the compiler makes them for sm_90a without a GPU, and what is read of them."""

import jax.numpy as jnp
import pytest

from tools.kernels_aot_quantize import KERNELS, bytes_moved, compile_quantizer, read_quantizer

BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)


@pytest.mark.aot
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(
    ("name", "shape", "threads", "stores", "writes", "copies"),
    [
        ("1×128", (4096, 7168), 128, 2, 1, 1),  # The copy: scales lie transposed.
        ("128×1", (4096, 7168), 128, 2, 1, 0),
        ("both", (4096, 7168), 256, 4, 2, 1),
        ("128×128", (7168, 2112), 128, 1, 1, 0),
        ("128×128 and transposed", (7168, 2112), 128, 2, 2, 0),
    ],
)
def test_x_is_read_once_by_tma_and_everything_is_wide_and_rounded(name, shape, threads, stores, writes, copies, dtype):
    compiled = compile_quantizer(name, shape, dtype)
    kernel = compiled.kernel
    assert (kernel.threads, kernel.tma_loads, compiled.tma_stores, compiled.copies) == (threads, 1, stores, copies)
    assert (kernel.spilled_bytes, kernel.code_copies) == (0, 0)
    # The interpreter would miss neither: it copies at once what was written.
    assert (compiled.fences, compiled.waits) == (writes, writes)
    # A block's scale is the only thing that threads write themselves.
    assert compiled.global_accesses == (("st.global.b32",) if name.startswith("128×128") else ())
    assert compiled.x_bytes == 16
    assert compiled.exact_reciprocals > 0
    assert compiled.approximate_divisions == 0
    assert kernel.blocks_per_sm * kernel.threads >= 256


@pytest.mark.aot
def test_only_sizes_that_tma_cannot_have_are_padded():
    """x is padded, and codes and scales are cut off; tiles that end beyond an array need nothing."""
    assert compile_quantizer("128×1", (1000, 2112), BF16).copies == 0
    assert compile_quantizer("128×1", (1009, 2112), BF16).copies > 0
    assert compile_quantizer("128×1", (1024, 2100), BF16).copies > 0


PTX = """
.maxntid 128, 1, 1
fence.proxy.async.shared::cta;
cp.async.bulk.wait_group.read 0;
cp.async.bulk.wait_group 0;
cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%rd2, {%r4}], [%r5];
ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r5];
ld.shared.b32 %r1, [%r5];
rcp.rn.f32 %f1, %f2;
div.full.f32 %f1, %f2, %f3;
st.global.b32 [%rd34], %r364;
cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%rd3, {%r6}], [%r7];
cp.async.bulk.global.shared::cta.bulk_group [%rd3], [%r7], 256;
"""
PTXAS = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nUsed 48 registers, used 2 barriers"
LAUNCH = "gpu.launch async dynamic_shared_memory_size %c27000_i32 {"
PROGRAM = """
ENTRY %main (a: bf16[8,8]) -> (f8e4m3fn[8,8], f32[8,1]) {
  %k = (f8e4m3fn[8,8], f32[1,8]) custom-call(%a), custom_call_target="mosaic_gpu_v2"
  %t = f32[8,1]{1,0} transpose(%g), dimensions={1,0}
}
"""


def test_what_is_read_of_the_compilers_output():
    compiled = read_quantizer(PTX, PTXAS, LAUNCH, PROGRAM)
    assert (compiled.kernel.registers, compiled.kernel.tma_loads, compiled.tma_stores) == (48, 1, 2)
    assert compiled.global_accesses == ("st.global.b32",)
    assert (compiled.fences, compiled.waits) == (1, 1)
    assert (compiled.x_bytes, compiled.copies) == (16, 1)
    assert (compiled.exact_reciprocals, compiled.approximate_divisions) == (1, 1)


def test_bytes_by_hand():
    assert set(KERNELS) == {"1×128", "128×1", "both", "128×128", "128×128 and transposed"}
    elements = 300 * 400
    assert bytes_moved("1×128", (300, 400), BF16) == 3 * elements + 4 * 300 * 4
    assert bytes_moved("128×1", (300, 400), F32) == 5 * elements + 4 * 3 * 400
    assert bytes_moved("both", (300, 400), BF16) == 4 * elements + 4 * (300 * 4 + 3 * 400)
    assert bytes_moved("128×128", (300, 400), BF16) == 3 * elements + 4 * 3 * 4
    assert bytes_moved("128×128 and transposed", (300, 400), BF16) == 4 * elements + 4 * 3 * 4
