"""Compiles the Hopper kernels for every shape of DeepSeek-V3 without a GPU, and prints what the compiler made of them.

`python -m tools.kernels_aot` needs the extra [cuda] (no GPU, no driver). For each shape: registers, spills, shared
memory, `wgmma` in E4M3 and TMA loads, read from the PTX and from what ptxas and Mosaic say; the share of an SM's warps
that are resident; and two floors, for the multiply-adds at the chip's peak and for moving every operand once, and a
prediction. First Fprop (and Dgrad, the same kernel), then Wgrad, whose results are float32 always. Nothing runs: the
prediction adds up what `block_scaled_matmul/config.py` takes a step to cost, and `TILE_CYCLES` for what a tile costs
besides. It is a model of the design, not a measurement, and knows nothing of the
power limit. Where nvdisasm is not installed Mosaic says so on stderr, which does not matter here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from deepseek_jax.config import ConfigError
from deepseek_jax.parallel.mesh import ParallelConfig
from deepseek_jax.planning.gpu_target import h200_mesh
from pallas_kernels.block_scaled_matmul import mosaic_gpu
from pallas_kernels.block_scaled_matmul.config import (
    BLOCK,
    MatmulConfig,
    TileConfig,
    default_config,
    rounds,
    step_cycles,
)
from pallas_kernels.quantize import Quantized
from pallas_kernels.quantize.reference import scale_shape
from pallas_kernels.tune.products import ROWS, TOKENS, WEIGHTS

OUT_DTYPE = flags.DEFINE_enum("out_dtype", "bfloat16", ["bfloat16", "float32"], "dtype of Fprop's results")

SMS = 132
PEAK_FLOPS = 1979e12
"""Dense FP8 of an H200, per second."""
MEMORY_BANDWIDTH = 4.8e12
"""Bytes per second of an H200."""
CLOCK = PEAK_FLOPS / (SMS * 4096 * 2)
"""Cycles per second at which that peak is had: 1.83 GHz."""
SM_SHARED_MEMORY, SM_REGISTERS, SM_WARPS = 233_472, 65_536, 64
TILE_CYCLES = 1500
"""For a tile's result to leave the registers while nothing is multiplied, and for a first product: our assumption."""


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """What the compiler made of a kernel."""

    threads: int
    """Of a block."""
    registers: int
    """Of a thread at launch; a kernel may then move some from one warpgroup to others."""
    spilled_bytes: int
    """Written to and read from local memory by each thread, where registers did not suffice."""
    shared_bytes: int
    """Shared memory of a block."""
    wgmma_e4m3: int
    """`wgmma` instructions on E4M3 in the program's text."""
    tma_loads: int
    """Bulk tensor copies from global to shared memory in the program's text."""
    multicast_loads: int
    """How many of them write to several blocks."""
    remote_arrivals: int
    """Arrivals at the barriers of another block of the cluster in the program's text."""
    code_copies: int
    """Copies of operands' FP8 codes, transposed or padded, that XLA makes before the kernel runs."""
    wgmma_bf16: int = 0
    """`wgmma` instructions on bfloat16 in the program's text."""
    serialized: int = 0
    """How often ptxas says that it makes `wgmma` instructions wait for one another."""

    @property
    def blocks_per_sm(self) -> int:
        """Blocks that fit on one SM at a time; each also takes 1 KB of shared memory for itself."""
        return min(
            SM_SHARED_MEMORY // (self.shared_bytes + 1024),
            SM_REGISTERS // (self.registers * self.threads),
            SM_WARPS * 32 // self.threads,
        )

    @property
    def occupancy(self) -> float:
        """Share of the warps that an SM can hold."""
        return self.blocks_per_sm * self.threads / 32 / SM_WARPS


def compile_matmul(
    m: int, n: int, k: int, out_dtype: jnp.dtype, config: MatmulConfig, *, k_major: bool = True
) -> CompiledKernel:
    """Compiles a product `[m, k]` by `[k, n]` for an H200; each kernel once in a process.

    Args:
      m: Rows of a.
      n: Columns of b.
      k: What is summed over.
      out_dtype: Of the result.
      config: How the work is cut.
      k_major: b's codes lie as the kernel reads them, `[n, k]`: Dgrad, or Fprop with a transposed copy of the weight.

    Raises:
      ConfigError: jax cannot compile for GPUs here.
      RuntimeError: this process compiled the same kernel before.
    """

    def product(a, b):
        return mosaic_gpu.block_scaled_matmul(a, b.T if k_major else b, out_dtype, config=config, sms=SMS)

    b = quantized_on_h200((n, k) if k_major else (k, n), (BLOCK, BLOCK))
    return read_kernel(*compile_kernel(product, quantized_on_h200((m, k), (1, BLOCK)), b))


