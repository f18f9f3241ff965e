"""How many parameters a model has, by module, from the declarations; no array is made."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Literal

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.parameters import RouterBias, abstract_values
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.tree import flatten


def count_parameters(config: ModelConfig, *, mtp: bool = True) -> dict[str, int]:
    """Parameters by top-level module (`embedding`, `dense`, `moe`, `mtp`, `final_norm`, `head`), biases included.

    Published totals leave MTP out: DeepSeek-V3 has 671B without it, 11.5B more with it.
    """
    counts: dict[str, int] = {}
    for name, size in _sizes(config, mtp=mtp):
        module = name.split(".")[0]
        counts[module] = counts.get(module, 0) + size
    return counts


def total_parameters(config: ModelConfig, *, mtp: bool = True) -> int:
    """All parameters and router biases."""
    return sum(count_parameters(config, mtp=mtp).values())


def active_parameters(config: ModelConfig, *, vocabulary_matrices: Literal[1, 2] = 2, mtp: bool = True) -> int:
    """The parameters that one token uses: all of them, but only `experts_per_token` of the routed experts.

    Args:
      config: the model.
      vocabulary_matrices: 2 counts the embedding and the output head. 1 counts one of them, as published figures do,
        because looking a row up multiplies nothing: without MTP, DeepSeek-V3 has 37.6B by the first and 36.6B by the
        second. Tied, the two are one matrix, which both count.
      mtp: count the MTP modules too; published figures do not.
    """
    moe = config.moe
    active = 0
    for name, size in _sizes(config, mtp=mtp):
        if name == "embedding.weight" and vocabulary_matrices == 1 and not config.tie_embeddings:
            continue
        active += size * moe.experts_per_token // moe.num_experts if ".experts." in name else size
    return active


def _sizes(config: ModelConfig, *, mtp: bool) -> Iterator[tuple[str, int]]:
    """The name and the number of elements of every declared parameter and router bias."""
    return ((name, size) for name, size in _all_sizes(config) if mtp or not name.startswith("mtp."))


@functools.lru_cache(maxsize=32)
def _all_sizes(config: ModelConfig) -> tuple[tuple[str, int], ...]:
    model = Transformer(config)
    arrays = (abstract_values(model), abstract_values(model, RouterBias))
    return tuple((name, math.prod(value.shape)) for values in arrays for name, value in flatten(values).items())
