"""How the next token is drawn from logits: greedy, temperature, top-p. B rows, V vocabulary."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; the default is greedy."""

    temperature: float = 0.0
    """What logits are divided by; 0 takes the most likely token, the first of equals."""
    top_p: float = 1.0
    """Draw from the smallest set of most likely tokens that holds at least this much probability."""
    seed: int = 0
    """Equal seeds draw equal tokens for equal prompts."""

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"sampling.temperature must be 0 (greedy) or a positive number, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"sampling.seed must be from 0 to 2**32 - 1, not {self.seed}")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken: temperatures that float32 cannot tell from 0 are 0."""
        return self.temperature < float(np.finfo(np.float32).tiny)


def top_p_mask(logits: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """bool `[..., V]`: the smallest set of most likely tokens of logits `[..., V]` with probability at least `top_p`.

    Of equally likely tokens the lower ids come first, and no more of them are kept than needed.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    falling = -jnp.sort(-probabilities, axis=-1)
    # A token is needed if those before it do not reach top_p; rounding must not lose the tail at top_p = 1.
    needed = (jnp.cumsum(falling, axis=-1) - falling < top_p) | (jnp.asarray(top_p) >= 1)
    count = jnp.maximum(needed.sum(axis=-1, keepdims=True), 1)
    # Back to token order by the least probability that is needed, without a scatter, which is slow.
    least = jnp.take_along_axis(falling, count - 1, axis=-1)
    above, equal = probabilities > least, probabilities == least
    return above | (equal & (jnp.cumsum(equal, axis=-1) <= count - above.sum(axis=-1, keepdims=True)))


def draw(logits: jax.Array, keys: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """One token per row, int32 `[B]`, of logits `[B, V]` by keys `[B]`; `temperature` must be positive."""
    # The maximum is taken off first: a small temperature then makes -inf of the others, not inf of them all.
    logits = (logits - logits.max(axis=-1, keepdims=True)) / temperature
    logits = jnp.where(top_p_mask(logits, top_p), logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def greedy(logits: jax.Array) -> jax.Array:
    """The most likely token of each row of logits `[B, V]`, int32 `[B]`; the lowest id among equals."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
