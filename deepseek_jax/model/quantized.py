"""Weights in FP8 beside the weights: declared with the layer, made once per optimizer step, saved nowhere."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.model.parameters import abstract_values
from deepseek_jax.precision.fp8 import quantize_weight, weight_tile
from deepseek_jax.precision.policy import Fp8Config
from deepseek_jax.tree import Tree, flatten, unflatten
from pallas_kernels.quantize import Quantized

_CODES, _SCALES = "_codes", "_scales"


class QuantizedWeight(nnx.Variable):
    """The codes or the scales of a parameter of the same module: `weight_codes` and `weight_scales` are of `weight`."""


def declare_quantized(module: nnx.Module, name: str, config: Fp8Config) -> None:
    """Gives a module room for the quantised copy of its parameter `name`, `[..., K, N]`."""
    weight = getattr(module, name).get_value()
    copy = jax.eval_shape(functools.partial(quantize_weight, config=config), weight)
    setattr(module, name + _CODES, QuantizedWeight(copy.codes))
    setattr(module, name + _SCALES, QuantizedWeight(copy.scales))


def quantized(module: nnx.Module, name: str, config: Fp8Config) -> Quantized:
    """The quantised copy of a module's parameter."""
    codes, scales = (getattr(module, name + part)[...] for part in (_CODES, _SCALES))
    return Quantized(codes, scales, weight_tile(config))


def quantized_names(module: nnx.Module) -> list[str]:
    """The parameters of which a module declares a quantised copy, by their dotted names."""
    names = flatten(abstract_values(module, QuantizedWeight))
    return [name.removesuffix(_CODES) for name in names if name.endswith(_CODES)]


def quantize_weights(module: nnx.Module, params: Tree, config: Fp8Config) -> tuple[Tree, Tree]:
    """The quantised copies that a module declares, and its parameters with a `ShapeDtypeStruct` in the place of those
    that have one: layers do not read these, and give them gradients in float32 or wider.
    """
    arrays: dict[str, Any] = flatten(params)
    copies: dict[str, jax.Array] = {}
    for name in quantized_names(module):
        copy = quantize_weight(arrays[name], config)
        copies |= {name + _CODES: copy.codes, name + _SCALES: copy.scales}
        arrays[name] = jax.ShapeDtypeStruct(arrays[name].shape, jnp.promote_types(arrays[name].dtype, jnp.float32))
    return unflatten(copies), unflatten(arrays)
