"""The matmuls that are measured: DeepSeek-V3's, each with random operands and its product by the kernel and without."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.block_scaled_matmul import block_scaled_matmul
from pallas_kernels.block_scaled_matmul import mosaic_gpu as block_scaled
from pallas_kernels.block_scaled_matmul.config import (
    BLOCK,
    Groups,
    MatmulConfig,
    TileConfig,
    default_config,
    matmul,
    rounds,
    step_cycles,
)
from pallas_kernels.device_tables import Matmul
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_matmul_dw, grouped_matmul_dx
from pallas_kernels.grouped_matmul import mosaic_gpu as grouped
from pallas_kernels.grouped_matmul.config import (
    STEP,
    ArrayConfig,
    array_matmul,
    array_step_cycles,
    default_array_config,
)
from pallas_kernels.quantize import Quantized, quantize
from pallas_kernels.quantize.reference import Tile

ROWS = (4096, 128, 64)
WEIGHTS = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
"""N and K of DeepSeek-V3's linear layers."""
TOKENS = 4096
"""What Wgrad sums over."""
GROUPS = ((4, 8192), (32, 512))
"""How many, and rows of each."""
EXPERTS = ((4096, 7168), (7168, 2048))
"""N and K of the experts' matrices."""
E4M3, BF16, F32 = (jnp.dtype(dtype) for dtype in (jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32))


