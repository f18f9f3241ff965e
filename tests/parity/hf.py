"""Weights between this library and Hugging Face's `DeepseekV3ForCausalLM`, for tests only; `interop` is the real one.

Linear weights are `[in, out]` here and `[out, in]` there. Their rotary rows pair neighbours, ours are half-split, so
the rotary columns of `q` / `q_b` and of `kv_a` are permuted. Gate and up are one matrix here, gate first.
"""

from __future__ import annotations

import numpy as np
import torch
import transformers

from deepseek_jax.config import ModelConfig
from tools.bench.common import hugging_face_config


def build(config: ModelConfig, seed: int = 0) -> transformers.DeepseekV3ForCausalLM:
    """A model of theirs with random weights of a size at which routing differs by token, in float32."""
    torch.manual_seed(seed)
    model = transformers.DeepseekV3ForCausalLM(hugging_face_config(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1)
            if "norm" in name:
                parameter.add_(1)
    return model


def half_split(rope_dim: int) -> np.ndarray:
    """For each half-split dimension, the neighbour-paired one that it is."""
    return np.concatenate([np.arange(0, rope_dim, 2), np.arange(1, rope_dim, 2)])


def rotary_columns(config: ModelConfig, name: str) -> np.ndarray | None:
    """The order in which to take the output columns of one of their matrices, or None for as they are."""
    attention = config.attention
    order = half_split(attention.qk_rope_head_dim)
    if name.endswith(("q_proj.weight", "q_b_proj.weight")):
        head = np.concatenate([np.arange(attention.qk_nope_head_dim), attention.qk_nope_head_dim + order])
        return (np.arange(attention.num_heads)[:, None] * attention.qk_head_dim + head).reshape(-1)
    if name.endswith("kv_a_proj_with_mqa.weight"):
        return np.concatenate([np.arange(attention.kv_lora_rank), attention.kv_lora_rank + order])
    return None


ATTENTION = {
    "q": "q_proj",
    "q_a": "q_a_proj",
    "q_b": "q_b_proj",
    "kv_a": "kv_a_proj_with_mqa",
    "kv_b": "kv_b_proj",
    "o": "o_proj",
}


def names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Our canonical name to theirs; two of theirs where gate and up are joined."""
    table = {
        "embedding.weight": ("model.embed_tokens.weight",),
        "final_norm.scale": ("model.norm.weight",),
        "head.weight": ("lm_head.weight",),
    }
    low_rank = config.attention.q_lora_rank is not None
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        table[f"{ours}.attention_norm.scale"] = (f"{theirs}.input_layernorm.weight",)
        table[f"{ours}.ffn_norm.scale"] = (f"{theirs}.post_attention_layernorm.weight",)
        for part in ("q_a", "q_b", "kv_a", "kv_b", "o") if low_rank else ("q", "kv_a", "kv_b", "o"):
            table[f"{ours}.attention.{part}.weight"] = (f"{theirs}.self_attn.{ATTENTION[part]}.weight",)
        for part in ("q_a", "kv_a") if low_rank else ("kv_a",):
            table[f"{ours}.attention.{part}_norm.scale"] = (f"{theirs}.self_attn.{part}_layernorm.weight",)
        networks = {f"{ours}.ffn": f"{theirs}.mlp"}
        if layer >= config.num_dense_layers:
            table[f"{ours}.ffn.router.weight"] = (f"{theirs}.mlp.gate.weight",)
            table[f"{ours}.ffn.experts.gate_up"] = (f"{theirs}.mlp.experts.gate_up_proj",)
            table[f"{ours}.ffn.experts.down"] = (f"{theirs}.mlp.experts.down_proj",)
            networks = {f"{ours}.ffn.shared": f"{theirs}.mlp.shared_experts"}
        for mine, other in networks.items():
            table[f"{mine}.gate_up.weight"] = (f"{other}.gate_proj.weight", f"{other}.up_proj.weight")
            table[f"{mine}.down.weight"] = (f"{other}.down_proj.weight",)
    return table


def to_ours(config: ModelConfig, tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Their tensors (weights or gradients, by their names) under our canonical names."""
    arrays = {}
    for ours, theirs in names(config).items():
        parts = [tensors[name].detach().numpy() for name in theirs]
        if parts[0].ndim >= 2 and ours != "embedding.weight":
            parts = [part.swapaxes(-1, -2) for part in parts]
        joined = np.concatenate(parts, axis=-1)
        columns = rotary_columns(config, theirs[0])
        arrays[ours] = np.ascontiguousarray(joined if columns is None else joined[:, columns])
    return arrays


def to_theirs(config: ModelConfig, arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The inverse of `to_ours`."""
    tensors = {}
    for ours, theirs in names(config).items():
        joined = np.asarray(arrays[ours])
        columns = rotary_columns(config, theirs[0])
        if columns is not None:
            joined = joined[:, np.argsort(columns)]
        parts = np.split(joined, len(theirs), axis=-1)
        if joined.ndim >= 2 and ours != "embedding.weight":
            parts = [part.swapaxes(-1, -2) for part in parts]
        tensors |= {name: torch.tensor(part.copy()) for name, part in zip(theirs, parts, strict=True)}
    return tensors


def biases(config: ModelConfig, model: transformers.DeepseekV3ForCausalLM) -> dict[str, np.ndarray]:
    """Their selection biases (buffers) under our canonical names."""
    return {
        f"layers.{layer}.ffn.router.bias": model.model.layers[layer].mlp.gate.e_score_correction_bias.numpy().copy()
        for layer in range(config.num_dense_layers, config.num_layers)
    }
