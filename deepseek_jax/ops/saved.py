"""Names for what a layer keeps for its backward pass, as `jax.checkpoint`'s policies read them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name


def named(tree: Any, name: str) -> Any:
    """Every array of a tree under a name.

    FP8 codes are named as the bytes that they are: jax rounds a float that it keeps with `reduce_precision`, which
    takes E4M3 for a format that has infinities and makes one of every code from 256 up.
    """
    return jax.tree.map(lambda leaf: _named(leaf, name), tree)


def _named(leaf: jax.Array, name: str) -> jax.Array:
    if leaf.dtype.itemsize > 1 or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return checkpoint_name(leaf, name)
    return lax.bitcast_convert_type(checkpoint_name(lax.bitcast_convert_type(leaf, jnp.uint8), name), leaf.dtype)
