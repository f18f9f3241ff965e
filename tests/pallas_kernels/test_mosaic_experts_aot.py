"""The memory-bound Hopper kernels around the experts as the compiler makes them for sm_90a without a GPU."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.permute import mosaic_gpu
from pallas_kernels.permute.config import PermuteConfig
from pallas_kernels.quantize import mosaic_gpu_requantize, mosaic_gpu_swiglu
from tools.kernels_aot import compile_kernel, on_h200
from tools.kernels_aot_experts import Case, array_of, cases
from tools.kernels_aot_quantize import cells


def named(kernel, size=""):
    return next(case for case in cases() if case.kernel == kernel and case.size.startswith(size))


@pytest.mark.aot
@pytest.mark.parametrize(
    ("kernel", "fences", "read", "copies"),
    [
        ("gather, bfloat16", 0, 0, 1),  # What XLA makes: the index, with what names nothing past the end.
        ("gather, float8_e4m3fn", 0, 0, 1),
        ("combine, bfloat16", 1, 16, 1),
        ("combine with weights, float32", 1, 16, 1),
        ("its backward pass, bfloat16", 1, 16, 2),
    ],
)
def test_rows_are_moved_by_tma_and_tables_are_all_that_threads_read(kernel, fences, read, copies):
    compiled = named(kernel, "32768 of").compile()
    assert compiled.kernel.spilled_bytes == 0
    assert compiled.kernel.tma_loads >= 8
    # The interpreter would miss neither: it copies at once what was written.
    assert (compiled.fences, compiled.x_bytes, compiled.copies) == (fences, read, copies)
    assert compiled.waits > 0
    accesses = Counter(access.split(".")[0] for access in compiled.global_accesses)
    assert accesses["st"] == (4 if kernel.startswith("its") else 0)  # A sum for each row of an item.
    assert compiled.kernel.blocks_per_sm >= 3


@pytest.mark.aot
def test_a_last_chunk_that_is_shorter_is_stored_by_a_copy_of_its_own():
    """Mosaic copies a chunk by its length alone, so a whole one would run into the next token's row."""
    sharding = on_h200()
    slots = jax.ShapeDtypeStruct((16, 2), jnp.int32, sharding=sharding)
    lengths = []
    for width in (2048, 1536):
        rows = jax.ShapeDtypeStruct((32, width), jnp.bfloat16, sharding=sharding)
        ptx, *_ = compile_kernel(lambda rows, slots: mosaic_gpu.combine_rows(rows, slots, None, sms=4), rows, slots)
        lengths.append(len(set(re.findall(r"cp\.async\.bulk\.global\.shared::cta\.bulk_group .*, (%r\d+);", ptx))))
    assert lengths == [1, 2]


def test_results_have_room_for_the_rows_of_whole_items():
    """Whole rows are contiguous, and are copied by their length alone: under vmap, into the next array's rows."""
    x, index = array_of(jnp.bfloat16, 32, 512), array_of(jnp.int32, 97)
    text = str(jax.make_jaxpr(lambda x, index: mosaic_gpu.gather_rows(x, index, sms=4))(x, index))
    assert "bf16[100,4,128]" in text
    rows, weights = array_of(jnp.bfloat16, 97, 512), array_of(jnp.float32, 97)
    text = str(jax.make_jaxpr(lambda *args: mosaic_gpu.gather_rows_and_dots(*args, sms=4))(x, index, weights, rows))
    assert "bf16[100,4,128]" in text


@pytest.mark.aot
def test_a_last_chunk_of_several_rows_is_stored_row_by_row():
    """What TMA takes from shared memory must be contiguous."""
    x, index = array_of(jnp.bfloat16, 32, 37 * 128), array_of(jnp.int32, 97)
    compiled = Case("", "", lambda x, index: mosaic_gpu.gather_rows(x, index, sms=4), (x, index)).compile()
    assert compiled.tma_stores == 1 + 4
    dy, rows, weights = array_of(jnp.bfloat16, 32, 1536), array_of(jnp.bfloat16, 97, 1536), array_of(jnp.float32, 97)
    function = lambda *args: mosaic_gpu.gather_rows_and_dots(*args, sms=4)  # noqa: E731
    assert Case("", "", function, (dy, index, weights, rows)).compile().tma_stores == 1 + 4


