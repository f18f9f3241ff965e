from pallas_kernels.quantize.api import (
    GRADIENT_AMAX,
    Quantized,
    quantize,
    quantize_both,
    quantize_weight,
    requantize,
)
from pallas_kernels.quantize.e5m6 import PackedE5M6, pack_e5m6, quantize_e5m6, unpack_e5m6
from pallas_kernels.quantize.swiglu import SwigluGradients, quantize_swiglu, swiglu_backward, swiglu_output

__all__ = [
    "GRADIENT_AMAX",
    "PackedE5M6",
    "Quantized",
    "SwigluGradients",
    "pack_e5m6",
    "quantize",
    "quantize_both",
    "quantize_e5m6",
    "quantize_swiglu",
    "quantize_weight",
    "requantize",
    "swiglu_backward",
    "swiglu_output",
    "unpack_e5m6",
]
