"""The three products of a linear layer, of FP8 matrices: plain ones, and of rows in groups."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax import Array

from deepseek_jax import ops
from pallas_kernels.quantize import Quantized


@dataclasses.dataclass(frozen=True)
class Products:
    """Of x `[M, K]`, dy `[M, N]` and w `[K, N]`; with an alignment, of rows in groups and w `[E, K, N]`."""

    alignment: int | None = None
    """Where groups of rows start; None: there are none, and `group_sizes` is None as well."""
    promote: bool = True
    """See `Fp8Config.promote`."""

    def forward(self, x: Quantized, w: Quantized, group_sizes: Any, dtype) -> Array:
        """`[M, N]`: x in tiles of 1×128, w in blocks."""
        if self.alignment is None:
            return self._matmul(x, w, dtype)
        return ops.grouped_matmul(x, w, group_sizes, alignment=self.alignment, out_dtype=dtype)

    def input_gradient(self, dy: Quantized, w: Quantized, group_sizes: Any, dtype) -> Array:
        """`[M, K]`: dy in tiles of 1×128, w in blocks."""
        if self.alignment is None:
            return self._matmul(dy, w.T, dtype)
        return ops.grouped_matmul_dx(dy, w, group_sizes, alignment=self.alignment, out_dtype=dtype)

    def weight_gradient(self, x: Quantized, dy: Quantized, group_sizes: Any, dtype) -> Array:
        """`[K, N]`, or one for each group: both in tiles of 128×1."""
        if self.alignment is None:
            return self._matmul(x.T, dy, dtype)
        return ops.grouped_matmul_dw(x, dy, group_sizes, alignment=self.alignment).astype(dtype)

    def _matmul(self, a: Quantized, b: Quantized, dtype) -> Array:
        return ops.block_scaled_matmul(a, b, out_dtype=dtype, implementation=None if self.promote else "14_bits")
