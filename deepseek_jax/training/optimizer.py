"""AdamW as the paper has it (section 4.2), as an optax transformation whose learning rate the step applies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.config import require
from deepseek_jax.tree import Tree, map_leaves


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW's constants; epsilon is not stated in the paper.

    Another optimizer is a frozen dataclass derived from this one with a `make` of its own.
    """

    peak_lr: float = 2.2e-4
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Decays matrices only: norm scales keep their value."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype in which both moments are stored; DeepSeek-V3 keeps them in bfloat16 (section 3.3.1)."""

    def __post_init__(self):
        require(self.peak_lr > 0, f"optimizer.peak_lr must be positive, not {self.peak_lr}")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name} must lie in [0, 1), not {getattr(self, name)}")
        require(self.epsilon > 0, f"optimizer.epsilon must be positive, not {self.epsilon}")
        require(self.weight_decay >= 0, f"optimizer.weight_decay cannot be negative: {self.weight_decay}")
        require(self.clip_norm > 0, f"optimizer.clip_norm must be positive, not {self.clip_norm}")
        require(
            self.moment_dtype in ("float32", "bfloat16"),
            f"optimizer.moment_dtype must be float32 or bfloat16, not {self.moment_dtype!r}",
        )

    def make(self, specs: Tree) -> optax.GradientTransformation:
        """The transformation of gradients, without learning rate and clipping, which the step applies.

        `specs` are the parameters' declarations. Its state may hold moments that are shaped like the parameters, and
        arrays besides, such as a count; checkpoints take no moments of other shapes, as Adafactor factors them.
        """
        return adamw(self, specs)


class AdamState(NamedTuple):
    """Number of updates, and the two moments, each shaped like its parameter."""

    count: jax.Array  # type: ignore[assignment]  # the name optax gives it; it hides tuple.count
    mu: Tree
    nu: Tree


def scale_by_adam(beta1: float, beta2: float, epsilon: float, moment_dtype) -> optax.GradientTransformation:
    """Adam's direction with both moments stored in `moment_dtype` (optax's own stores only the first so)."""

    def stored(p: jax.Array) -> jnp.dtype:
        # float64 parity runs keep float64 moments.
        return jnp.dtype(moment_dtype) if p.dtype != jnp.float64 or moment_dtype == "bfloat16" else p.dtype

    def init(params: Tree) -> AdamState:
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=stored(p)), params)
        return AdamState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))

    def update(gradients: Tree, state: AdamState, params: Tree | None = None) -> tuple[Tree, AdamState]:
        del params
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: beta1 * m.astype(g.dtype) + (1 - beta1) * g, state.mu, gradients)
        nu = jax.tree.map(lambda v, g: beta2 * v.astype(g.dtype) + (1 - beta2) * g * g, state.nu, gradients)

        def direction(m, v):
            steps = count.astype(m.dtype)
            return (m / (1 - beta1**steps)) / (jnp.sqrt(v / (1 - beta2**steps)) + epsilon)

        def store(moments: Tree, like: Tree) -> Tree:
            return jax.tree.map(lambda x, old: x.astype(old.dtype), moments, like)

        return jax.tree.map(direction, mu, nu), AdamState(count, store(mu, state.mu), store(nu, state.nu))

    return optax.GradientTransformation(init, update)


def adamw(config: OptimizerConfig, specs: Tree) -> optax.GradientTransformation:
    """AdamW without its learning rate: the step subtracts `lr * update`.

    Args:
      config: its constants.
      specs: declarations of the parameters, which say what decays.
    """
    return optax.chain(
        scale_by_adam(config.beta1, config.beta2, config.epsilon, config.moment_dtype),
        optax.add_decayed_weights(config.weight_decay, mask=map_leaves(lambda spec: spec.decays, specs)),
    )


def map_moments(
    function: Callable[[str, Tree], Any],
    opt_state: Any,
    params: Tree,
    *,
    other: Callable[[str, Any], Any],
) -> Any:
    """Maps an optax state part by part.

    Each part that is shaped like the parameters, such as `0.mu`, becomes `function(path, part)`; every other leaf,
    such as a count, becomes `other("optimizer.<path>", leaf)`.

    Raises:
      ConfigError: a part has the parameters' structure and other shapes, as Adafactor's factored moments have.
    """
    structure: Any = jax.tree.structure(params)  # jax's stubs do not say that structures compare

    def like_params(node: Any) -> bool:
        return structure == jax.tree.structure(node)

    def visit(path, node: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not like_params(node):
            return other(f"optimizer.{name}", node)
        for leaf, parameter in zip(jax.tree.leaves(node), jax.tree.leaves(params), strict=True):
            require(
                leaf.shape == parameter.shape,
                f"the optimizer's {name} has an array of shape {leaf.shape} for a parameter of {parameter.shape}, and "
                "checkpoints take moments of the parameters' shapes alone; choose an optimizer that factors none",
            )
        return function(name, node)

    return jax.tree_util.tree_map_with_path(visit, opt_state, is_leaf=like_params)