@pytest.mark.aot
def test_every_config_that_passes_its_check_compiles():
    """The largest that shared memory holds: the check counts what Mosaic takes."""
    x, slots = array_of(jnp.float32, 64, 1024), array_of(jnp.int32, 16, 16)
    config = PermuteConfig(rows=1, lines=8, stages=3, blocks=1)
    config.check("combine_rows", x.dtype, 16, 2)
    with pytest.raises(ValueError, match="3 stages would fit"):
        PermuteConfig(rows=1, lines=8, stages=4, blocks=1).check("combine_rows", x.dtype, 16, 2)
    case = Case("", "", lambda x, slots: mosaic_gpu.combine_rows(x, slots, None, config=config, sms=4), (x, slots))
    assert case.compile().kernel.shared_bytes > 200_000


@pytest.mark.aot
def test_vmap_compiles_to_one_kernel():
    """With a dimension more in its grid."""
    codes, scales = array_of(jnp.float8_e4m3fn, 2, 256, 512), array_of(jnp.float32, 2, 256, 4)
    dhidden = array_of(jnp.bfloat16, 2, 256, 256)
    rows, slots = array_of(jnp.bfloat16, 2, 64, 1024), array_of(jnp.int32, 2, 16, 4)

    def columns(codes, scales):
        return mosaic_gpu_requantize.requantize_columns(codes, scales, False, 1e-4)

    def backward(codes, scales, dhidden):
        return mosaic_gpu_swiglu.swiglu_backward(codes, scales, dhidden, None, False, 1e-4)

    def combine(rows, slots):
        return mosaic_gpu.combine_rows(rows, slots, None, sms=2)

    for function, arguments in (
        (columns, (codes, scales)),
        (backward, (codes, scales, dhidden)),
        (combine, (rows, slots)),
    ):
        assert Case("", "", jax.vmap(function), arguments).compile().kernel.spilled_bytes == 0


@pytest.mark.aot
@pytest.mark.parametrize(
    ("kernel", "size", "loads", "stores"),
    [
        ("SwiGLU, bfloat16", "4096", 2, 6),
        ("SwiGLU, bfloat16", "32768", 3, 6),
        ("its backward pass, bfloat16", "4096×(", 5, 4),
        ("its backward pass, float32", "32768×(", 6, 5),
        ("requantise, transposed", "4096×7168", 2, 2),
    ],
)
def test_what_is_quantised_is_read_once_by_tma_and_rounded(kernel, size, loads, stores):
    compiled = named(kernel, size).compile()
    assert (compiled.kernel.tma_loads, compiled.tma_stores) == (loads, stores)
    assert compiled.kernel.spilled_bytes == 0
    assert compiled.kernel.code_copies == 0
    assert compiled.global_accesses == ()
    assert compiled.x_bytes == 16
    assert compiled.exact_reciprocals > 0
    if kernel.startswith("requantise"):  # A sigmoid may be approximate, a scale may not.
        assert compiled.approximate_divisions == 0


def test_bytes_by_hand():
    tokens, rows, width = 4096, 32768, 7168
    assert named("gather, float8_e4m3fn").bytes_moved() == (tokens + rows) * width + 4 * rows
    assert named("combine, bfloat16").bytes_moved() == 2 * (tokens + rows) * width + 4 * rows
    weighted = named("its backward pass, bfloat16", "32768 of")
    assert weighted.bytes_moved() == 2 * (tokens + 2 * rows) * width + 3 * 4 * rows
    # gate_up in bfloat16, its codes and hidden's, and a scale for 128 of them; a weight for each row.
    hidden = rows * 2048
    assert named("SwiGLU, bfloat16", "32768").bytes_moved() == 7 * hidden + 4 * 3 * hidden // 128 + 4 * rows
    requantised = tokens * width
    assert named("requantise, transposed").bytes_moved() == 2 * requantised + 4 * 2 * requantised // 128


def test_no_two_rows_of_the_table_are_alike():
    found = cases()
    assert len({(case.kernel, case.size) for case in found}) == len(found) == 21


def test_cells_say_none_where_nothing_is_read():
    from test_mosaic_quantize_aot import LAUNCH, PROGRAM, PTX, PTXAS

    from tools.kernels_aot_quantize import read_quantizer

    copied = "\n".join(line for line in PTX.splitlines() if "ld.shared" not in line and "st.global" not in line)
    row = cells(read_quantizer(copied, PTXAS, LAUNCH, PROGRAM), 480_000_000)
    assert row[5:7] == ("none", "none")
    assert row[8:] == ("480 MB", "100.0 µs")