@dataclasses.dataclass(frozen=True)
class Product:
    """One of a layer's three products, with rows in groups or without: x `[M, K]`, dy `[M, N]`, weights `[K, N]`."""

    name: str
    """Fprop, Dgrad or Wgrad."""
    rows: int
    """Of each group."""
    n: int
    k: int
    groups: int | None = None
    """How many there are; None: one, of the kernel without groups."""
    operands: jnp.dtype = E4M3
    """float8_e4m3fn, or bfloat16 for groups."""
    alignment: int = BLOCK
    """Groups start at multiples of this."""

    @property
    def quantized(self) -> bool:
        """Operands are FP8 with scales."""
        return self.operands != BF16

    @property
    def all_rows(self) -> int:
        """Of all groups together."""
        return (self.groups or 1) * self.rows

    @property
    def result(self) -> tuple[int, int, jnp.dtype]:
        """Rows and columns of a result, and its dtype."""
        if self.name == "Wgrad":
            return self.k, self.n, F32
        return self.all_rows, self.n if self.name == "Fprop" else self.k, BF16

    @property
    def depth(self) -> int:
        """What is summed over, in all groups."""
        return {"Fprop": self.k, "Dgrad": self.n, "Wgrad": self.all_rows}[self.name]

    @property
    def along(self) -> Groups | None:
        """Its groups, as a config knows them."""
        if self.groups is None:
            return None
        return Groups("depth" if self.name == "Wgrad" else "rows", self.groups, self.alignment)

    @property
    def b_tile(self) -> Tile:
        """Tiles of the right operand."""
        return (BLOCK, 1) if self.name == "Wgrad" else (BLOCK, BLOCK)

    @property
    def matmul(self) -> Matmul:
        """Its name in a table."""
        rows, columns, dtype = self.result
        if self.quantized:
            return matmul(rows, columns, self.depth, dtype, b_tile=self.b_tile, groups=self.along)
        assert self.along is not None
        return array_matmul(rows, columns, self.depth, dtype, self.along, self.name == "Dgrad")

    @property
    def flops(self) -> float:
        """Two for each multiply-add."""
        return 2.0 * self.all_rows * self.n * self.k

    def default(self, sms: int) -> TileConfig:
        """The config by size."""
        if self.quantized:
            return default_config(*self.result, sms, b_tile=self.b_tile, groups=self.along)
        assert self.along is not None
        return default_array_config(*self.result, sms, self.along)

    def cycles(self, config: TileConfig, sms: int) -> float:
        """What the busiest SM takes by the design's model, but for what a tile costs besides its steps."""
        tiles = rounds(config, *self.result[:2], sms, self.along)
        deep = self.rows if self.name == "Wgrad" else self.depth
        if isinstance(config, MatmulConfig):
            return tiles * -(-deep // BLOCK) * max(step_cycles(config, self.result[0]).values())
        assert isinstance(config, ArrayConfig)
        return tiles * -(-deep // STEP) * max(array_step_cycles(config).values())

    def make_operands(self, seed: int) -> tuple[Any, Any]:
        """Random ones. Matrices in FP8 lie as the kernel reads them, so that no copy is timed: transposed for Fprop."""
        keys = jax.random.split(jax.random.key(seed), 2)
        of_a, of_b = {"Fprop": ("x", "w"), "Dgrad": ("dy", "w"), "Wgrad": ("x", "dy")}[self.name]
        shapes = {"x": (self.all_rows, self.k), "dy": (self.all_rows, self.n), "w": (self.k, self.n)}
        arrays = []
        for key, name in zip(keys, (of_a, of_b), strict=True):
            stacked = () if self.groups is None or name != "w" else (self.groups,)
            arrays.append(jax.random.normal(key, (*stacked, *shapes[name]), BF16))
        return self._quantized(*arrays) if self.quantized else (arrays[0], arrays[1])

    def by_kernel(self, config: Any) -> Callable[[Any, Any], Array]:
        """The product of its operands by the kernel, cut as a `TileConfig` of its kind says, or by default."""
        sizes, dtype = self._sizes(), self.result[2]
        if self.groups is None:
            if self.name == "Wgrad":
                return lambda x, dy: block_scaled.block_scaled_matmul(x.T, dy, dtype, config=config)
            return lambda x, w: block_scaled.block_scaled_matmul(x, w.T, dtype, config=config)
        if self.name == "Wgrad":
            return lambda x, dy: grouped.rows_by_rows(x, dy, sizes, self.alignment, config=config)
        contract, transposed = 1 if self.name == "Fprop" else 2, self.quantized and self.name == "Fprop"

        def run(x, w):
            w = w.T if transposed else w
            return grouped.rows_by_matrices(x, w, sizes, self.alignment, dtype, contract, config=config)

        return run

    def portable(self, a: Any, b: Any) -> Array:
        """The same without the kernel."""
        if self.groups is None:
            a, b = (a.T, b) if self.name == "Wgrad" else (a, b.T)
            return block_scaled_matmul(a, b, out_dtype=self.result[2], implementation="dequantize")
        options: dict[str, Any] = {"alignment": self.alignment, "implementation": "blocked"}
        if self.name == "Wgrad":
            return grouped_matmul_dw(a, b, self._sizes(), **options)
        function = grouped_matmul if self.name == "Fprop" else grouped_matmul_dx
        b = b.T if self.quantized and self.name == "Fprop" else b
        return function(a, b, self._sizes(), out_dtype=self.result[2], **options)

    def _sizes(self) -> Array:
        return jnp.full(self.groups or 0, self.rows, jnp.int32)

    def _quantized(self, a: Array, b: Array) -> tuple[Quantized, Quantized]:
        how: Any = {"implementation": "reference"}
        if self.name == "Wgrad":
            return quantize(a, (BLOCK, 1), **how), quantize(b, (BLOCK, 1), **how)
        return quantize(a, (1, BLOCK), **how), quantize(b.mT if self.name == "Fprop" else b, (BLOCK, BLOCK), **how)


def all_products(rows: Sequence[int] = ROWS, weights: Sequence[tuple[int, int]] = WEIGHTS) -> list[Product]:
    """Fprop of linear layers, their Dgrad and Wgrad, and every grouped product, at DeepSeek-V3's sizes."""
    products = [Product("Fprop", m, n, k) for m in rows for n, k in weights]
    products += [Product(name, TOKENS, n, k) for name in ("Dgrad", "Wgrad") for n, k in weights]
    return products + grouped_products()


def grouped_products(
    groups: Sequence[tuple[int, int]] = GROUPS, weights: Sequence[tuple[int, int]] = EXPERTS
) -> list[Product]:
    """Those of routed experts, in FP8 and in bfloat16."""
    kinds = [(name, operands) for operands in (E4M3, BF16) for name in ("Fprop", "Dgrad", "Wgrad")]
    return [
        Product(name, rows, n, k, count, operands)
        for name, operands in kinds
        for count, rows in groups
        for n, k in weights
    ]
