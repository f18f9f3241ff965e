"""The architecture of a model, and nothing else: what a checkpoint must agree with.

Every class is frozen, validates itself when it is made, and says what to change. Defaults are DeepSeek-V3's
(tech report, section 4.2), so `ModelConfig()` is the 671B model and a smaller one changes sizes, not rules.
"""

from __future__ import annotations

import dataclasses
from typing import Literal


class ConfigError(ValueError):
    """A field or a combination of fields that cannot work. The message names the field, its value and what is valid."""


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN context extension (arXiv 2309.00071), as DeepSeek-V3 applies it after pre-training (section 4.3)."""

    factor: float = 40.0
    """How many times longer than `original_length` the context becomes."""
    original_length: int = 4096
    """Context length of pre-training, in tokens."""
    beta_fast: float = 32.0
    """Rotations over the original context above which a frequency is kept as it is."""
    beta_slow: float = 1.0
    """Rotations over the original context below which a frequency is divided by `factor`."""
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self):
        require(self.factor >= 1, f"yarn.factor must be at least 1, not {self.factor}")
        require(self.original_length > 0, f"yarn.original_length must be positive, not {self.original_length}")
        require(
            self.beta_fast >= self.beta_slow,
            f"yarn.beta_fast ({self.beta_fast}) must be at least yarn.beta_slow ({self.beta_slow})",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Multi-head Latent Attention (section 2.1.1)."""

    num_heads: int = 128
    q_lora_rank: int | None = 1536
    """Width of the compressed query; None projects queries straight from the hidden state (V2-Lite)."""
    kv_lora_rank: int = 512
    """Width of the compressed key-value latent, the part of the cache without positions."""
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_theta: float = 10_000.0
    yarn: YarnConfig | None = None

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head: the part without positions, then the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def __post_init__(self):
        for name in ("num_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            value = getattr(self, name)
            require(value > 0, f"attention.{name} must be positive, not {value}")
        require(
            self.qk_rope_head_dim % 2 == 0,
            f"attention.qk_rope_head_dim rotates pairs and must be even, not {self.qk_rope_head_dim}",
        )
        require(
            self.q_lora_rank is None or self.q_lora_rank > 0,
            f"attention.q_lora_rank must be positive, or none for no query compression, not {self.q_lora_rank}",
        )
        require(self.rope_theta > 0, f"attention.rope_theta must be positive, not {self.rope_theta}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """DeepSeekMoE with auxiliary-loss-free balancing and group-limited routing (section 2.1.2)."""

    num_experts: int = 256
    num_shared_experts: int = 1
    experts_per_token: int = 8
    expert_ffn_size: int = 2048
    num_groups: int = 8
    """Groups of experts; with expert parallelism one group lives on one node."""
    groups_per_token: int = 4
    score_function: Literal["sigmoid", "softmax"] = "sigmoid"
    group_score: Literal["top2_sum", "max"] = "top2_sum"
    """How a group is ranked: sum of its two best biased scores (V3) or its best one (V2)."""
    normalize_weights: bool = True
    """Divide the chosen scores by their sum before `routed_scale` (V3), or not (V2)."""
    routed_scale: float = 2.5
    use_bias: bool = True
    """Keep a per-expert bias that steers selection only: the auxiliary-loss-free balance."""

    @property
    def experts_per_group(self) -> int:
        """Routed experts in one group."""
        return self.num_experts // self.num_groups

    def __post_init__(self):
        for name in ("num_experts", "experts_per_token", "expert_ffn_size", "num_groups", "groups_per_token"):
            value = getattr(self, name)
            require(value > 0, f"moe.{name} must be positive, not {value}")
        require(self.num_shared_experts >= 0, f"moe.num_shared_experts cannot be negative: {self.num_shared_experts}")
        require(
            self.num_experts % self.num_groups == 0,
            f"moe.num_experts ({self.num_experts}) must be a multiple of moe.num_groups ({self.num_groups})",
        )
        require(
            self.groups_per_token <= self.num_groups,
            f"moe.groups_per_token ({self.groups_per_token}) exceeds moe.num_groups ({self.num_groups})",
        )
        reachable = self.groups_per_token * self.experts_per_group
        require(
            self.experts_per_token <= reachable,
            f"moe.experts_per_token ({self.experts_per_token}) exceeds the {reachable} experts that "
            f"{self.groups_per_token} groups of {self.experts_per_group} offer; raise moe.groups_per_token",
        )
        require(
            self.group_score == "max" or self.num_groups == 1 or self.experts_per_group >= 2,
            "moe.group_score=top2_sum needs at least 2 experts per group; lower moe.num_groups",
        )
        choices = {"score_function": ("sigmoid", "softmax"), "group_score": ("top2_sum", "max")}
        for name, valid in choices.items():
            value = getattr(self, name)
            require(value in valid, f"moe.{name} must be one of {', '.join(valid)}, not {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A DeepSeek language model: leading dense layers, then MoE layers, then MTP modules (section 2)."""

    vocab_size: int = 129_280
    """Rows of the embedding, at least the tokenizer's size."""
    hidden_size: int = 7168
    num_layers: int = 61
    """Main-model layers, dense and MoE together, MTP not counted."""
    num_dense_layers: int = 3
    dense_ffn_size: int = 18_432
    attention: AttentionConfig = AttentionConfig()
    moe: MoEConfig = MoEConfig()
    mtp_depth: int = 1
    """Multi-token-prediction modules, each predicting one token further (section 2.2)."""
    rms_norm_eps: float = 1e-6
    init_std: float = 0.006
    """Standard deviation of every initial weight (section 4.2)."""
    tie_embeddings: bool = False

    @property
    def num_moe_layers(self) -> int:
        """Main-model layers with routed experts."""
        return self.num_layers - self.num_dense_layers

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "num_layers", "dense_ffn_size"):
            value = getattr(self, name)
            require(value > 0, f"model.{name} must be positive, not {value}")
        require(
            0 <= self.num_dense_layers <= self.num_layers,
            f"model.num_dense_layers must lie between 0 and model.num_layers ({self.num_layers}), "
            f"not {self.num_dense_layers}",
        )
        require(self.mtp_depth >= 0, f"model.mtp_depth cannot be negative: {self.mtp_depth}")
        require(self.init_std > 0, f"model.init_std must be positive, not {self.init_std}")
        require(self.rms_norm_eps > 0, f"model.rms_norm_eps must be positive, not {self.rms_norm_eps}")
