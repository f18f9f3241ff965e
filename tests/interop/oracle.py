"""DeepSeek-V2 and V3 in NumPy and float64, one token and one head at a time: slow, plain, and nothing of ours in it.

Written from the equations of the reports (arXiv 2405.04434 and 2412.19437, sections 2.1 and 2.2) and from the layout of
the published weights. It reads a Hugging Face folder in float32 by itself. D hidden, S tokens, V vocabulary.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

LATENT_EPS = 1e-6
"""Of the norms after the compressed latents, whatever `rms_norm_eps` says."""


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """config.json, and the float32 tensors of all safetensors files in float64."""
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        for name, info in json.loads(data[8 : 8 + size]).items():
            if name != "__metadata__":
                assert info["dtype"] == "F32", name
                start, end = (8 + size + offset for offset in info["data_offsets"])
                weights[name] = np.frombuffer(data[start:end], "<f4").reshape(info["shape"]).astype(np.float64)
    return json.loads((folder / "config.json").read_text()), weights


class Oracle:
    """The model of a folder; every method takes one sequence of tokens, without a batch."""

    def __init__(self, folder: Path):
        self.config, self.weights = read_folder(folder)
        self.rope_size = self.config["qk_rope_head_dim"]
        self.yarn = self.config.get("rope_scaling")

    def logits(self, tokens: list[int]) -> np.ndarray:
        """`[S, V]`: at position i, of token i + 1."""
        return self._head(self._hidden(tokens))

    def mtp_logits(self, tokens: list[int]) -> list[np.ndarray]:
        """Of module k, from 1: `[S - k, V]`, at position i of token i + k + 1."""
        hidden, predictions = self._hidden(tokens), []
        for k in range(1, self.config["num_nextn_predict_layers"] + 1):
            prefix = f"model.layers.{self.config['num_hidden_layers'] + k - 1}."
            joined = []
            for i in range(len(tokens) - k):
                embedding = self._norm(self._embedding(tokens[i + k]), prefix + "enorm.weight")
                before = self._norm(hidden[i], prefix + "hnorm.weight")
                # The published weights take the embedding first, which the report writes second.
                joined.append(self.weights[prefix + "eh_proj.weight"] @ np.concatenate([embedding, before]))
            x = self._layer(np.array(joined), prefix, experts=True)
            hidden = np.array([self._norm(row, prefix + "shared_head.norm.weight") for row in x])
            predictions.append(self._head(hidden))
        return predictions

    def _hidden(self, tokens: list[int]) -> np.ndarray:
        """`[S, D]` after the main model's final norm."""
        x = np.array([self._embedding(token) for token in tokens])
        for layer in range(self.config["num_hidden_layers"]):
            x = self._layer(x, f"model.layers.{layer}.", experts=layer >= self.config["first_k_dense_replace"])
        return np.array([self._norm(row, "model.norm.weight") for row in x])

    def _embedding(self, token: int) -> np.ndarray:
        return self.weights["model.embed_tokens.weight"][token]

    def _head(self, hidden: np.ndarray) -> np.ndarray:
        name = "model.embed_tokens.weight" if self.config["tie_word_embeddings"] else "lm_head.weight"
        return hidden @ self.weights[name].T

    def _norm(self, x: np.ndarray, name: str, eps: float | None = None) -> np.ndarray:
        eps = self.config["rms_norm_eps"] if eps is None else eps
        return x / math.sqrt(np.mean(x * x) + eps) * self.weights[name]

    def _layer(self, x: np.ndarray, prefix: str, *, experts: bool) -> np.ndarray:
        normed = np.array([self._norm(row, prefix + "input_layernorm.weight") for row in x])
        x = x + self._attention(normed, prefix + "self_attn.")
        network = self._experts if experts else self._swiglu
        normed = [self._norm(row, prefix + "post_attention_layernorm.weight") for row in x]
        return x + np.array([network(row, prefix + "mlp.") for row in normed])

    def _swiglu(self, x: np.ndarray, prefix: str) -> np.ndarray:
        gate, up = (self.weights[f"{prefix}{name}_proj.weight"] @ x for name in ("gate", "up"))
        return self.weights[prefix + "down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)

    def _attention(self, x: np.ndarray, prefix: str) -> np.ndarray:
        """Equations 1 to 11 of V3's report; x `[S, D]` is normed."""
        config = self.config
        nope, rope, value_size = config["qk_nope_head_dim"], self.rope_size, config["v_head_dim"]
        rank, outputs = config["kv_lora_rank"], []
        queries, keys, values = [], [], []
        for position, row in enumerate(x):
            compressed = self.weights[prefix + "kv_a_proj_with_mqa.weight"] @ row
            latent = self._norm(compressed[:rank], prefix + "kv_a_layernorm.weight", LATENT_EPS)
            shared_key = self._rotate(compressed[rank:], position)
            heads = (self.weights[prefix + "kv_b_proj.weight"] @ latent).reshape(-1, nope + value_size)
            keys.append([np.concatenate([head[:nope], shared_key]) for head in heads])
            values.append(heads[:, nope:])
            heads = self._query(row, prefix).reshape(-1, nope + rope)
            queries.append([np.concatenate([head[:nope], self._rotate(head[nope:], position)]) for head in heads])
        for position in range(len(x)):
            attended = []
            for head in range(config["num_attention_heads"]):
                scores = [queries[position][head] @ keys[seen][head] for seen in range(position + 1)]
                scores = np.array(scores) * self._softmax_scale()
                shares = np.exp(scores - scores.max())
                shares /= shares.sum()
                attended.append(sum(share * values[seen][head] for seen, share in enumerate(shares)))
            outputs.append(self.weights[prefix + "o_proj.weight"] @ np.concatenate(attended))
        return np.array(outputs)

    def _query(self, x: np.ndarray, prefix: str) -> np.ndarray:
        if self.config["q_lora_rank"] is None:
            return self.weights[prefix + "q_proj.weight"] @ x
        latent = self._norm(self.weights[prefix + "q_a_proj.weight"] @ x, prefix + "q_a_layernorm.weight", LATENT_EPS)
        return self.weights[prefix + "q_b_proj.weight"] @ latent

    def _softmax_scale(self) -> float:
        scale = 1 / math.sqrt(self.config["qk_nope_head_dim"] + self.rope_size)
        return scale * self._mscale("mscale_all_dim") ** 2 if self.yarn else scale

    def _mscale(self, name: str) -> float:
        return 0.1 * self.yarn[name] * math.log(self.yarn["factor"]) + 1

    def _rotate(self, x: np.ndarray, position: int) -> np.ndarray:
        """Neighbours are the real and the imaginary part of a number that turns."""
        length = self._mscale("mscale") / self._mscale("mscale_all_dim") if self.yarn else 1.0
        turned = []
        for pair in range(self.rope_size // 2):
            number = complex(x[2 * pair], x[2 * pair + 1])
            number *= length * complex(np.exp(1j * position * self._frequency(pair)))
            turned += [number.real, number.imag]
        return np.array(turned)

    def _frequency(self, pair: int) -> float:
        theta = self.config["rope_theta"]
        frequency = theta ** (-2 * pair / self.rope_size)
        if not self.yarn:
            return frequency

        def index(rotations: float) -> float:
            turns = self.yarn["original_max_position_embeddings"] / (2 * math.pi * rotations)
            return self.rope_size * math.log(turns) / (2 * math.log(theta))

        low = max(math.floor(index(self.yarn["beta_fast"])), 0)
        high = min(math.ceil(index(self.yarn["beta_slow"])), self.rope_size - 1)
        stretched = min(max((pair - low) / (high - low), 0), 1)
        return frequency * (1 - stretched) + frequency / self.yarn["factor"] * stretched

    def _experts(self, x: np.ndarray, prefix: str) -> np.ndarray:
        """The shared experts and the chosen ones, for one token."""
        y = self._swiglu(x, prefix + "shared_experts.")
        for expert, weight in self._chosen(x, prefix + "gate.").items():
            y = y + weight * self._swiglu(x, f"{prefix}experts.{expert}.")
        return y

    def _chosen(self, x: np.ndarray, prefix: str) -> dict[int, float]:
        """The experts of one token, each with its weight (V3: equations 12 to 16; V2: 20 to 22, and section 2.2.2)."""
        config = self.config
        logits = self.weights[prefix + "weight"] @ x
        if config["model_type"] == "deepseek_v3":
            scores = 1 / (1 + np.exp(-logits))
            wanted, counted = scores + self.weights[prefix + "e_score_correction_bias"], 2
        else:
            scores = np.exp(logits - logits.max())
            scores /= scores.sum()
            wanted, counted = scores, 1
        allowed = list(range(len(scores)))
        if config["topk_method"] != "greedy":
            groups = np.split(np.arange(len(scores)), config["n_group"])
            best_first = sorted(groups, key=lambda group: -sum(sorted(wanted[group])[-counted:]))
            allowed = [int(expert) for group in best_first[: config["topk_group"]] for expert in group]
        chosen = sorted(allowed, key=lambda expert: -wanted[expert])[: config["num_experts_per_tok"]]
        total = sum(scores[chosen]) if config["norm_topk_prob"] else 1.0
        return {expert: scores[expert] / total * config["routed_scaling_factor"] for expert in chosen}
