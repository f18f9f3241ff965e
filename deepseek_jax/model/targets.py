"""What is predicted from where: labels and their weights for the main model and every MTP depth.

A row holds S + 1 tokens t_0 … t_S. Position i of the main model reads t_0 … t_i and predicts t_{i+1}; MTP module k
also reads t_{i+k} and predicts t_{i+k+1}.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.model.mtp import shift_left


class Microbatch(NamedTuple):
    """Rows of packed documents, each array int32 `[B, S + 1]`: NumPy's on the host, JAX's in a step."""

    tokens: Any
    segment_ids: Any
    """Which document of the row a token belongs to, from 1; 0 is padding."""
    positions: Any
    """Position within the document."""
    loss_mask: Any
    """1 where the token may be a label."""


class Targets(NamedTuple):
    """One prediction per position."""

    labels: jax.Array
    """int32 `[B, S]`."""
    weights: jax.Array
    """float32 `[B, S]`: 1 where the prediction counts, else 0."""


def targets(batch: Microbatch, depth: int = 0, *, within_documents: bool = False) -> Targets:
    """Labels of the main model (`depth` 0) or of MTP module `depth`.

    The last `depth` positions have no label. With `within_documents`, neither has a position whose label lies in
    another document than the position itself; pre-training predicts across documents (section 4.1 masks nothing).
    """
    length = batch.tokens.shape[1] - 1
    labels = shift_left(batch.tokens, depth + 1)[:, :length]
    weights = shift_left(batch.loss_mask, depth + 1)[:, :length] != 0
    if within_documents:
        weights &= shift_left(batch.segment_ids, depth + 1)[:, :length] == batch.segment_ids[:, :length]
    return Targets(labels, weights.astype(jnp.float32))
