"""From the parameters that training and checkpoints hold to a model that can be called."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.parameters import RouterBias, parameter_specs
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.mesh import mesh_of
from deepseek_jax.parallel.placement import KINDS, ParameterLayout, place
from deepseek_jax.tree import Tree, flatten, unflatten


def bind(config: ModelConfig, params: Tree, router_bias: Tree, *, dtype=None) -> Transformer:
    """The model with the weights of a one-stage training state.

    Args:
      config: the architecture that the weights belong to.
      params: `TrainState.params`: nested dict, stacked kinds `[1, slot, ...]`.
      router_bias: `TrainState.router_bias`.
      dtype: what the weights are cast to, except those kept in full precision (norms, router); None keeps theirs.

    Raises:
      ValueError: more than one pipeline stage, or weights of another architecture.
    """
    model = Transformer(config)
    merged = {}
    for kind, tree in ((nnx.Param, params), (RouterBias, router_bias)):
        specs = flatten(parameter_specs(model, kind))
        given = flatten(tree)
        if specs.keys() != given.keys():
            name = sorted(specs.keys() ^ given.keys())[0]
            raise ValueError(f"{name} is {'missing' if name in specs else 'no parameter of this architecture'}")
        for name, value in given.items():
            merged[name] = _bound(name, specs[name], value, dtype)
    return nnx.merge(nnx.graphdef(model), unflatten(merged))


def bind_canonical(config: ModelConfig, arrays: Mapping[str, jax.Array], *, dtype=None) -> Transformer:
    """The model with weights under their canonical names (`layers.3.attention.kv_a.weight`), on one device.

    Raises:
      ValueError: a name or a shape is not as the architecture has it.
    """

    def stacked(layout: ParameterLayout) -> Tree:
        placed = {}
        for name, struct in layout.canonical().items():
            if name not in arrays:
                raise ValueError(f"{name} is missing")
            if arrays[name].shape != struct.shape:
                raise ValueError(f"{name} has shape {arrays[name].shape}, the architecture says {struct.shape}")
            placed[name] = jax.device_put(arrays[name], struct.sharding)
        return layout.stack(placed)

    return bind(config, *map(stacked, _layouts(config)), dtype=dtype)


def create(config: ModelConfig, seed: int = 0, *, dtype=jnp.float32) -> Transformer:
    """The model with the initial weights that a training run of this seed starts from, on one device.

    They are drawn in float32, or in `dtype` where it is wider; `dtype` is what they are cast to, except those kept in
    full precision (norms, router).
    """
    drawn = jnp.promote_types(dtype, jnp.float32)
    return bind(config, *(layout.initial(seed, drawn) for layout in _layouts(config)), dtype=dtype)


def _layouts(config: ModelConfig) -> tuple[ParameterLayout, ParameterLayout]:
    """Of the parameters and of the router biases, one stage on the first device."""
    model, placement = Transformer(config), place(config)
    mesh = mesh_of(np.asarray(jax.devices()[:1]).reshape(1, 1, 1, 1))
    return (
        ParameterLayout(parameter_specs(model), placement, mesh),
        ParameterLayout(parameter_specs(model, RouterBias), placement, mesh),
    )


def _bound(name: str, spec, value: jax.Array, dtype) -> jax.Array:
    """A run-time array `[stage, slot, ...]` or `[...]` as the bound module holds it: `[slot, ...]` or `[...]`."""
    if name.split(".")[0] in KINDS:
        if value.shape[0] != 1:
            raise ValueError(f"{name} has {value.shape[0]} pipeline stages; bind weights that were restored onto one")
        value = value.reshape(value.shape[1:])
    if dtype is not None and not spec.full_precision:
        value = value.astype(dtype)
    return value
