"""Rotary position embedding and its YaRN extension (facts: section 4.3 of the report; arXiv 2309.00071).

Rotation is half-split: dimension i is paired with i + R/2. Published DeepSeek weights pair neighbours instead;
`interop` permutes their rotary rows once, which leaves every dot product as it was.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import AttentionConfig, YarnConfig


def yarn_ramp(yarn: YarnConfig, rope_dim: int, theta: float) -> tuple[int, int]:
    """The range of frequency indices over which YaRN goes from keeping a frequency to dividing it; V3: (10, 23)."""

    def index_of(rotations: float) -> float:
        """The (fractional) index of the frequency that turns `rotations` times over the original context."""
        return rope_dim * math.log(yarn.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(index_of(yarn.beta_fast)), 0)
    high = min(math.ceil(index_of(yarn.beta_slow)), rope_dim - 1)
    return low, high


def rope_frequencies(config: AttentionConfig) -> np.ndarray:
    """Radians per position for each of the R/2 rotated pairs, float64 `[R/2]`."""
    rope_dim, theta = config.qk_rope_head_dim, config.rope_theta
    frequencies = theta ** (-np.arange(0, rope_dim, 2, dtype=np.float64) / rope_dim)
    if config.yarn is None:
        return frequencies
    low, high = yarn_ramp(config.yarn, rope_dim, theta)
    ramp = np.clip((np.arange(rope_dim // 2) - low) / max(high - low, 1e-3), 0, 1)
    return frequencies * (1 - ramp) + frequencies / config.yarn.factor * ramp


def yarn_mscale(factor: float, mscale: float) -> float:
    """`0.1 * mscale * ln(factor) + 1`, YaRN's attention temperature."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(config: AttentionConfig) -> float:
    """What attention scores are multiplied by: 1/sqrt(head size), times YaRN's factor squared (V3: 0.135234)."""
    scale = config.qk_head_dim**-0.5
    if config.yarn is not None and config.yarn.mscale_all_dim:
        scale *= yarn_mscale(config.yarn.factor, config.yarn.mscale_all_dim) ** 2
    return scale


def rope_tables(config: AttentionConfig, positions: jax.Array, dtype=jnp.float32) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotation angles: positions `[...]` -> two arrays `[..., R/2]`."""
    dtype = jnp.promote_types(dtype, jnp.float32)
    angles = positions[..., None].astype(dtype) * jnp.asarray(rope_frequencies(config), dtype)
    length_scale = 1.0
    if config.yarn is not None:
        yarn = config.yarn
        length_scale = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    return jnp.cos(angles) * length_scale, jnp.sin(angles) * length_scale


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the last dimension of x `[..., R]` by tables that broadcast against `[..., R/2]`; keeps x's dtype."""
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
