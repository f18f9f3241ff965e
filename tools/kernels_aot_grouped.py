"""Compiles the grouped matmuls for Hopper at DeepSeek-V3's shapes without a GPU, and prints what the compiler made.

`python -m tools.kernels_aot_grouped` needs the extra [cuda] (no GPU, no driver). Columns and predictions are those of
`tools/kernels_aot.py`, for groups of equal size that start at multiples of 128. FP8's Dgrad is Fprop's kernel; in
bfloat16 the matrices lie the other way.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from absl import app

from pallas_kernels.block_scaled_matmul.config import BLOCK, MatmulConfig, TileConfig, rounds, step_cycles
from pallas_kernels.grouped_matmul import mosaic_gpu
from pallas_kernels.grouped_matmul.config import STEP, ArrayConfig, array_step_cycles
from pallas_kernels.tune.products import EXPERTS, GROUPS, Product, grouped_products
from tools.kernels_aot import (
    HEAD,
    PEAK_FLOPS,
    SMS,
    CompiledKernel,
    Prediction,
    cells,
    compile_kernel,
    markdown,
    on_h200,
    predict,
    quantized_on_h200,
    read_kernel,
    report,
)


def compile_product(product: Product, config: TileConfig) -> CompiledKernel:
    """Compiles a product for an H200; each kernel once in a process.

    Raises:
      ConfigError: jax cannot compile for GPUs here.
      RuntimeError: this process compiled the same kernel before.
    """
    m, n, k, options = product.all_rows, product.n, product.k, {"config": config, "sms": SMS}
    out_dtype, alignment = product.result[2], product.alignment

    def operand(shape, tile):
        if product.quantized:
            return quantized_on_h200(shape, tile)
        return jax.ShapeDtypeStruct(shape, product.operands, sharding=on_h200())

    def rows_by_matrices(x, w, sizes):
        # FP8 matrices `[n, k]` are transposed copies, as `quantize_weight` makes them for Fprop.
        w = w.T if product.quantized else w
        contract = 2 if product.name == "Dgrad" else 1
        return mosaic_gpu.rows_by_matrices(x, w, sizes, alignment, out_dtype, contract, **options)

    def rows_by_rows(x, dy, sizes):
        return mosaic_gpu.rows_by_rows(x, dy, sizes, alignment, **options)

    sizes = jax.ShapeDtypeStruct((product.groups,), jnp.int32, sharding=on_h200())
    if product.name == "Wgrad":
        columns = (BLOCK, 1)
        return read_kernel(*compile_kernel(rows_by_rows, operand((m, k), columns), operand((m, n), columns), sizes))
    x = operand((m, n if product.name == "Dgrad" else k), (1, BLOCK))
    w = operand((product.groups, n, k) if product.quantized else (product.groups, k, n), (BLOCK, BLOCK))
    return read_kernel(*compile_kernel(rows_by_matrices, x, w, sizes))


def predict_product(product: Product, config: TileConfig) -> Prediction:
    """Its floors, and the time of the kernel by the assumptions of `tools/kernels_aot.py`."""
    m, n, k = product.all_rows, product.n, product.k
    rows, columns, out_dtype = product.result
    elements = {"Fprop": (m * k, product.groups * k * n), "Dgrad": (m * n, product.groups * k * n)}
    a, b = elements.get(product.name, (m * k, m * n))
    results = (product.groups if product.name == "Wgrad" else 1) * rows * columns
    moved = (a + b) * product.operands.itemsize + results * out_dtype.itemsize
    deep = {"Fprop": k, "Dgrad": n, "Wgrad": product.rows}[product.name]
    tiles = rounds(config, rows, columns, SMS, product.along)
    if isinstance(config, MatmulConfig):
        moved += 4 * (a // BLOCK + b // (BLOCK if config.column_scales else BLOCK * BLOCK))
        return predict(product.flops, PEAK_FLOPS, moved, tiles, -(-deep // BLOCK), step_cycles(config, rows))
    assert isinstance(config, ArrayConfig)
    return predict(product.flops, PEAK_FLOPS / 2, moved, tiles, -(-deep // STEP), array_step_cycles(config))


def table(groups: Sequence[tuple[int, int]] = GROUPS, weights: Sequence[tuple[int, int]] = EXPERTS) -> list[str]:
    """The lines of a Markdown table, one for each product and shape."""

    def row(product):
        config = product.default(SMS)
        described = cells(config, compile_product(product, config), predict_product(product, config), product.flops)
        shapes = f"{product.groups} × {product.rows}", f"{product.n}×{product.k}"
        return product.name, product.operands.name, *shapes, *described

    products = [one for one in grouped_products(groups, weights) if not (one.quantized and one.name == "Dgrad")]
    return markdown(("product", "operands", "groups × rows", "N×K", *HEAD), map(row, products))


def main(argv: Sequence[str]) -> int:
    """Prints the table of grouped matmuls; the exit code."""
    return report(argv, "tools.kernels_aot_grouped", "`grouped_matmul`", table)


if __name__ == "__main__":
    app.run(lambda argv: sys.exit(main(argv)))
