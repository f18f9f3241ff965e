"""Which dtype each part of training uses, and which linear layers run in FP8 (section 3.3)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from deepseek_jax.config import require

LinearKind = Literal["attention", "dense_ffn", "shared_experts", "routed_experts"]
"""The linear layers that may run in FP8. Embedding, head, router and MTP's projection never do, norms and the attention
core neither."""
LINEAR_KINDS: tuple[LinearKind, ...] = ("attention", "dense_ffn", "shared_experts", "routed_experts")

DispatchDtype = Literal["float32", "bfloat16", "float8"]


def _check_choice(name: str, value: object, choices: tuple) -> None:
    require(value in choices, f"{name} must be {', '.join(map(str, choices[:-1]))} or {choices[-1]}, not {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """How linear layers run in FP8. The defaults are DeepSeek-V3's; everything else is for comparison."""

    layers: tuple[LinearKind, ...] = LINEAR_KINDS
    """Which linear layers run in FP8."""
    weights: Literal["block", "tensor", "cast"] = "block"
    """A scale for each 128×128 block of a weight, one for each matrix, or none: a plain cast."""
    activations: Literal["tile", "tensor", "cast"] = "tile"
    """A scale for each token and 128 channels (128 tokens and a channel where the product is over tokens), one, or
    none."""
    gradients: Literal["tile", "block", "tensor", "cast"] = "tile"
    """The same for gradients of a layer's output; `block` is 128×128, with which training diverged (appendix B.2)."""
    gradient_format: Literal["e4m3", "e5m2"] = "e4m3"
    """E5M2 has more range and less precision."""
    power_of_two_scales: bool = False
    """Round all scales up to powers of two, as DeepSeek-V3.1 does; else those that the paper names alone."""
    promote: bool = True
    """Add partial products in float32 every 128 of the contraction. False: all of it in the tensor core's 14 bits,
    emulated, in layers that are not routed experts."""

    def __post_init__(self):
        for name in self.layers:
            _check_choice("precision.fp8.layers: each", name, LINEAR_KINDS)
        require(
            len(set(self.layers)) == len(self.layers), f"precision.fp8.layers names one twice: {','.join(self.layers)}"
        )
        _check_choice("precision.fp8.weights", self.weights, ("block", "tensor", "cast"))
        _check_choice("precision.fp8.activations", self.activations, ("tile", "tensor", "cast"))
        _check_choice("precision.fp8.gradients", self.gradients, ("tile", "block", "tensor", "cast"))
        _check_choice("precision.fp8.gradient_format", self.gradient_format, ("e4m3", "e5m2"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionPolicy:
    """Master weights and gradient accumulation are always float32; activations and matmuls are `compute`, but for the
    linear layers that `fp8` names.

    Norms, router and softmax are float32 whatever `compute` is. Adam's moments: `optimizer.moment_dtype`.
    """

    PRESETS: ClassVar[dict[str, PrecisionPolicy]]
    """Policies by name: `--set precision=v3_fp8`."""

    compute: Literal["float32", "bfloat16"] = "bfloat16"
    dispatch: DispatchDtype | None = None
    """dtype in which tokens travel to experts on other devices, and the gradients of their outputs; none: that of
    `compute`. With float8 they are E4M3 codes with a scale for 128 channels, and outputs and the gradients of tokens
    travel in `compute`; with another, all four in that."""
    fp8: Fp8Config | None = None
    """How linear layers run in FP8; none: they do not."""

    def __post_init__(self):
        _check_choice("precision.compute", self.compute, ("float32", "bfloat16"))
        _check_choice("precision.dispatch", self.dispatch, ("float32", "bfloat16", "float8", None))
        require(
            self.dispatch != "float8" or only_for("routed_experts", self.fp8) is not None,
            "precision.dispatch=float8 rounds what routed experts read, so they have to run in FP8: set precision.fp8 "
            "with routed_experts among its layers, or precision.dispatch=none",
        )
        if self.dispatch == "float8" and self.fp8 is not None:
            tiles = (self.fp8.activations, self.fp8.gradients, self.fp8.gradient_format)
            require(
                tiles == ("tile", "tile", "e4m3"),
                "precision.dispatch=float8 sends E4M3 in tiles of 1×128, and precision.fp8 with activations="
                f"{tiles[0]}, gradients={tiles[1]} and gradient_format={tiles[2]} would round what came once more than "
                "one device does; set precision.dispatch=none",
            )


def only_for(kind: LinearKind, fp8: Fp8Config | None) -> Fp8Config | None:
    """How linear layers of a kind run in FP8; None: they do not."""
    return fp8 if fp8 is not None and kind in fp8.layers else None


FLOAT32 = PrecisionPolicy(compute="float32")
BF16 = PrecisionPolicy()
V3_FP8 = PrecisionPolicy(dispatch="float8", fp8=Fp8Config())
PrecisionPolicy.PRESETS = {"float32": FLOAT32, "bf16": BF16, "v3_fp8": V3_FP8}
