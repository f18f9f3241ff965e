"""Training system of DeepSeek-V3 in JAX. This is the public face of its model zoo; importing it costs nothing.

import deepseek_jax as ds

model = ds.load("DeepSeek-V2-Lite")      # a Hugging Face folder
ds.generate(model, "def fibonacci(n):")

model = ds.create(ds.zoo.tiny())         # or fresh weights
ds.generate(model, [[1, 2, 3]], max_new_tokens=8)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepseek_jax import zoo
    from deepseek_jax.config import ModelConfig
    from deepseek_jax.inference.binding import create
    from deepseek_jax.inference.generate import generate
    from deepseek_jax.inference.language_model import LanguageModel
    from deepseek_jax.inference.sampling import Sampling
    from deepseek_jax.interop.load import load
    from deepseek_jax.model.transformer import Transformer
    from deepseek_jax.objective import loss

__all__ = ["LanguageModel", "ModelConfig", "Sampling", "Transformer", "create", "generate", "load", "loss", "zoo"]

_HOMES = {
    "LanguageModel": "deepseek_jax.inference.language_model",
    "Sampling": "deepseek_jax.inference.sampling",
    "load": "deepseek_jax.interop.load",
    "ModelConfig": "deepseek_jax.config",
    "Transformer": "deepseek_jax.model.transformer",
    "create": "deepseek_jax.inference.binding",
    "generate": "deepseek_jax.inference.generate",
    "loss": "deepseek_jax.objective",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: jax and flax load only then."""
    if name == "zoo":
        return importlib.import_module("deepseek_jax.zoo")
    if name not in _HOMES:
        raise AttributeError(f"module 'deepseek_jax' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
