"""What an MoE layer and a dispatcher say to each other. T tokens, K choices per token, D model, E experts.

A dispatcher brings tokens to the experts that they chose, and the experts' outputs back:

    plans, traffic = dispatcher.plan(experts)
    for plan in plans:
        inputs = dispatcher.dispatch(x, weights, plan)
        y += dispatcher.combine(my_experts(inputs), inputs.handle)

Plans are made of integers and made once: the backward pass of dispatch is a combine and that of combine a dispatch,
with the same indices. Combine weights travel with their rows and multiply an expert's hidden activations, so that
combining is a plain sum whose backward pass needs no expert outputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax

NO_EXPERT = -1
"""In a table of chosen experts, a choice that goes nowhere: padding tokens choose none."""


class Dispatched(NamedTuple):
    """Rows grouped by the experts of this device: what `ops.grouped_matmul` wants."""

    rows: jax.Array
    """`[M, D]`: one group per expert, each starting at a multiple of the dispatcher's alignment; padding is zero."""
    weights: jax.Array
    """`[M]`: the combine weight of each row, 0 for padding."""
    group_sizes: jax.Array
    """int32 `[experts of this device]`: rows of each group, padding not counted."""
    handle: Any
    """What `combine` needs to bring the rows back."""


class Traffic(NamedTuple):
    """What one layer's dispatch meant for this device; every leaf int32. H hops: 0 where all experts are local."""

    received: jax.Array
    """Scalar: rows that this device's experts compute."""
    crossed: jax.Array
    """`[H]`: rows that this device sends to other devices, by hop. As many come back when outputs are combined."""
    lost: jax.Array
    """Scalar: rows that found no room. Unless it is 0 on every device, what was computed is void."""
    demand: jax.Array
    """`[H + 1]`: the most rows that one destination of each hop is sent, and the rows of the local experts: what
    capacities of one round would have to be."""


class Dispatcher(Protocol):
    """Static and hashable; its methods are per-device code."""

    @property
    def alignment(self) -> int:
        """Groups of rows start at multiples of this."""
        ...

    def plan(self, experts: jax.Array) -> tuple[tuple[Any, ...], Traffic]:
        """Where every row goes, for the choices int32 `[T, K]` of this device's tokens (or `NO_EXPERT`).

        One plan for each round: dispatch, experts and combine follow each other as often, with a part of the tokens
        each.
        """
        ...

    def dispatch(self, x: jax.Array, weights: jax.Array, plan: Any) -> Dispatched:
        """The rows that this device's experts compute in a round, of tokens `[T, D]` with weights `[T, K]`."""
        ...

    def combine(self, outputs: jax.Array, handle: Any) -> jax.Array:
        """The sum of the outputs `[M, D]` of a round over each token's choices, back where it came from: `[T, D]`."""
        ...
