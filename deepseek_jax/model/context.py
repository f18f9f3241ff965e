"""What a layer needs besides its parameters and its input."""

from __future__ import annotations

import dataclasses

import jax

from deepseek_jax.parallel.dispatch import Dispatcher


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerContext:
    """The same for every layer of a microbatch. B rows, S tokens, R rotary dimensions."""

    cos: jax.Array
    """`[B, S, R/2]` cosines of the rotary angles, float32 or wider."""
    sin: jax.Array
    """`[B, S, R/2]` sines of the rotary angles."""
    dispatcher: Dispatcher = dataclasses.field(metadata={"static": True})
    """How tokens reach their experts."""
    segment_ids: jax.Array | None = None
    """int32 `[B, S]`; when given, attention stays within equal segments."""
    valid: jax.Array | None = None
    """bool `[B, S]`; False marks padding, which goes to no routed expert and counts in no balance loss."""
    balance_from_routed: bool = dataclasses.field(default=False, metadata={"static": True})
    """Take the balance loss's fractions from the routed experts, not from the top-K of the raw scores."""
    force_balance: bool = dataclasses.field(default=False, metadata={"static": True})
    """Choose experts in turn, whatever the scores say: for benchmarks."""