def compile_wgrad(tokens: int, n: int, k: int, config: MatmulConfig) -> CompiledKernel:
    """Compiles `x.T @ dy` of x `[tokens, k]` and dy `[tokens, n]`, float32, for an H200; errors of `compile_matmul`."""

    def product(x, dy):
        return mosaic_gpu.block_scaled_matmul(x.T, dy, jnp.dtype(jnp.float32), config=config, sms=SMS)

    operands = (quantized_on_h200((tokens, width), (BLOCK, 1)) for width in (k, n))
    return read_kernel(*compile_kernel(product, *operands))


def quantized_on_h200(shape: tuple[int, ...], tile: tuple[int, int]) -> Quantized:
    """Shapes of E4M3 codes `[..., M, N]` and their scales, on one H200."""
    sharding = on_h200()
    return Quantized(
        jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn, sharding=sharding),
        jax.ShapeDtypeStruct(scale_shape(shape, tile), jnp.float32, sharding=sharding),
        tile,
    )


@functools.cache  # Two descriptions would be two devices.
def on_h200() -> jax.sharding.Sharding:
    """Where arrays lie on one H200 that exists in the description only.

    Raises:
      ConfigError: jax cannot compile for GPUs here.
    """
    (device,) = h200_mesh(ParallelConfig()).devices.flat
    return jax.sharding.SingleDeviceSharding(device)


def compile_kernel(function: Callable[..., Any], *shapes: Any) -> tuple[str, str, str, str]:
    """Compiles a function with one kernel of Mosaic's: what `read_kernel` reads.

    Args:
      function: What is compiled.
      shapes: Its arguments as ShapeDtypeStructs `on_h200`, or pytrees of them.

    Raises:
      RuntimeError: this process compiled the same kernel before.
    """
    with _dumps() as folder:
        program = jax.jit(function).lower(*shapes).compile().as_text() or ""
        dumps = {file.name.split(".", 1)[1]: file for file in folder.iterdir()}
        if not dumps:
            raise RuntimeError(f"this kernel was compiled before in this process, and Mosaic keeps it: {shapes}")
        with dumps["mlir-passes.log"].open(encoding="utf-8") as lines:
            launch = next(line for line in lines if "gpu.launch" in line)
        return dumps["ptx"].read_text("utf-8"), dumps["ptxas"].read_text("utf-8"), launch, program


@contextlib.contextmanager
def _dumps() -> Iterator[Path]:
    """A folder that Mosaic writes to what it compiles within the context.

    jax's cache of compiled programs keeps none of them: a program that came from there would leave nothing here.
    """
    name, seconds = "MOSAIC_GPU_DUMP_TO", "jax_persistent_cache_min_compile_time_secs"
    folder_before, seconds_before = os.environ.get(name), getattr(jax.config, seconds)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[name] = folder
        jax.config.update(seconds, 1e9)
        try:
            yield Path(folder)
        finally:
            jax.config.update(seconds, seconds_before)
            os.environ.pop(name)
            if folder_before is not None:
                os.environ[name] = folder_before


def read_kernel(ptx: str, ptxas: str, launch: str, program: str) -> CompiledKernel:
    """Reads the PTX, what ptxas said of it, the line of Mosaic's program that launches it, and XLA's program.

    Raises:
      ValueError: if one of them lacks what is looked for.
    """

    def number(pattern: str, text: str) -> int:
        found = re.search(pattern, text)
        if found is None:
            raise ValueError(f"the compiler's output has no {pattern!r}: {text[:500]}")
        return int(found[1])

    entry = program[program.index("\nENTRY ") :]
    loads = re.findall(r"cp\.async\.bulk\.tensor\S*shared::cluster\.global\S*", ptx)
    return CompiledKernel(
        threads=number(r"\.maxntid (\d+)", ptx),
        registers=number(r"Used (\d+) registers", ptxas),
        spilled_bytes=number(r"(\d+) bytes spill stores", ptxas) + number(r"(\d+) bytes spill loads", ptxas),
        shared_bytes=number(r"dynamic_shared_memory_size %c(\d+)_i32", launch),
        wgmma_e4m3=len(re.findall(r"wgmma\.mma_async\S*\.e4m3\.e4m3", ptx)),
        tma_loads=len(loads),
        multicast_loads=sum("multicast" in load for load in loads),
        remote_arrivals=len(re.findall(r"mbarrier\.arrive\.shared::cluster", ptx)),
        code_copies=len(re.findall(r"= f8e4m3fn\[\S+ (?:copy|fusion|pad|transpose)\(", entry)),
        wgmma_bf16=len(re.findall(r"wgmma\.mma_async\S*\.bf16\.bf16", ptx)),
        serialized=len(re.findall(r"wgmma\S* instructions are serialized", ptxas)),
    )


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Times of one product in seconds."""

    arithmetic: float
    """Its multiply-adds at the chip's peak."""
    memory: float
    """Each operand and the result moved once."""
    kernel: float
    """What the kernel should take."""
    bound: str
    """What sets that: "memory", or the longest of `step_cycles`."""


