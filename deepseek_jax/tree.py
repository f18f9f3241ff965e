"""Nested dicts of arrays, the form in which parameters travel, and their flat form with dotted names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Tree = Any
"""A nested dict with attribute names as keys and one array (or declaration) per leaf."""


def map_leaves(function: Callable, tree: Tree, *others: Tree) -> Tree:
    """Applies `function` to corresponding leaves of nested dicts of one structure; any non-dict is a leaf."""
    if isinstance(tree, Mapping):
        return {k: map_leaves(function, v, *(other[k] for other in others)) for k, v in tree.items()}
    return function(tree, *others)


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """A nested dict as a flat one with dotted names: `{"a": {"b": x}}` becomes `{"a.b": x}`."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, Mapping):
            flat.update(flatten(value, name))
        else:
            flat[name] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """The inverse of `flatten`."""
    tree: dict = {}
    for name, value in flat.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
