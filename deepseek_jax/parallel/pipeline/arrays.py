"""Trees of arrays inside `shard_map`, all of whose leaves vary over every mesh axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.compat import to_varying
from deepseek_jax.parallel.mesh import AXES


def zeros(tree: Any, rows: int | None = None) -> Any:
    """Zeros like a tree of arrays or shapes; with so many rows in front."""
    lead = () if rows is None else (rows,)
    return to_varying(jax.tree.map(lambda leaf: jnp.zeros((*lead, *leaf.shape), leaf.dtype), tree), AXES)


def wide_zeros(tree: Any) -> Any:
    """Zeros like a tree, in float32 or wider."""
    wide = lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))  # noqa: E731
    return to_varying(jax.tree.map(wide, tree), AXES)


def add(total: Any, tree: Any) -> Any:
    """The sum, in the dtypes of `total`."""
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, tree)


def where(predicate: Any, then: Any, otherwise: Any = None) -> Any:
    """Leaf by leaf `jnp.where`; otherwise zeros."""
    if otherwise is None:
        return jax.tree.map(lambda a: jnp.where(predicate, a, jnp.zeros_like(a)), then)
    return jax.tree.map(lambda a, b: jnp.where(predicate, a, b), then, otherwise)


def choose(index: jax.Array, trees: Sequence[Any]) -> Any:
    """The tree of that number, from 0."""
    if len(trees) == 1:
        return trees[0]
    which = to_varying(index.astype(jnp.int32), AXES)
    return jax.tree.map(lambda *leaves: lax.select_n(which, *leaves), *trees)


def take(ring: Any, row: jax.Array) -> Any:
    """A row of every leaf."""
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, row, keepdims=False), ring)


def put(ring: Any, row: jax.Array, value: Any) -> Any:
    """The ring with `value` in a row."""
    return jax.tree.map(lambda leaf, v: lax.dynamic_update_index_in_dim(leaf, v, row, 0), ring, value)


def after(made: Any) -> jax.Array:
    """True, when the first number of every leaf has been made. XLA does not see that it is always true, so what depends
    on it waits; an optimization barrier would be gone before buffers are assigned."""
    known = jnp.asarray(True)
    for leaf in jax.tree.leaves(made):
        first = leaf[(0,) * leaf.ndim]
        known = known & ((first == first) | (first != first))
    return known


def is_array(leaf: Any) -> bool:
    """Whether it is one, and not a `ShapeDtypeStruct` in the place of a weight that no function reads."""
    return not isinstance(leaf, jax.ShapeDtypeStruct)


def only_arrays(tree: Any) -> Any:
    """The tree with nothing in the place of what is no array."""
    return jax.tree.map(lambda leaf: leaf if is_array(leaf) else None, tree)


def filled(tree: Any, like: Any, parts: int = 1) -> Any:
    """A tree of `only_arrays` with zeros in the empty places, shaped as in `like`, of whose layers it is one of so many
    parts."""

    def fill(leaf: Any, shape: Any) -> Any:
        if is_array(shape):
            return leaf
        whole = (shape.shape[0] // parts, *shape.shape[1:])
        return to_varying(jnp.zeros(whole, shape.dtype), AXES)

    return jax.tree.map(fill, tree, like, is_leaf=lambda leaf: leaf is None)


def stacked(parts: Sequence[Any]) -> Any:
    """Trees as one, whose leaves are `[trees, ...]`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)


def joined(parts: Sequence[Any]) -> Any:
    """Trees one after the other along their leaves' first dimension."""
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def parted(tree: Any, count: int) -> tuple:
    """The inverse of `joined`, for so many equal parts."""
    if count == 1:
        return (tree,)
    parts = [jax.tree.map(lambda leaf, k=k: jnp.split(leaf, count)[k], tree) for k in range(count)]
    return tuple(parts)
