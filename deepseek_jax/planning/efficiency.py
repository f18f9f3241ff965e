"""What of a device's peaks is reached: from kernel tables and microbenchmarks, never from what a predicted run took.

This is the second set of rates, with which plans are made. The first, which was fixed before anything was predicted, is
in `first_rates.py`; how this one was chosen when the first had missed is said in docs/planner.md.

A product's rate follows its contraction K: a kernel's start and end take as long as k more of it would, so it runs at
K / (K + k) of the rate of a long one. Both numbers are fitted to a published table (`fit_products`). The table's own
rows come out within a tenth of it, but for narrow results, which do not fill the device, and the largest, which slow it
down.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

Pass = Literal["F", "B", "W"]
"""Forward, input gradients with what is recomputed for them, weight gradients."""


class ProductRow(NamedTuple):
    """A measured product of `rows` × K by K × N, in each of `groups` groups."""

    rows: int
    outputs: int
    inputs: int
    rate: float
    """FLOP per second."""
    groups: int = 1
    speed_up: float = 1.0
    """Over the kernel that it replaced, as published, with one decimal."""


DEEPGEMM_H800 = (
    ProductRow(4096, 2112, 7168, 1058e12, speed_up=1.1),
    ProductRow(4096, 24576, 1536, 990e12),
    ProductRow(4096, 32768, 512, 590e12),
    ProductRow(4096, 7168, 16384, 1358e12, speed_up=1.2),
    ProductRow(4096, 4096, 7168, 1304e12, speed_up=1.1),
    ProductRow(4096, 7168, 2048, 1025e12, speed_up=1.1),
    ProductRow(8192, 4096, 7168, 1297e12, groups=4, speed_up=1.2),
    ProductRow(8192, 7168, 2048, 1099e12, groups=4, speed_up=1.2),
    ProductRow(4096, 4096, 7168, 1288e12, groups=8, speed_up=1.2),
    ProductRow(4096, 7168, 2048, 1093e12, groups=8, speed_up=1.1),
)
"""DeepGEMM's first published table of FP8 products with tiles, on an H800 (github.com/deepseek-ai/DeepGEMM, README of
February 2025)."""
CUTLASS_H800 = tuple(row._replace(rate=row.rate / row.speed_up) for row in DEEPGEMM_H800)
"""The same products by what DeepSeek had before, kernels of its own with CUTLASS 3.6."""

_MXFP8_OVER_FP8 = 2538 / 2765
"""MXFP8 over plain FP8 at 4096 in each dimension, on a B200 (the sources of `MXFP8_B200`)."""
MXFP8_B200 = (
    ProductRow(4096, 4096, 512, 1172e12 * _MXFP8_OVER_FP8),
    ProductRow(4096, 4096, 1024, 1895e12 * _MXFP8_OVER_FP8),
    ProductRow(4096, 4096, 2048, 2485e12 * _MXFP8_OVER_FP8),
    ProductRow(4096, 4096, 4096, 2538e12),
    ProductRow(8192, 8192, 8192, 2692e12),
    ProductRow(16384, 16384, 16384, 2571e12),
)
"""cuBLAS on a B200. MXFP8 from 4096 on: github.com/danielvegamyhre/gemm, 2026. Below, plain FP8 by contraction from
XLA's table of sm_100 (matmul_interpolator_data.h, clocks unknown), scaled to where both have a row."""


def fit_products(table: Iterable[ProductRow]) -> tuple[float, float]:
    """(rate of a long product, K at which half of it is reached), by least squares of the time per FLOP over 1 / K."""
    points = [(1 / row.inputs, 1 / row.rate) for row in table]
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    start = mean_y - slope * mean_x
    return 1 / start, slope / start


@dataclasses.dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares of peaks that are reached. The source of each is in `sources`."""

    products: float
    """Of the peak of any dtype: a long product."""
    half_inputs: float
    """K at which half of that is reached, in FP8; in a dtype with half the peak it is half of it."""
    weight_gradients: float
    """Of the peak: weight gradients, which add to float32 sums."""
    attention_forward: float
    """Of BF16's peak, causal, forward."""
    attention_backward: float
    """The same of the backward pass with its recomputation of scores."""
    memory: float
    """Of the memory's bandwidth: elementwise work."""
    node: float
    """Of the node's links: dispatch and combine."""
    network: float
    """Of the network's: dispatch and combine between nodes, each node that a token goes to counted, its own too."""
    collectives: float
    """Of either: gathers and sums of whole weights."""
    exchange_units: float
    """The share of a device's compute units that exchanges take from what runs beside them."""
    launch_seconds: float = 0.0
    """From one operation's end to the next one's start."""
    loops_copy: bool = False
    """Whether a loop over layers copies what a layer keeps for its backward pass, and its weights, into and out of
    arrays of all layers, as on XLA's CPU backend. On a GPU kernels read and write them there."""
    measured: Mapping[tuple[str, Pass], float] = dataclasses.field(default_factory=dict, hash=False)
    """Seconds of operations that were measured in the shapes of one job, by name and pass: for plans of that job, in
    place of what rates give."""
    sources: Mapping[str, str] = dataclasses.field(hash=False)

    def product_rate(self, peak: float, fp8_peak: float, inputs: int) -> float:
        """FLOP per second of a product over a contraction of so many, in a dtype with this peak."""
        half = self.half_inputs * peak / fp8_peak
        return self.products * peak * inputs / (inputs + half)


