"""Linear layers in FP8, as DeepSeek-V3 trains them (section 3.3): what each product reads, and what is kept between.

A linear layer is three products. Each reads two FP8 matrices, whose scales run along the contraction:

    y  = x  · w      Fprop   x in tiles of 1×128 (a token, 128 channels), w in blocks of 128×128
    dx = dy · wᵀ     Dgrad   dy in tiles of 1×128, the same w
    dw = xᵀ · dy     Wgrad   both in tiles of 128×1 (128 tokens, a channel)

so x and dy are quantised twice. dy is there in full when its turn comes, and both are made of that. x is not: what is
kept of the forward pass is its 1×128 tiles, and the 128×1 tiles are made of those. The weight is quantised once per
optimizer step, outside (`quantized_weights`); the layers take it beside the weight itself, whose values they do not
read: it is there to receive the gradient.

Three layers keep something else than their input:

- `attention_output`: attention and the output projection keep one array for both, attention's output, in E5M6.
- `swiglu_linear`: SwiGLU and the down projection keep the *input* of SwiGLU, in FP8, and make its output again.
- Routed experts read rows that travelled in FP8 and get gradients that did, so for these there is no original to be
  quantised a second time: their 128×1 tiles are made of the 1×128 ones. They do the same where nothing travels, so
  that one device computes what many do. With powers of two as scales, quantising what was quantised changes nothing.

Everything kept has the name that `model.block.SAVED_ACTIVATIONS` knows.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from deepseek_jax import ops
from deepseek_jax.precision import probe
from deepseek_jax.precision.policy import Fp8Config
from deepseek_jax.precision.products import Products
from pallas_kernels.implementation import accumulator
from pallas_kernels.quantize import (
    GRADIENT_AMAX,
    Quantized,
    quantize,
    quantize_both,
    quantize_e5m6,
    quantize_swiglu,
    requantize,
    swiglu_backward,
    swiglu_output,
)

ALIGNMENT = 128
"""Groups of rows start at multiples of this, so that no tile of 128×1 has rows of two experts."""


@dataclasses.dataclass(frozen=True)
class _Layer:
    """What is static of a layer."""

    config: Fp8Config
    products: Products
    matrix: tuple[int, ...]
    """Shape of the weight."""
    travelled_x: bool = False
    """x has powers of two as scales: it came from another device, or is attention's output."""
    travelled_dy: bool = False
    """The gradient comes from another device: powers of two, and nothing but its 1×128 tiles."""

    def input(self, x: Array) -> Quantized:
        """x in the tiles of Fprop."""
        tiles = _rounded(x, self.config.activations, (1, 128), power_of_two=self._powers(self.travelled_x))
        probe.report("x for Fprop", self.matrix, x, tiles)
        return tiles

    def retiled_input(self, x: Quantized | Array) -> Quantized:
        """x in the tiles of Wgrad, from those of Fprop or from more precise values."""
        tiles = _rounded(x, self.config.activations, (128, 1), power_of_two=self._powers(self.travelled_x))
        probe.report("x for Wgrad", self.matrix, x, tiles)
        return tiles

    def gradients(self, dy: Array) -> tuple[Quantized, Quantized]:
        """dy in the tiles of Dgrad and in those of Wgrad."""
        rows, columns = self._tiled_gradients(dy)
        probe.report("dy for Dgrad", self.matrix, dy, rows)
        probe.report("dy for Wgrad", self.matrix, dy, columns)
        return rows, columns

    def _tiled_gradients(self, dy: Array) -> tuple[Quantized, Quantized]:
        how: Any = {"power_of_two": self._powers(self.travelled_dy), "smallest_amax": GRADIENT_AMAX}
        if (self.config.gradients, self.config.gradient_format, self.travelled_dy) == ("tile", "e4m3", False):
            return quantize_both(dy, **how)
        how["dtype"] = jnp.float8_e4m3fn if self.config.gradient_format == "e4m3" else jnp.float8_e5m2
        if self.config.gradients == "block":
            blocks = quantize(dy, (128, 128), **how)
            return blocks, blocks
        rows = _rounded(dy, self.config.gradients, (1, 128), **how)
        return rows, _rounded(rows if self.travelled_dy else dy, self.config.gradients, (128, 1), **how)

    def swiglu(self, gate_up: Array, weights: Array | None) -> tuple[Quantized, Quantized]:
        """SwiGLU's output in the tiles of Fprop, and its input as it is kept."""
        output, kept = quantize_swiglu(gate_up, weights, power_of_two=self.config.power_of_two_scales)
        if self.config.activations != "tile":
            output = self.input(swiglu_output(gate_up, weights))
        else:
            probe.report("x for Fprop", self.matrix, lambda: swiglu_output(gate_up, weights), output)
        probe.report("SwiGLU's input, kept", self.matrix, gate_up, kept)
        return output, kept

    def swiglu_gradients(
        self, kept: Quantized, dhidden: Array, weights: Array | None
    ) -> tuple[Array, Array | None, Quantized]:
        """The gradients of SwiGLU's input and of the weights, and its output, made again, in the tiles of Wgrad."""
        found = swiglu_backward(kept, dhidden, weights, power_of_two=self.config.power_of_two_scales)

        def made_again() -> Array:
            return swiglu_output(kept.dequantize(accumulator(dhidden)), weights).astype(dhidden.dtype)

        output = found.hidden
        if self.config.activations != "tile":
            output = self.retiled_input(made_again())
        else:
            probe.report("x for Wgrad", self.matrix, made_again, output)
        return found.gate_up, found.weights, output

    def _powers(self, of_paper: bool) -> bool:
        return of_paper or self.config.power_of_two_scales


