"""The latent cache: what decoding keeps of every token, one normed latent and one rotated key per layer.

L layers of a kind, B rows, T tokens of capacity, C latent rank, R rotary dimensions.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCache:
    """Cache entries of the main model's layers, written from the start of each row, rows of unequal length."""

    entries: dict[str, jax.Array]
    """Per kind of layer, `dense` or `moe`, `[L, B, T, C + R]`. What lies past a row's length is never read."""
    lengths: jax.Array
    """int32 `[B]`: how many tokens of each row are in the cache."""

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, capacity: int, dtype=jnp.float32) -> LatentCache:
        """Room for `capacity` tokens in each of `batch` rows."""
        layers = {"dense": config.num_dense_layers, "moe": config.num_moe_layers}
        size = entry_size(config)
        return cls(
            entries={kind: jnp.zeros((n, batch, capacity, size), dtype) for kind, n in layers.items() if n},
            lengths=jnp.zeros(batch, jnp.int32),
        )

    @property
    def capacity(self) -> int:
        """Tokens that each row has room for."""
        return next(iter(self.entries.values())).shape[2]


def entry_size(config: ModelConfig) -> int:
    """Numbers kept per token and layer: `kv_lora_rank + qk_rope_head_dim`."""
    return config.attention.kv_lora_rank + config.attention.qk_rope_head_dim