def _share(table: Iterable[ProductRow], peak: float) -> tuple[float, float]:
    """`products` and `half_inputs` of a table in a dtype with this peak."""
    rate, half = fit_products(table)
    return rate / peak, half


_HOPPER_PRODUCTS, _BLACKWELL_PRODUCTS = _share(CUTLASS_H800, 1978.9e12), _share(MXFP8_B200, 4500e12)

HOPPER = Efficiency(
    products=_HOPPER_PRODUCTS[0],
    half_inputs=_HOPPER_PRODUCTS[1],
    weight_gradients=(878e12 + 1092e12) / 2 / 1.2 / 1978.9e12,
    attention_forward=542.3 / 989.4,
    attention_backward=443.6 / 989.4,
    memory=2697 / 3352,
    node=153 / 160,
    network=50 / 50,
    collectives=40 / 50,
    exchange_units=20 / 132,
    launch_seconds=2.1e-6,
    sources={
        "products, half_inputs": "DeepSeek's CUTLASS 3.6 on an H800, FP8: DeepGEMM's first table over its speed-ups; "
        "taken over for BF16 as shares of its peak",
        "weight_gradients": "the same: the middle of DeepGEMM's pull request 95, 878 to 1092 TFLOP/s, over its 1.2; "
        "also for BF16",
        "attention_*": "cuDNN 9.1 (2024) on Hopper, BF16, causal, 4 × 16 heads of 128 × 4096: 542.3 and 443.6 TFLOP/s "
        "(github.com/NVIDIA/cudnn-frontend, benchmark_results.csv); MLA's heads of 192 and 128 are taken to be as fast",
        "memory": "quantising in tiles of 1 × 128 on an H100, 32768 × 4096: 2697 of 3352 GB/s (github.com/pytorch/ao, "
        "benchmarks/prototype/blockwise_fp8_training)",
        "node": "DeepEP V1 on H800s, 8 devices: 153 of 160 GB/s",
        "network": "DeepEP V1 on H800s, 64 devices: 51 and 50 GB/s, 24 SMs",
        "collectives": "NCCL's reduce-scatter on 16 nodes of 8 H100s: 320 GB/s of a node, one user's round figure "
        "(github.com/NVIDIA/nccl, issue 1229)",
        "exchange_units": "DeepSeek-V3 tech report, section 3.2.2: 20 of 132 SMs",
        "launch_seconds": "2.1 µs of a kernel on a stream of an H100, without a graph (Hazy Research, May 2025)",
    },
)
BLACKWELL = dataclasses.replace(
    HOPPER,
    products=_BLACKWELL_PRODUCTS[0],
    half_inputs=_BLACKWELL_PRODUCTS[1],
    weight_gradients=1595 / 4500,
    attention_forward=1369 / 2500,
    attention_backward=1066 / 2500,
    memory=5.21 / 7.7,
    node=(479 + 448) / 2 / 720,
    sources={
        **HOPPER.sources,
        "products, half_inputs": "cuBLAS on a B200, MXFP8; taken over for BF16 as shares of its peak",
        "weight_gradients": "grouped MXFP8 of DeepSeek-V3's experts on a B200, 2412 µs: 1595 TFLOP/s "
        "(github.com/pytorch/ao, prototype/moe_training); also for BF16 and for dense layers",
        "attention_*": "cuDNN 9.27 on a GB200, BF16, causal, 128 heads of 192 and 128 × 4096: 1369 and 1066 TFLOP/s "
        "(github.com/NVIDIA/cudnn-frontend, attention_training/results/dsv3)",
        "memory": "quantising to MXFP8 both ways on a B200, 8192 × 8192: 52.34 µs, 5.21 of 7.7 TB/s "
        "(Transformer Engine's, github.com/ROCm/TransformerEngine, pull request 598)",
        "node": "HybridEP on 36 devices of a GB200 NVL72, through its API, BF16: 479 and 448 of 720 GB/s "
        "(github.com/deepseek-ai/DeepEP, README_Hybrid-EP.md)",
        "network": "taken over from Hopper",
        "collectives": "taken over from Hopper",
        "exchange_units": "taken over from Hopper",
        "launch_seconds": "taken over from Hopper",
    },
)
CPU = Efficiency(
    products=0.9,
    half_inputs=32,
    weight_gradients=0.5,
    attention_forward=0.5,
    attention_backward=0.5,
    memory=1.0,
    node=1.0,
    network=1.0,
    collectives=1.0,
    exchange_units=0.0,
    loops_copy=True,
    sources={"all": "guesses: `tools.plan --measure` measures them"},
)
