"""Models of Hugging Face's own code with random weights, and their tensors under our names, for tests.

In memory `transformers` keeps the experts of a layer as two arrays, gate and up side by side; the folders that it
saves, and the table of `interop.layout`, have every expert's matrices by themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import torch
import transformers

from deepseek_jax.config import ModelConfig
from deepseek_jax.interop.layout import Entry, entries
from tools.bench.common import hugging_face_config

_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<expert>\d+)\.(?P<part>gate|up|down)_proj\.weight")


def build(config: ModelConfig, seed: int = 0) -> transformers.DeepseekV3ForCausalLM:
    """A model of theirs of our architecture, see `random_model`."""
    return random_model(hugging_face_config(config), seed)


def random_model(config: transformers.PretrainedConfig, seed: int = 0) -> transformers.PreTrainedModel:
    """A model of theirs with random weights of a size at which routing differs by token, in float32.

    Selection biases, where there are some, make biased scores mostly negative: a masked group is lower, and not zero.
    """
    torch.manual_seed(seed)
    # Eager experts: the grouped matmul of torch refuses rows whose size is no multiple of 16 bytes.
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1)
            if "norm" in name:
                parameter.add_(1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(mean=-0.7, std=0.1)
    return model


def to_ours(config: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Their weights, or gradients, by their names in memory, under our canonical names."""
    return {name: _from_theirs(entry, tensors) for name, entry in _weights(config).items()}


def to_theirs(config: ModelConfig, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The inverse of `to_ours`."""
    tensors: dict[str, torch.Tensor] = {}
    for name, entry in _weights(config).items():
        array = np.asarray(arrays[name])
        rows = [entry.to_theirs(block) for block in (array if entry.stacked else array[None])]
        if entry.stacked:
            tensors[_fused(entry.tensors[0][0])] = torch.tensor(np.stack([np.concatenate(parts) for parts in rows]))
        else:
            tensors |= {name: torch.tensor(part) for name, part in zip(entry.tensors[0], rows[0], strict=True)}
    return tensors


def biases(config: ModelConfig, model: transformers.DeepseekV3ForCausalLM) -> dict[str, np.ndarray]:
    """Their selection biases (buffers) under our canonical names."""
    tensors = model.state_dict()
    table = entries(config)
    return {name: _from_theirs(table[name], tensors) for name in table if name.endswith("router.bias")}


def _weights(config: ModelConfig) -> dict[str, Entry]:
    """The table of names without what is no parameter of theirs."""
    return {name: entry for name, entry in entries(config).items() if not name.endswith("router.bias")}


def _from_theirs(entry: Entry, tensors: Mapping[str, torch.Tensor]) -> np.ndarray:
    """A new array: theirs change in place when they are trained."""

    def tensor(name: str) -> np.ndarray:
        return tensors[name].detach().numpy()

    if entry.stacked:
        return np.stack([entry.from_theirs([matrix]) for matrix in tensor(_fused(entry.tensors[0][0]))])
    return np.array(entry.from_theirs([tensor(name) for name in entry.tensors[0]]), order="C")


def _fused(name: str) -> str:
    """The array in memory that holds an expert's matrix of a saved folder."""
    found = _EXPERT.fullmatch(name)
    assert found, name
    return f"{found['experts']}.{'down' if found['part'] == 'down' else 'gate_up'}_proj"
