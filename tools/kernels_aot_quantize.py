"""Compiles the Hopper kernels of `quantize` for shapes of DeepSeek-V3 without a GPU, and prints what became of them.

`python -m tools.kernels_aot_quantize` needs the extra [cuda] (no GPU, no driver). For each shape: registers, spills,
shared memory and resident warps; the bulk copies to and from global memory, and how many bytes a thread reads from
shared memory at a time; the bytes that have to be moved, and how long that takes at the chip's full bandwidth. Nothing
runs: the last is a floor, not a prediction.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from absl import app

from pallas_kernels.quantize import mosaic_gpu
from tools.kernels_aot import MEMORY_BANDWIDTH, CompiledKernel, compile_kernel, on_h200, read_kernel, report

ACTIVATIONS = ((4096, 7168), (4096, 18432), (4096, 2048), (4096, 1536))
WEIGHTS = ((7168, 2112), (1536, 24576), (512, 32768), (16384, 7168), (7168, 4096), (2048, 7168))
"""K and N of V3's linear layers."""
KERNELS = {
    "1×128": (lambda x: mosaic_gpu.quantize(x, (1, 128), False, 1e-4), ACTIVATIONS),
    "128×1": (lambda x: mosaic_gpu.quantize(x, (128, 1), False, 1e-4), ACTIVATIONS),
    "both": (lambda x: mosaic_gpu.quantize_both(x, False, 1e-4), ACTIVATIONS),
    "128×128": (lambda x: mosaic_gpu.quantize(x, (128, 128), False, 1e-4), WEIGHTS),
    "128×128 and transposed": (lambda x: mosaic_gpu.quantize_weight(x, False, 1e-4), WEIGHTS),
}
"""By what they make: the function, and its shapes."""


@dataclasses.dataclass(frozen=True)
class CompiledQuantizer:
    """What the compiler made of a kernel, and of what surrounds it."""

    kernel: CompiledKernel
    tma_stores: int
    """Bulk copies from shared to global memory in the program's text."""
    fences: int
    """Fences that order what threads wrote to shared memory before the copies that follow."""
    waits: int
    """Waits until copies have read shared memory."""
    global_accesses: tuple[str, ...]
    """Loads and stores of global memory by threads, which are single elements or vectors: `st.global.b32`."""
    x_bytes: int
    """The most bytes of shared memory that one thread reads in an instruction; 0 where none reads any."""
    exact_reciprocals: int
    """`rcp.rn`, rounded to nearest."""
    approximate_divisions: int
    """Reciprocals and quotients that are not."""
    copies: int
    """Arrays that XLA makes before and after the kernel, of x padded or results cut off or transposed."""


def compile_quantizer(name: str, shape: tuple[int, int], dtype: jnp.dtype) -> CompiledQuantizer:
    """Compiles one of `KERNELS` for an H200; each kernel once in a process.

    Raises:
      ConfigError: jax cannot compile for GPUs here.
      RuntimeError: this process compiled the same kernel before.
    """
    x = jax.ShapeDtypeStruct(shape, dtype, sharding=on_h200())
    return read_quantizer(*compile_kernel(KERNELS[name][0], x))


def read_quantizer(ptx: str, ptxas: str, launch: str, program: str) -> CompiledQuantizer:
    """Reads what `compile_kernel` returns."""
    widths = re.findall(r"ld\.shared(?:\.v(\d))?\.b(\d+)", ptx)
    entry = program[program.index("\nENTRY ") :]
    return CompiledQuantizer(
        kernel=read_kernel(ptx, ptxas, launch, program),
        tma_stores=len(re.findall(r"cp\.async\.bulk\.(?:tensor\.\dd\.)?global\.shared::cta", ptx)),
        fences=len(re.findall(r"fence\.proxy\.async\.shared::cta", ptx)),
        waits=len(re.findall(r"cp\.async\.bulk\.wait_group\.read", ptx)),
        global_accesses=tuple(re.findall(r"\b((?:ld|st)\.(?:volatile\.|weak\.)?global\S*)", ptx)),
        x_bytes=max((int(count or 1) * int(bits) // 8 for count, bits in widths), default=0),
        exact_reciprocals=len(re.findall(r"\brcp\.rn\.f32", ptx)),
        approximate_divisions=len(re.findall(r"\b(?:div|rcp)\.(?:full|approx)", ptx)),
        copies=len(re.findall(r" (?:copy|fusion|pad|slice|transpose)\(", entry)),
    )


def bytes_moved(name: str, shape: tuple[int, int], dtype: jnp.dtype) -> int:
    """Bytes of x, read once, and of all codes and scales, written once."""
    out = jax.eval_shape(KERNELS[name][0], jax.ShapeDtypeStruct(shape, dtype))
    return sum(array.size * array.dtype.itemsize for array in out) + shape[0] * shape[1] * jnp.dtype(dtype).itemsize


COLUMNS = (
    "registers × threads",
    "spilled",
    "shared memory",
    "blocks per SM, warps",
    "TMA loads, stores",
    "other global accesses",
    "read from shared",
    "copies by XLA",
    "moved",
    "memory floor",
)
"""Of a table, after those that say what a row is of."""


def cells(compiled: CompiledQuantizer, moved: int) -> tuple[str, ...]:
    """What stands in `COLUMNS` for a kernel that moves so many bytes."""
    kernel = compiled.kernel
    return (
        f"{kernel.registers} × {kernel.threads}",
        f"{kernel.spilled_bytes} B",
        f"{kernel.shared_bytes / 1024:.0f} KB",
        f"{kernel.blocks_per_sm}, {kernel.occupancy:.0%}",
        f"{kernel.tma_loads}, {compiled.tma_stores}",
        ", ".join(dict.fromkeys(compiled.global_accesses)) or "none",
        f"{compiled.x_bytes} B" if compiled.x_bytes else "none",
        str(compiled.copies),
        f"{moved / 1e6:.0f} MB",
        f"{moved / MEMORY_BANDWIDTH * 1e6:.1f} µs",
    )


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    head_line, *lines = ("| " + " | ".join(row) + " |" for row in (head, *rows))
    return [head_line, "|---" * len(head) + "|", *lines]


def table(dtypes: Sequence[jnp.dtype]) -> list[str]:
    """The lines of a Markdown table, one for each kernel, dtype of x and shape."""
    rows = []
    for name, (_, shapes) in KERNELS.items():
        for dtype in dtypes:
            for shape in shapes:
                compiled, moved = compile_quantizer(name, shape, dtype), bytes_moved(name, shape, dtype)
                rows.append((name, jnp.dtype(dtype).name, f"{shape[0]}×{shape[1]}", *cells(compiled, moved)))
    return markdown(("tiles", "x", "M×N", *COLUMNS), rows)


def main(argv: Sequence[str]) -> int:
    """Prints the table of quantisers; the exit code."""
    dtypes = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
    return report(argv, "tools.kernels_aot_quantize", "`quantize`", lambda: table(dtypes))


if __name__ == "__main__":
    app.run(lambda argv: sys.exit(main(argv)))