def _rounded(x: Quantized | Array, granularity: str, tile: tuple[int, int], **how: Any) -> Quantized:
    """x in tiles, or as the comparisons have it, with one scale or with none."""
    if granularity == "cast":
        return quantize(x.dequantize() if isinstance(x, Quantized) else x, None, scale=1.0, **how)
    chosen = None if granularity == "tensor" else tile
    return requantize(x, chosen, **how) if isinstance(x, Quantized) else quantize(x, chosen, **how)


def weight_tile(config: Fp8Config) -> tuple[int, int] | None:
    """What shares a scale in a weight."""
    return (128, 128) if config.weights == "block" else None


def quantize_weight(w: Array, config: Fp8Config) -> Quantized:
    """A weight `[..., K, N]` as the layers of this module read it, each matrix by itself."""
    return _rounded(w, config.weights, (128, 128), power_of_two=config.power_of_two_scales)


# --- a linear layer ---------------------------------------------------------------------------------------------------


def linear(x: Array, w: Array, quantized: Quantized, config: Fp8Config) -> Array:
    """`x @ w` for x `[..., K]` and w `[K, N]`, of which `quantized` is read: `[..., N]` of x's dtype."""
    layer = _Layer(config, Products(promote=config.promote), w.shape)
    return _linear(layer, x.reshape(-1, x.shape[-1]), w, quantized, None).reshape(*x.shape[:-1], w.shape[-1])


