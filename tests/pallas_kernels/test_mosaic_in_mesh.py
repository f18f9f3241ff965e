"""Every Hopper kernel inside `shard_map`, as a train step runs it: it can be traced, and results vary as operands do.

A result that jax takes for equal on all devices would get gradients summed over them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels.block_scaled_matmul import mosaic_gpu as block_scaled
from pallas_kernels.grouped_matmul import mosaic_gpu as grouped
from pallas_kernels.permute import mosaic_gpu as permute
from pallas_kernels.quantize import Quantized, mosaic_gpu, mosaic_gpu_requantize, mosaic_gpu_swiglu
from pallas_kernels.quantize.reference import scale_shape

BF16, F32, E4M3 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32), jnp.dtype(jnp.float8_e4m3fn)


def array(*shape, dtype=BF16):
    return jax.ShapeDtypeStruct(shape, dtype)


def quantized(tile, *shape):
    return Quantized(array(*shape, dtype=E4M3), array(*scale_shape(shape, tile), dtype=F32), tile)


def integers(*shape):
    return array(*shape, dtype=jnp.int32)


ROW, COLUMN, BLOCK = (1, 128), (128, 1), (128, 128)
KERNELS = {
    "Fprop": (
        lambda a, b: block_scaled.block_scaled_matmul(a, b, BF16, sms=4),
        (quantized(ROW, 200, 256), quantized(BLOCK, 256, 384)),
    ),
    "Wgrad": (
        lambda a, b: block_scaled.block_scaled_matmul(a.T, b, F32, sms=4),
        (quantized(COLUMN, 200, 256), quantized(COLUMN, 200, 384)),
    ),
    "grouped Fprop, FP8": (
        lambda x, w, sizes: grouped.rows_by_matrices(x, w, sizes, 128, BF16, sms=4),
        (quantized(ROW, 512, 256), quantized(BLOCK, 3, 256, 384), integers(3)),
    ),
    "grouped Dgrad, FP8": (
        lambda x, w, sizes: grouped.rows_by_matrices(x, w, sizes, 128, BF16, 2, sms=4),
        (quantized(ROW, 512, 384), quantized(BLOCK, 3, 256, 384), integers(3)),
    ),
    "grouped Wgrad, FP8": (
        lambda x, dy, sizes: grouped.rows_by_rows(x, dy, sizes, 128, sms=4),
        (quantized(COLUMN, 512, 256), quantized(COLUMN, 512, 384), integers(3)),
    ),
    "grouped Fprop, bfloat16": (
        lambda x, w, sizes: grouped.rows_by_matrices(x, w, sizes, 1, BF16, sms=4),
        (array(512, 256), array(3, 256, 384), integers(3)),
    ),
    "grouped Dgrad, bfloat16": (
        lambda x, w, sizes: grouped.rows_by_matrices(x, w, sizes, 1, BF16, 2, sms=4),
        (array(512, 384), array(3, 256, 384), integers(3)),
    ),
    "grouped Wgrad, bfloat16": (
        lambda x, dy, sizes: grouped.rows_by_rows(x, dy, sizes, 1, sms=4),
        (array(512, 256), array(512, 384), integers(3)),
    ),
    **{
        f"quantise {tile}": (lambda x, tile=tile: mosaic_gpu.quantize(x, tile, False, 1e-4), (array(256, 384),))
        for tile in (ROW, COLUMN, BLOCK)
    },
    "quantise both": (lambda x: mosaic_gpu.quantize_both(x, False, 1e-4), (array(256, 384),)),
    "quantise a weight": (lambda x: mosaic_gpu.quantize_weight(x, False, 1e-4), (array(256, 384),)),
    "requantise": (
        lambda codes, scales: mosaic_gpu_requantize.requantize_columns(codes, scales, True, 1e-4),
        (array(256, 384, dtype=E4M3), array(256, 3, dtype=F32)),
    ),
    "SwiGLU": (
        lambda x, weights: mosaic_gpu_swiglu.quantize_swiglu(x, weights, False, 1e-4),
        (array(256, 512), array(256, dtype=F32)),
    ),
    "SwiGLU's backward pass": (
        lambda *kept: mosaic_gpu_swiglu.swiglu_backward(*kept, False, 1e-4),
        (array(256, 512, dtype=E4M3), array(256, 4, dtype=F32), array(256, 256), array(256, dtype=F32)),
    ),
    "gather": (lambda x, index: permute.gather_rows(x, index, sms=4), (array(64, 256), integers(200))),
    "combine": (
        lambda rows, slots, weights: permute.combine_rows(rows, slots, weights, sms=4),
        (array(200, 256), integers(64, 3), array(64, 3, dtype=F32)),
    ),
    "its backward pass": (
        lambda *arrays: permute.gather_rows_and_dots(*arrays, sms=4),
        (array(64, 256), integers(200), array(200, dtype=F32), array(200, 256)),
    ),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_its_results_vary_over_the_mesh_as_its_operands_do(kernel):
    function, operands = KERNELS[kernel]
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "expert"))
    seen = []

    def on_a_device(*operands):
        out = function(*jax.tree.map(lambda leaf: leaf[0], operands))
        seen.extend(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(out))
        return jax.tree.map(lambda leaf: leaf[None], out)

    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), operands)
    jax.eval_shape(jax.shard_map(on_a_device, mesh=mesh, in_specs=P("data"), out_specs=P("data")), *stacked)
    assert seen == [{"data"}] * len(seen)
    assert seen
