"""Folders that `transformers` would not compute as published, MTP above all, against float64 NumPy (`oracle.py`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracle import Oracle
from tensor_files import write

import deepseek_jax
from deepseek_jax.model.mtp import shift_left
from deepseek_jax.model.transformer import Transformer, apply_layers

TOLERANCE = 1e-4
"""Of the largest logit; ours are float32."""
COMMON = {
    **{"vocab_size": 53, "hidden_size": 27, "intermediate_size": 31, "num_hidden_layers": 2},
    **{"first_k_dense_replace": 1, "num_attention_heads": 3, "num_key_value_heads": 3, "kv_lora_rank": 11},
    **{"qk_nope_head_dim": 5, "qk_rope_head_dim": 6, "v_head_dim": 7, "rms_norm_eps": 1e-4, "rope_theta": 500.0},
    **{"n_routed_experts": 12, "n_shared_experts": 2, "num_experts_per_tok": 3, "moe_intermediate_size": 13},
    **{"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "tie_word_embeddings": False},
}
V3 = COMMON | {
    "model_type": "deepseek_v3",
    "q_lora_rank": 9,
    "topk_method": "noaux_tc",
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 2,
    "rope_scaling": {
        **{"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 4.0, "beta_slow": 1.0},
        **{"mscale": 0.7, "mscale_all_dim": 1.3},
    },
}
V2 = COMMON | {
    "model_type": "deepseek_v2",
    "q_lora_rank": None,
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 1.0,
}
CONFIGS = {"v3": V3, "v2": V2, "v2_greedy": V2 | {"topk_method": "greedy", "tie_word_embeddings": True}}


def network(config: dict[str, Any], prefix: str, size: int) -> dict[str, tuple[int, ...]]:
    width = config["hidden_size"]
    shapes = dict.fromkeys(("gate_proj", "up_proj"), (size, width)) | {"down_proj": (width, size)}
    return {f"{prefix}{name}.weight": shape for name, shape in shapes.items()}


def layer(config: dict[str, Any], prefix: str, *, experts: bool) -> dict[str, tuple[int, ...]]:
    """The tensors of one layer and their shapes, as the published folders have them."""
    width, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    query, low_rank = heads * (nope + rope), config["q_lora_rank"]
    attention = {
        "kv_a_proj_with_mqa": (rank + rope, width),
        "kv_a_layernorm": (rank,),
        "kv_b_proj": (heads * (nope + value), rank),
        "o_proj": (width, heads * value),
    }
    if low_rank is None:
        attention["q_proj"] = (query, width)
    else:
        attention |= {"q_a_proj": (low_rank, width), "q_a_layernorm": (low_rank,), "q_b_proj": (query, low_rank)}
    shapes = {f"{prefix}{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {f"{prefix}self_attn.{name}.weight": shape for name, shape in attention.items()}
    if not experts:
        return shapes | network(config, prefix + "mlp.", config["intermediate_size"])
    size, count = config["moe_intermediate_size"], config["n_routed_experts"]
    shapes[prefix + "mlp.gate.weight"] = (count, width)
    if config["model_type"] == "deepseek_v3":
        shapes[prefix + "mlp.gate.e_score_correction_bias"] = (count,)
    shapes |= network(config, prefix + "mlp.shared_experts.", size * config["n_shared_experts"])
    for expert in range(count):
        shapes |= network(config, f"{prefix}mlp.experts.{expert}.", size)
    return shapes


def make_folder(folder: Path, config: dict[str, Any]) -> Path:
    """A folder of random weights, MTP modules as layers that follow the last one, with their copies."""
    width, count = config["hidden_size"], config["num_hidden_layers"]
    embedding = (config["vocab_size"], width)
    shapes = {"model.embed_tokens.weight": embedding, "model.norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = embedding
    for index in range(count):
        shapes |= layer(config, f"model.layers.{index}.", experts=index >= config["first_k_dense_replace"])
    copies = {}
    for index in range(count, count + config.get("num_nextn_predict_layers", 0)):
        prefix = f"model.layers.{index}."
        shapes |= layer(config, prefix, experts=True) | {prefix + "eh_proj.weight": (width, 2 * width)}
        shapes |= {f"{prefix}{name}.weight": (width,) for name in ("enorm", "hnorm", "shared_head.norm")}
        copies[prefix + "embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[prefix + "shared_head.head.weight"] = "lm_head.weight"
    rng = np.random.default_rng(0)
    arrays = {}
    for name, shape in shapes.items():
        # Biased scores are then mostly negative: a group that is not kept must be lower still, and not zero.
        mean = -0.7 if name.endswith("bias") else float("norm" in name)
        arrays[name] = rng.normal(mean, 0.15, shape).astype(np.float32)
    arrays |= {copy: arrays[name] for copy, name in copies.items()}
    write(folder, arrays)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_close(ours: np.ndarray, expected: np.ndarray) -> None:
    assert expected.std() > 0.1
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def some_tokens(length: int = 13) -> list[int]:
    return np.random.default_rng(1).integers(0, COMMON["vocab_size"], length).tolist()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits(config, tmp_path):
    tokens = some_tokens()
    model = deepseek_jax.load(make_folder(tmp_path / "model", config), progress=False)
    assert_close(np.asarray(model(np.array([tokens], np.int32)))[0], Oracle(tmp_path / "model").logits(tokens))


def test_mtp_modules_of_a_folder_predict_the_tokens_after_the_next(tmp_path):
    tokens = some_tokens()
    model = deepseek_jax.load(make_folder(tmp_path / "model", V3), progress=False).model
    expected = Oracle(tmp_path / "model").mtp_logits(tokens)
    graphdef, state = nnx.split(model)
    ours = jax.jit(lambda state, tokens: mtp_logits(nnx.merge(graphdef, state), tokens))(state, np.array([tokens]))
    assert len(ours) == len(expected) == 2
    for depth, (mine, theirs) in enumerate(zip(ours, expected, strict=True), 1):
        assert_close(np.asarray(mine)[0, :-depth], theirs)


def mtp_logits(model: Transformer, tokens: jax.Array) -> list[jax.Array]:
    """`[B, S, V]` of every module, called as a training step calls it."""
    ctx = model.context(jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))
    x = model.embedding(tokens)
    for layers in (model.dense, model.moe):
        x = apply_layers(layers, x, ctx)
    hidden, predictions = model.final_norm(x), []
    graphdef, stacked = nnx.split(model.mtp)
    for depth in range(1, model.config.mtp_depth + 1):
        module = nnx.merge(graphdef, jax.tree.map(lambda leaf, index=depth - 1: leaf[index], stacked))
        joined = module.join(hidden, model.embedding(shift_left(tokens, depth)))
        hidden = module.leave(module.block(joined, ctx)[0])
        predictions.append(model.logits(hidden))
    return predictions
