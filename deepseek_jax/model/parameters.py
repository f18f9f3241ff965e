"""How a parameter is declared: once, with everything that others derive from it.

Modules are built abstract: a parameter's value is a `jax.ShapeDtypeStruct`, so the 671B model is constructed in
milliseconds on a laptop, and shapes, shardings, initial values and the weight-decay mask all come from one
declaration. `nnx.merge(graphdef, values)` binds a module to real arrays inside a jitted function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.tree import Tree, map_leaves


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
    """The declaration of one parameter of one layer, before layers are stacked.

    `axes` names the logical axis of each dimension (None: never sharded); `initializer` is "normal" (N(0, init_std)),
    "ones" or "zeros"; `full_precision` parameters are never cast to the compute dtype (norms, router).
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    initializer: str = "normal"
    init_std: float = 0.006
    full_precision: bool = False

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"a parameter of shape {self.shape} needs one logical axis per dimension, not {self.axes}")

    @property
    def decays(self) -> bool:
        """Weight decay applies to matrices only, not to norm scales."""
        return len(self.shape) >= 2

    def initial(self, key: jax.Array, dtype=jnp.float32) -> jax.Array:
        """The initial value, drawn from the parameter's own key and global shape."""
        match self.initializer:
            case "normal":
                return self.init_std * jax.random.normal(key, self.shape, dtype)
            case "ones":
                return jnp.ones(self.shape, dtype)
            case "zeros":
                return jnp.zeros(self.shape, dtype)
        raise ValueError(f"unknown initializer {self.initializer!r}")


class RouterBias(nnx.Variable):
    """The per-expert selection bias: float32 state that no gradient and no optimizer touches (section 2.1.2)."""


def parameter(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    kind: type[nnx.Variable] = nnx.Param,
    **spec: Any,
) -> nnx.Variable:
    """Declares a float32 parameter of the given shape and logical axes; see `ParameterSpec` for the rest."""
    return kind(jax.ShapeDtypeStruct(shape, jnp.float32), spec=ParameterSpec(shape, axes, **spec))


def stack(module: nnx.Module, layers: int) -> nnx.Module:
    """The same module with every parameter stacked `layers` times along a new leading dimension, for `lax.scan`."""

    def add_layers(variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_value()
        return variable.replace(jax.ShapeDtypeStruct((layers, *value.shape), value.dtype))

    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, jax.tree.map(add_layers, state, is_leaf=lambda x: isinstance(x, nnx.Variable)))


def parameter_specs(module: nnx.Module, kind: type[nnx.Variable] = nnx.Param) -> Tree:
    """The declarations of a module's parameters of one kind, as a nested dict."""
    return map_leaves(lambda variable: variable.get_metadata()["spec"], _variables(module, kind))


def abstract_values(module: nnx.Module, kind: type[nnx.Variable] = nnx.Param) -> Tree:
    """The shapes and dtypes of a module's parameters of one kind, as a nested dict of `ShapeDtypeStruct`."""
    return map_leaves(lambda variable: variable.get_value(), _variables(module, kind))


def _variables(module: nnx.Module, kind: type[nnx.Variable]) -> Tree:
    return _as_dict(nnx.state(module, kind))


def _as_dict(state: Mapping) -> dict:
    return {str(k): _as_dict(v) if isinstance(v, Mapping) else v for k, v in state.items()}
