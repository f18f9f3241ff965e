"""SwiGLU with its quantisation: what a down projection in FP8 reads, and the backward pass from what was kept.

DeepSeek-V3 keeps the input of SwiGLU in FP8 and makes its output again (section 3.3.3). T tokens (rows), F channels:

    hidden = silu(gate) · up [· weight]      gate_up [T, 2F], the gate first; weights [T] of routed rows

    forward    gate_up ──► hidden in 1×128, for Fprop of the down projection; gate_up in 1×128, which is kept
    backward   kept, dhidden ──► dgate_up, dweights; hidden in 128×1, for Wgrad of the down projection

All in float32, and the hidden values rounded once, to the arrays' dtype, before they are quantised.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.implementation import accumulator, choose
from pallas_kernels.quantize import mosaic_gpu_swiglu
from pallas_kernels.quantize.api import Quantized, quantize


class SwigluGradients(NamedTuple):
    """What the backward pass of SwiGLU gives."""

    gate_up: Array
    """`[T, 2F]` of the dtype of the gradient that came."""
    weights: Array | None
    """`[T]`, float32 or wider; None if there were none."""
    hidden: Quantized
    """SwiGLU's output made again, `[T, F]`, in tiles of 128×1."""


def quantize_swiglu(
    gate_up: Array,
    weights: Array | None = None,
    *,
    power_of_two: bool = False,
    smallest_amax: float = 1e-4,
    implementation: str | None = None,
) -> tuple[Quantized, Quantized]:
    """SwiGLU's output `[T, F]` and its input `[T, 2F]`, both in E4M3 in tiles of 1×128.

    Not to be differentiated: `swiglu_backward` is the backward pass.

    Args:
      gate_up: `[T, 2F]` of any float dtype, the gate in its first half.
      weights: `[T]`, which multiply the output's rows; None for no weights.
      power_of_two: As for `quantize`.
      smallest_amax: As for `quantize`.
      implementation: "reference", "mosaic_gpu" (the kernel for Hopper, which reads gate_up once: bfloat16 or float32, F
        in multiples of 128), or None for the best that is supported here, see `pallas_kernels.implementation`.

    Raises:
      ValueError: if shapes or dtypes make no sense, or the implementation is unknown or not supported here.
    """
    rows = gate_up.shape[0] if gate_up.ndim == 2 else 0
    if gate_up.ndim != 2 or gate_up.shape[1] % 2 or not jnp.issubdtype(gate_up.dtype, jnp.floating):
        raise ValueError(f"quantize_swiglu needs gate_up [T, 2F] of floats, not {gate_up.shape} of {gate_up.dtype}")
    _check_weights("quantize_swiglu", weights, rows)
    obstacle = mosaic_gpu_swiglu.supported(gate_up, smallest_amax)
    name = choose("quantize_swiglu", implementation, {"mosaic_gpu": obstacle, "reference": None})
    if name == "mosaic_gpu":
        codes, scales, kept_codes, kept_scales = mosaic_gpu_swiglu.quantize_swiglu(
            gate_up, weights, power_of_two, float(smallest_amax)
        )
        return Quantized(codes, scales, (1, 128)), Quantized(kept_codes, kept_scales, (1, 128))
    values = swiglu_output(gate_up, weights)
    output, kept = (
        quantize(x, (1, 128), power_of_two=power_of_two, smallest_amax=smallest_amax, implementation=implementation)
        for x in (values, gate_up)
    )
    return output, kept


def swiglu_backward(
    kept: Quantized,
    dhidden: Array,
    weights: Array | None = None,
    *,
    power_of_two: bool = False,
    smallest_amax: float = 1e-4,
    implementation: str | None = None,
) -> SwigluGradients:
    """The gradients of SwiGLU's input and of the weights, and its output in tiles of 128×1, from the kept input.

    Args:
      kept: SwiGLU's input `[T, 2F]` as `quantize_swiglu` gives it, in tiles of 1×128.
      dhidden: The gradient of its output, `[T, F]` of any float dtype: Dgrad of the down projection.
      weights: `[T]`, as in the forward pass.
      power_of_two: As for `quantize`, of the output.
      smallest_amax: As for `quantize`, of the output.
      implementation: As for `quantize_swiglu`. The kernel writes the output's codes transposed, as Wgrad reads them:
        within `jax.jit`, the `.T` of the result costs nothing.

    Raises:
      ValueError: as `quantize_swiglu`.
    """
    fits = len(kept.shape) == dhidden.ndim == 2 and kept.shape == (dhidden.shape[0], 2 * dhidden.shape[1])
    if not fits or kept.tile != (1, 128) or not jnp.issubdtype(dhidden.dtype, jnp.floating):
        raise ValueError(
            "swiglu_backward needs kept [T, 2F] in tiles of 1×128 and dhidden [T, F] of floats, not "
            f"{kept.shape} in {kept.tile} and {dhidden.shape} of {dhidden.dtype}"
        )
    _check_weights("swiglu_backward", weights, dhidden.shape[0])
    obstacle = mosaic_gpu_swiglu.supported(dhidden, smallest_amax, kept.codes)
    name = choose("swiglu_backward", implementation, {"mosaic_gpu": obstacle, "reference": None})
    if name == "mosaic_gpu":
        dgate_up, dweights, transposed, scales = mosaic_gpu_swiglu.swiglu_backward(
            kept.codes, kept.scales, dhidden, weights, power_of_two, float(smallest_amax)
        )
        return SwigluGradients(dgate_up, dweights, Quantized(transposed.T, scales, (128, 1)))
    wide = accumulator(dhidden)
    output, pull = jax.vjp(_hidden, kept.dequantize(wide), None if weights is None else weights.astype(wide))
    dgate_up, dweights = pull(dhidden.astype(wide))
    how: Any = {"power_of_two": power_of_two, "smallest_amax": smallest_amax, "implementation": implementation}
    columns = quantize(output.astype(dhidden.dtype), (128, 1), **how)
    return SwigluGradients(dgate_up.astype(dhidden.dtype), dweights, columns)


def swiglu_output(gate_up: Array, weights: Array | None = None) -> Array:
    """What `quantize_swiglu` quantises, `[T, F]` of gate_up's dtype: computed in float32 or wider, and rounded once."""
    return _hidden(gate_up.astype(accumulator(gate_up)), weights).astype(gate_up.dtype)


def _hidden(gate_up: Array, weights: Array | None) -> Array:
    """`silu(gate) · up`, `[T, F]` of gate_up's dtype, each row times its weight if there are any."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    values = jax.nn.silu(gate) * up
    return values if weights is None else values * weights.astype(values.dtype)[:, None]


def _check_weights(op, weights, rows):
    if weights is not None and (weights.shape != (rows,) or not jnp.issubdtype(weights.dtype, jnp.floating)):
        raise ValueError(f"{op} needs weights [{rows}] of a float dtype, not {weights.shape} of {weights.dtype}")
