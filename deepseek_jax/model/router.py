"""The router: which experts a token goes to, with what weight (section 2.1.2, equations 12-16).

T tokens, E experts, K experts per token, G groups. Scores and selection are float32 or wider whatever the compute
dtype: one flipped choice changes everything after it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import MoEConfig


class Routing(NamedTuple):
    """Where each token goes."""

    experts: jax.Array
    """int32 `[T, K]`: the chosen experts."""
    weights: jax.Array
    """float32 `[T, K]`: what each chosen expert's output is multiplied by. Carries the router's gradient."""


def router_scores(logits: jax.Array, config: MoEConfig) -> jax.Array:
    """Affinities `[T, E]` of logits `[T, E]`: sigmoid (V3) or softmax (V2)."""
    if config.score_function == "sigmoid":
        return jax.nn.sigmoid(logits)
    return jax.nn.softmax(logits, axis=-1)


def select_experts(scores: jax.Array, bias: jax.Array | None, config: MoEConfig) -> jax.Array:
    """The K experts of each token, int32 `[T, K]`: top-K of the biased scores within the best groups.

    The bias steers selection only. Groups that are not kept are masked with −inf, not 0: biased scores may be
    negative. Ties go to the lower index, as `lax.top_k` orders them.
    """
    biased = lax.stop_gradient(scores)
    if bias is not None:
        biased = biased + lax.stop_gradient(bias)
    if config.groups_per_token < config.num_groups:
        biased = jnp.where(_kept_groups(biased, config), biased, -jnp.inf)
    return lax.top_k(biased, config.experts_per_token)[1]


def _kept_groups(biased: jax.Array, config: MoEConfig) -> jax.Array:
    """bool `[T, E]`: experts whose group is among the token's best `groups_per_token`."""
    tokens = biased.shape[0]
    grouped = biased.reshape(tokens, config.num_groups, config.experts_per_group)
    if config.group_score == "top2_sum":
        group_scores = lax.top_k(grouped, 2)[0].sum(axis=-1)
    else:
        group_scores = grouped.max(axis=-1)
    groups = lax.top_k(group_scores, config.groups_per_token)[1]
    kept = (groups[..., None] == jnp.arange(config.num_groups)).any(axis=1)
    return jnp.repeat(kept, config.experts_per_group, axis=1)


def balanced_experts(tokens: int, config: MoEConfig) -> jax.Array:
    """Experts int32 `[T, K]` in turn, whatever the scores, within each token's limit of groups.

    All get the same where K is a multiple of the groups of a token, as in every published model, and T of all turns.
    For benchmarks, whose routing would else be that of a model that was not trained.
    """
    groups = min(config.groups_per_token, config.experts_per_token)
    token = jnp.arange(tokens, dtype=jnp.int32)[:, None]
    choice = jnp.arange(config.experts_per_token, dtype=jnp.int32)
    # Neighbours visit other groups, a token's own lie apart, and members of a group follow each other.
    group = (token + choice % groups * (config.num_groups // groups)) % config.num_groups
    visits = -(-config.experts_per_token // groups)
    member = (token // config.num_groups * visits + choice // groups) % config.experts_per_group
    return group * config.experts_per_group + member


def combine_weights(scores: jax.Array, experts: jax.Array, config: MoEConfig) -> jax.Array:
    """Weights `[T, K]` of the chosen experts: their unbiased scores, renormalised (V3), times the routed scale."""
    # A one-hot product instead of a gather: its transpose is dense and exact, where a scatter-add would be slow.
    chosen = experts[..., None] == jnp.arange(scores.shape[-1])
    weights = jnp.where(chosen, scores[:, None, :], 0).sum(axis=-1)
    if config.normalize_weights:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return weights * config.routed_scale


def expert_load(experts: jax.Array, num_experts: int, valid: jax.Array | None = None) -> jax.Array:
    """int32 `[E]`: how many (token, choice) pairs of `experts` `[T, K]` each expert gets; invalid tokens count 0."""
    chosen = experts[..., None] == jnp.arange(num_experts)
    if valid is not None:
        chosen = chosen & valid[:, None, None]
    return chosen.sum(axis=(0, 1), dtype=jnp.int32)


def sequence_balance_loss(
    scores: jax.Array, experts: jax.Array | None, config: MoEConfig, valid: jax.Array | None = None
) -> jax.Array:
    """Sum over sequences of Σ_i f_i P_i (equations 17-20), without its factor alpha: a scalar.

    Args:
      scores: affinities `[B, S, E]`.
      experts: chosen experts `[B, S, K]` to take the fractions f from; None takes them from the top-K of the raw
        scores, as the paper writes it.
      valid: bool `[B, S]`; padding tokens count in neither f nor P.

    The gradient flows through P only.
    """
    if experts is None:
        experts = lax.top_k(lax.stop_gradient(scores), config.experts_per_token)[1]
    chosen = experts[..., None] == jnp.arange(config.num_experts)
    probabilities = scores / scores.sum(axis=-1, keepdims=True)
    if valid is None:
        tokens = jnp.asarray(scores.shape[1], scores.dtype)
    else:
        chosen = chosen & valid[..., None, None]
        probabilities = probabilities * valid[..., None]
        tokens = jnp.maximum(valid.sum(axis=1), 1).astype(scores.dtype)[:, None]
    counts = chosen.sum(axis=(1, 2), dtype=jnp.int32).astype(scores.dtype)
    fractions = counts * config.num_experts / (config.experts_per_token * tokens)
    return (lax.stop_gradient(fractions) * probabilities.sum(axis=1) / tokens).sum()