def routed_linear(rows: Array, w: Array, quantized: Quantized, group_sizes: Array, config: Fp8Config) -> Array:
    """Each group of rows `[M, K]` times its own matrix of `[E, K, N]`: `[M, N]` of the rows' dtype.

    Groups start at multiples of `ALIGNMENT`; rows that belong to none are zero.
    """
    layer = _Layer(config, Products(alignment=ALIGNMENT), w.shape, travelled_x=True)
    return _linear(layer, rows, w, quantized, group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(layer: _Layer, x, w, quantized, group_sizes):
    return _linear_forward(layer, x, w, quantized, group_sizes)[0]


def _linear_forward(layer: _Layer, x, w, quantized, group_sizes):
    tiles = layer.input(x)
    y = layer.products.forward(tiles, quantized, group_sizes, x.dtype)
    return y, (tiles, quantized, group_sizes, _Like(w.dtype))


def _linear_backward(layer: _Layer, kept, dy):
    tiles, quantized, group_sizes, like = kept
    rows, columns = layer.gradients(dy)
    dx = layer.products.input_gradient(rows, quantized, group_sizes, dy.dtype)
    dw = layer.products.weight_gradient(layer.retiled_input(tiles), columns, group_sizes, like.dtype)
    return dx, dw, None, None


_linear.defvjp(_linear_forward, _linear_backward)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Like:
    """The dtype that a gradient is to have."""

    dtype: Any


# --- SwiGLU and the down projection -----------------------------------------------------------------------------------


def swiglu_linear(gate_up: Array, w: Array, quantized: Quantized, config: Fp8Config) -> Array:
    """`swiglu(gate_up) @ w` for gate_up `[..., 2F]` and w `[F, N]`."""
    layer = _Layer(config, Products(promote=config.promote), w.shape)
    y = _swiglu_linear(layer, gate_up.reshape(-1, gate_up.shape[-1]), None, w, quantized, None)
    return y.reshape(*gate_up.shape[:-1], w.shape[-1])


def routed_swiglu_linear(
    gate_up: Array, weights: Array, w: Array, quantized: Quantized, group_sizes: Array, config: Fp8Config
) -> Array:
    """The same for rows `[M, 2F]` in groups, each row times its combine weight `[M]`; see `routed_linear`."""
    layer = _Layer(config, Products(alignment=ALIGNMENT), w.shape, travelled_dy=True)
    return _swiglu_linear(layer, gate_up, weights, w, quantized, group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu_linear(layer: _Layer, gate_up, weights, w, quantized, group_sizes):
    return _swiglu_forward(layer, gate_up, weights, w, quantized, group_sizes)[0]


def _swiglu_forward(layer: _Layer, gate_up, weights, w, quantized, group_sizes):
    output, kept = layer.swiglu(gate_up, weights)
    y = layer.products.forward(output, quantized, group_sizes, gate_up.dtype)
    kept = ops.named(kept, "gate_up")
    return y, (kept, weights, quantized, group_sizes, _Like(gate_up.dtype), _Like(w.dtype))


def _swiglu_backward(layer: _Layer, kept, dy):
    gate_up, weights, quantized, group_sizes, like, like_w = kept
    rows, columns = layer.gradients(dy)
    dhidden = layer.products.input_gradient(rows, quantized, group_sizes, like.dtype)
    dgate_up, dweights, hidden = layer.swiglu_gradients(gate_up, dhidden, weights)
    dw = layer.products.weight_gradient(hidden, columns, group_sizes, like_w.dtype)
    if dweights is not None:
        dweights = dweights.astype(weights.dtype)
    return dgate_up, dweights, dw, None, None


_swiglu_linear.defvjp(_swiglu_forward, _swiglu_backward)


# --- attention and the output projection ------------------------------------------------------------------------------


def attention_output(
    q: Array,
    k: Array,
    v: Array,
    w: Array,
    quantized: Quantized,
    config: Fp8Config,
    *,
    scale: float,
    segment_ids: Array | None = None,
) -> Array:
    """`attention(q, k, v) @ w` with heads joined, see `ops.attention`: v `[B, S, H, V]`, w `[H * V, D]` -> `[B, S, D]`.

    For the backward pass of both, attention's output is kept in E5M6 (12 bits), with powers of two as scales.
    """
    layer = _Layer(config, Products(promote=config.promote), w.shape, travelled_x=True)
    return _attention_output(layer, float(scale), q, k, v, segment_ids, w, quantized)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention_output(layer: _Layer, scale: float, q, k, v, segment_ids, w, quantized):
    return _attention_forward(layer, scale, q, k, v, segment_ids, w, quantized)[0]


def _attention_forward(layer: _Layer, scale: float, q, k, v, segment_ids, w, quantized):
    out, saved = ops.attention_forward(q, k, v, scale=scale, segment_ids=segment_ids)
    joined = out.reshape(-1, w.shape[0])
    y = layer.products.forward(layer.input(joined), quantized, None, out.dtype)
    kept = quantize_e5m6(joined)
    probe.report("attention's output, kept", layer.matrix, joined, kept)
    kept = ops.named(kept, "attention_out")
    return y.reshape(*out.shape[:2], -1), (saved, kept, quantized, _Like(v.dtype), _Like(w.dtype))


def _attention_backward(layer: _Layer, scale: float, kept, dy):
    saved, out, quantized, like, like_w = kept
    out = out.dequantize(like.dtype)
    dy = dy.reshape(-1, dy.shape[-1])
    rows, columns = layer.gradients(dy)
    dout = layer.products.input_gradient(rows, quantized, None, like.dtype)
    dw = layer.products.weight_gradient(layer.retiled_input(out), columns, None, like_w.dtype)
    dq, dk, dv = ops.attention_backward(saved, out, dout, scale=scale)
    return dq, dk, dv, None, dw, None


_attention_output.defvjp(_attention_forward, _attention_backward)
