"""How many parameters a model has, by module, from the declarations; no array is made."""

from __future__ import annotations

import math

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.parameters import RouterBias, abstract_values
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.tree import flatten


def count_parameters(config: ModelConfig, *, mtp: bool = True) -> dict[str, int]:
    """Parameters by top-level module (`embedding`, `dense`, `moe`, `mtp`, `final_norm`, `head`), biases included.

    Published totals leave MTP out: DeepSeek-V3 has 671B without it, 11.5B more with it.
    """
    model = Transformer(config)
    counts: dict[str, int] = {}
    for values in (abstract_values(model), abstract_values(model, RouterBias)):
        for name, value in flatten(values).items():
            module = name.split(".")[0]
            if module != "mtp" or mtp:
                counts[module] = counts.get(module, 0) + math.prod(value.shape)
    return counts


def total_parameters(config: ModelConfig, *, mtp: bool = True) -> int:
    """All parameters and router biases."""
    return sum(count_parameters(config, mtp=mtp).values())
