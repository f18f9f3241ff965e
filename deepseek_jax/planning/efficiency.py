"""What of a device's peaks is reached: from kernel tables and microbenchmarks, never from the run that is predicted.

A product's rate follows its contraction K: a kernel's start and end take as long as k more of it would, so it runs at
K / (K + k) of the rate of a long one. Both numbers are fitted to a published table (`fit_products`), and the table's
own rows come out within a few percent of it, but for narrow results, which do not fill the device.
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


DEEPGEMM_H800 = (
    ProductRow(4096, 2112, 7168, 1058e12),
    ProductRow(4096, 24576, 1536, 990e12),
    ProductRow(4096, 32768, 512, 590e12),
    ProductRow(4096, 7168, 16384, 1358e12),
    ProductRow(4096, 4096, 7168, 1304e12),
    ProductRow(4096, 7168, 2048, 1025e12),
    ProductRow(8192, 4096, 7168, 1297e12, groups=4),
    ProductRow(8192, 7168, 2048, 1099e12, groups=4),
)
"""DeepGEMM's first published table of FP8 products with tiles, on an H800 (github.com/deepseek-ai/DeepGEMM, 2025): the
kernels nearest in time to DeepSeek's run. Later ones reach 1550."""


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


_RATE, _HALF = fit_products(DEEPGEMM_H800)
_FP8_PEAK = 1978.9e12
_BF16_PEAK = 989.4e12


def _attention_rate(operations: float, microseconds: float) -> float:
    """FLOP per second of causal attention, 4 sequences of 4096, 48 heads of 128: `operations` products of S²/2."""
    return operations * 4 * 48 * 4096**2 / 2 * 2 * 128 / (microseconds * 1e-6)


HOPPER = Efficiency(
    products=_RATE / _FP8_PEAK,
    half_inputs=_HALF,
    weight_gradients=(878e12 + 1092e12) / 2 / _FP8_PEAK,
    attention_forward=_attention_rate(2, 1236.90) / _BF16_PEAK,
    attention_backward=_attention_rate(5, 4643.46) / _BF16_PEAK,
    memory=3000 / 3350,
    node=153 / 160,
    network=50 / 50,
    collectives=43 / 50,
    exchange_units=20 / 132,
    sources={
        "products, half_inputs": "DeepGEMM's first table on an H800, FP8; taken over for BF16 as shares of its peak",
        "weight_gradients": "DeepGEMM's pull request 95 on an H800: 878 to 1092 TFLOP/s, the middle; also for BF16",
        "attention_*": "FlashAttention-3 on an H100, BF16, causal, 4 × 48 heads of 128 × 4096: 1237 and 4643 µs "
        "(github.com/meta-pytorch/tritonbench, pull request 1267); MLA's heads of 192 and 128 are taken to be as fast",
        "memory": "FlashMLA's dense decoding on an H800: 3000 of 3350 GB/s",
        "node": "DeepEP V1 on H800s, 8 devices: 153 of 160 GB/s",
        "network": "DeepEP V1 on H800s, 64 devices: 51 and 50 GB/s, 24 SMs",
        "collectives": "the least of DeepEP V1's figures between nodes, 43 of 50 GB/s; no table of plain collectives",
        "exchange_units": "DeepSeek-V3 tech report, section 3.2.2: 20 of 132 SMs",
    },
)
BLACKWELL = dataclasses.replace(
    HOPPER,
    attention_forward=1460 / 2250,
    attention_backward=1000 / 2250,
    node=643 / 720,
    sources={
        **HOPPER.sources,
        "products, half_inputs": "taken over from Hopper: no kernel table of a B200 at hand",
        "weight_gradients": "taken over from Hopper",
        "attention_*": "FlashMLA on a B200, BF16: 1460 and 1000 TFLOP/s",
        "memory": "taken over from Hopper",
        "node": "DeepEP V2 on 8 devices of SM100: 643 and 675 GB/s with 24 SMs",
        "network": "taken over from Hopper",
        "exchange_units": "taken over from Hopper",
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