def predict(flops: float, peak: float, moved: float, tiles: int, steps: float, step: dict[str, float]) -> Prediction:
    """The floors of a product, and the time of the kernel by the assumptions named at the top of this module.

    Args:
      flops: Of the product.
      peak: FLOPs per second of the chip, in the operands' dtype.
      moved: Bytes of operands and result.
      tiles: How many the busiest SM makes.
      steps: How many steps along K a tile takes.
      step: Cycles of a step, by what could take that long.
    """
    memory = moved / MEMORY_BANDWIDTH
    bound = max(step, key=step.__getitem__)
    kernel = tiles * (steps * step[bound] + TILE_CYCLES) / CLOCK
    if kernel < memory:
        kernel, bound = memory, "memory"
    return Prediction(flops / peak, memory, kernel, bound)


def predict_matmul(m: int, n: int, k: int, out_dtype: jnp.dtype, config: MatmulConfig) -> Prediction:
    """The same for a block-scaled product `[m, k]` by `[k, n]`."""
    depth, columns = -(-k // BLOCK), n if config.column_scales else -(-n // BLOCK)
    moved = (m + n) * k + 4 * depth * (m + columns) + m * n * jnp.dtype(out_dtype).itemsize
    tiles = rounds(config, m, n, SMS)
    return predict(2 * m * n * k, PEAK_FLOPS, moved, tiles, depth, step_cycles(config, m))


HEAD = (
    "tile, stages, cluster",
    "registers × threads",
    "spilled",
    "shared memory",
    "blocks per SM, warps",
    "wgmma, TMA loads (multicast)",
    "codes copied",
    "arithmetic floor",
    "memory floor",
    "predicted",
    "bound by",
)
"""The columns of a table that follow those which say what is multiplied."""


def cells(config: TileConfig, kernel: CompiledKernel, times: Prediction, flops: float) -> tuple[str, ...]:
    """A row's cells under `HEAD`."""
    return (
        f"{config.tile_m}×{config.tile_n}, {config.stages}, {config.cluster}",
        f"{kernel.registers} × {kernel.threads}",
        f"{kernel.spilled_bytes} B",
        f"{kernel.shared_bytes / 1024:.0f} KB",
        f"{kernel.blocks_per_sm}, {kernel.occupancy:.0%}",
        f"{kernel.wgmma_e4m3 + kernel.wgmma_bf16}, {kernel.tma_loads} ({kernel.multicast_loads})",
        str(kernel.code_copies),
        f"{times.arithmetic * 1e6:.1f} µs",
        f"{times.memory * 1e6:.1f} µs",
        f"{times.kernel * 1e6:.1f} µs, {flops / times.kernel / 1e12:.0f} TFLOP/s",
        times.bound,
    )


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a table."""
    return ["| " + " | ".join(map(str, line)) + " |" for line in (head, ["---"] * len(head), *rows)]


def table(out_dtype: jnp.dtype, rows: Sequence[int] = ROWS, weights: Sequence[tuple[int, int]] = WEIGHTS) -> list[str]:
    """The lines of the table of Fprop, one for each shape."""

    def row(m, n, k):
        config = default_config(m, n, out_dtype, SMS)
        kernel, times = compile_matmul(m, n, k, out_dtype, config), predict_matmul(m, n, k, out_dtype, config)
        return m, f"{n}×{k}", *cells(config, kernel, times, 2 * m * n * k)

    return markdown(("M", "N×K", *HEAD), (row(m, n, k) for m in rows for n, k in weights))


def wgrad_table(weights: Sequence[tuple[int, int]] = WEIGHTS) -> list[str]:
    """The lines of the table of Wgrad, one for each shape."""
    float32 = jnp.dtype(jnp.float32)

    def row(n, k):
        config = default_config(k, n, float32, SMS, b_tile=(BLOCK, 1))
        times = predict_matmul(k, n, TOKENS, float32, config)
        return TOKENS, f"{n}×{k}", *cells(config, compile_wgrad(TOKENS, n, k, config), times, 2 * TOKENS * n * k)

    return markdown(("tokens", "N×K", *HEAD), (row(n, k) for n, k in weights))


def report(argv: Sequence[str], usage: str, kernels: str, make: Callable[[], list[str]]) -> int:
    """Compiles and prints the table that `make` gives, of these kernels; the exit code."""
    if len(argv) != 1:
        print(f"usage: python -m {usage}", file=sys.stderr)
        return 2
    try:
        lines = make()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{kernels}, compiled for sm_90a by jax {jax.__version__}:\n")
    print("\n".join(lines))
    return 0


def main(argv: Sequence[str]) -> int:
    """Prints the tables of matmuls; the exit code."""
    usage = "tools.kernels_aot [--out_dtype=float32]"
    kernels = f"`block_scaled_matmul`, {OUT_DTYPE.value} results"
    code = report(argv, usage, kernels, lambda: table(jnp.dtype(OUT_DTYPE.value)))
    return code or report(argv, usage, "\n`block_scaled_matmul`, Wgrad", wgrad_table)


if __name__ == "__main__":
    app.run(lambda argv: sys.exit(main(argv)))
