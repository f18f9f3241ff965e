"""What `config.json` of a Hugging Face folder says about FP8."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from deepseek_jax.interop.errors import InteropError
from deepseek_jax.interop.fields import Fields, render


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How the FP8 weights of a folder are scaled: one scale per `block` of `[out, in]`."""

    block: tuple[int, int] = (128, 128)
    scale_format: Literal["float32", "ue8m0"] = "float32"
    """`ue8m0`: every scale is a power of two (V3.1)."""


def read_quantization(config: Mapping[str, Any], *, source: str = "config.json") -> Quantization | None:
    """How the folder's weights are quantized; None where they are not.

    Raises:
      InteropError: a method other than FP8 e4m3 with a scale per block, or a field of the wrong type.
    """
    fields = Fields(config, source).section("quantization_config")
    if fields is None:
        return None
    if fields.get("quant_method", (str,), "a string") != "fp8":
        raise fields.unsupported("quant_method", "fp8")
    fields.choice("fmt", ("e4m3",))
    fields.choice("activation_scheme", ("dynamic",))
    block = fields.get("weight_block_size", (list, tuple), "two block sizes, such as [128, 128]")
    if len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise fields.error("weight_block_size", f"must be two positive integers, not {render(block)}")
    # transformers writes "float" for what DeepSeek's files leave out.
    if fields.values.get("scale_fmt") is None or fields.choice("scale_fmt", ("float", "ue8m0")) == "float":
        return Quantization((block[0], block[1]))
    return Quantization((block[0], block[1]), "ue8m0")


def write_quantization(config: Mapping[str, Any], quantization: Quantization | None) -> dict[str, Any]:
    """A copy of a `config.json` that says how the weights are quantized, or nothing of it where they are not.

    What it says already stays as it is, in its spelling and with its other fields, where that is so.
    """
    result = {name: value for name, value in config.items() if name != "quantization_config"}
    if quantization is not None:
        if _says(config, quantization):
            return dict(config)
        result["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": list(quantization.block),
        }
        if quantization.scale_format == "ue8m0":
            result["quantization_config"]["scale_fmt"] = "ue8m0"
    return result


def _says(config: Mapping[str, Any], quantization: Quantization) -> bool:
    try:
        return read_quantization(config) == quantization
    except InteropError:
        return False
