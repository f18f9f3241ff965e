"""Rates as they were fixed before the first prediction, with which the calibration's first column is made.

They stay as they were: whoever changes one changes a prediction after its answer was known. Plans are made with those
of `efficiency.py`.
"""

from __future__ import annotations

import dataclasses

from deepseek_jax.planning.devices import B200, GB200, H100, H800, Device
from deepseek_jax.planning.efficiency import DEEPGEMM_H800, Efficiency, fit_products


def _attention_rate(operations: float, microseconds: float) -> float:
    """FLOP per second of causal attention, 4 sequences of 4096, 48 heads of 128: `operations` products of S²/2."""
    return operations * 4 * 48 * 4096**2 / 2 * 2 * 128 / (microseconds * 1e-6)


_RATE, _HALF = fit_products(DEEPGEMM_H800[:8])  # the rows of eight groups were not at hand
FIRST_HOPPER = Efficiency(
    products=_RATE / 1978.9e12,
    half_inputs=_HALF,
    weight_gradients=(878e12 + 1092e12) / 2 / 1978.9e12,
    attention_forward=_attention_rate(2, 1236.90) / 989.4e12,
    attention_backward=_attention_rate(5, 4643.46) / 989.4e12,
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
FIRST_BLACKWELL = dataclasses.replace(
    FIRST_HOPPER,
    attention_forward=1460 / 2250,
    attention_backward=1000 / 2250,
    node=643 / 720,
    sources={
        **FIRST_HOPPER.sources,
        "attention_*": "FlashMLA on a B200, BF16: 1460 and 1000 TFLOP/s",
        "node": "DeepEP V2 on 8 devices of SM100: 643 and 675 GB/s with 24 SMs",
        "all others": "taken over from Hopper: no kernel table of a B200 was at hand",
    },
)

_FIRST = {one.name: FIRST_HOPPER for one in (H800, H100)} | {one.name: FIRST_BLACKWELL for one in (B200, GB200)}


def with_first_rates(device: Device) -> Device:
    """One of the calibration's devices, H800, H100, B200 or GB200, with the rates that it had first."""
    return dataclasses.replace(device, efficiency=_FIRST[device.name])
