"""Compiles the memory-bound Hopper kernels around the experts without a GPU, and prints what became of them.

`python -m tools.kernels_aot_experts` needs the extra [cuda] (no GPU, no driver). At DeepSeek-V3's sizes: rows gathered
for 8 experts of each token and combined again, and the backward pass of that; SwiGLU with its quantisation, forward and
backward, of a dense layer and of routed rows; and the requantisation for Wgrad. Columns are those of
`tools.kernels_aot_quantize`. Bytes are those of every argument and result, moved once; nothing runs, and the floor is
no prediction.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app

from pallas_kernels.permute import mosaic_gpu as permute
from pallas_kernels.quantize import mosaic_gpu_requantize, mosaic_gpu_swiglu
from tools.kernels_aot import SMS, compile_kernel, on_h200, report
from tools.kernels_aot_quantize import COLUMNS, CompiledQuantizer, cells, markdown, read_quantizer

TOKENS, WIDTH, CHOICES = 4096, 7168, 8
ROWS = TOKENS * CHOICES
DENSE, EXPERT = 18432, 2048
"""Channels of a dense layer's and of an expert's SwiGLU."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel at one size."""

    kernel: str
    size: str
    function: Callable[..., Any]
    arguments: tuple[jax.ShapeDtypeStruct, ...]

    def compile(self) -> CompiledQuantizer:
        """Compiles it for an H200; each kernel once in a process.

        Raises:
          ConfigError: jax cannot compile for GPUs here.
          RuntimeError: this process compiled the same kernel before.
        """
        sharding = on_h200()
        there = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in self.arguments]
        return read_quantizer(*compile_kernel(self.function, *there))

    def bytes_moved(self) -> int:
        """Bytes of every argument and result."""
        arrays = [*self.arguments, *jax.tree.leaves(jax.eval_shape(self.function, *self.arguments))]
        return sum(x.size * x.dtype.itemsize for x in arrays)


def cases() -> list[Case]:
    """Every kernel at every size."""
    return [*_permute_cases(), *_swiglu_cases(), *_requantize_cases()]


def array_of(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    """What stands for an argument."""
    return jax.ShapeDtypeStruct(shape, dtype)


def _permute_cases() -> list[Case]:
    size = f"{ROWS} of {TOKENS}×{WIDTH}"
    slots, weights = array_of(jnp.int32, TOKENS, CHOICES), array_of(jnp.float32, TOKENS, CHOICES)
    index, of_rows = array_of(jnp.int32, ROWS), array_of(jnp.float32, ROWS)
    found = []
    for dtype in (jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn):
        x, rows, name = array_of(dtype, TOKENS, WIDTH), array_of(dtype, ROWS, WIDTH), jnp.dtype(dtype).name
        found.append(Case(f"gather, {name}", size, lambda x, index: permute.gather_rows(x, index, sms=SMS), (x, index)))
        if dtype == jnp.float8_e4m3fn:
            continue
        found += [
            Case(
                f"combine, {name}",
                size,
                lambda rows, slots: permute.combine_rows(rows, slots, None, sms=SMS),
                (rows, slots),
            ),
            Case(
                f"combine with weights, {name}",
                size,
                lambda rows, slots, weights: permute.combine_rows(rows, slots, weights, sms=SMS),
                (rows, slots, weights),
            ),
            Case(
                f"its backward pass, {name}",
                size,
                lambda *args: permute.gather_rows_and_dots(*args, sms=SMS),
                (x, index, of_rows, rows),
            ),
        ]
    return found


def _swiglu_cases() -> list[Case]:
    e4m3, found = jnp.float8_e4m3fn, []
    for rows, channels, weights in ((TOKENS, DENSE, ()), (ROWS, EXPERT, (array_of(jnp.float32, ROWS),))):
        size = f"{rows}×(2×{channels})" + (" with weights" if weights else "")
        for dtype in (jnp.bfloat16, jnp.float32):
            name = jnp.dtype(dtype).name

            def forward(gate_up, weights=None):
                return mosaic_gpu_swiglu.quantize_swiglu(gate_up, weights, False, 1e-4)

            def backward(codes, scales, dhidden, weights=None):
                return mosaic_gpu_swiglu.swiglu_backward(codes, scales, dhidden, weights, False, 1e-4)

            gate_up, dhidden = array_of(dtype, rows, 2 * channels), array_of(dtype, rows, channels)
            kept = array_of(e4m3, rows, 2 * channels), array_of(jnp.float32, rows, 2 * channels // 128)
            found += [
                Case(f"SwiGLU, {name}", size, forward, (gate_up, *weights)),
                Case(f"its backward pass, {name}", size, backward, (*kept, dhidden, *weights)),
            ]
    return found


def _requantize_cases() -> list[Case]:
    def columns(codes, scales):
        return mosaic_gpu_requantize.requantize_columns(codes, scales, False, 1e-4)

    return [
        Case(
            "requantise, transposed",
            f"{rows}×{width}",
            columns,
            (array_of(jnp.float8_e4m3fn, rows, width), array_of(jnp.float32, rows, width // 128)),
        )
        for rows, width in ((TOKENS, WIDTH), (TOKENS, DENSE), (ROWS, WIDTH), (ROWS, EXPERT))
    ]


def table() -> list[str]:
    """The lines of a Markdown table, one for each case."""
    rows = [(case.kernel, case.size, *cells(case.compile(), case.bytes_moved())) for case in cases()]
    return markdown(("kernel", "size", *COLUMNS), rows)


def main(argv: Sequence[str]) -> int:
    """Prints the table; the exit code."""
    return report(argv, "tools.kernels_aot_experts", "`permute`, and SwiGLU and `requantize` of `quantize`", table)


if __name__ == "__main__":
    app.run(lambda argv: sys.exit(main(argv)))
