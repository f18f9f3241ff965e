"""Experts spread over devices: tokens go to them by one hop over all devices, or by one to the node and one within it.

With one hop (`all_to_all`) a token is sent once to each device that has an expert of it. With two (`two_hop`, section
3.2.2) it crosses once to each of its nodes, to the device there that has its own place within the node, and fans out
from there; outputs are summed within the node before they cross back. Either way it carries its experts and weights.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.parallel.dispatch.hop import Hop, Leg
from deepseek_jax.parallel.dispatch.interface import Dispatched, Traffic
from deepseek_jax.parallel.dispatch.local import Grouping, gather_tokens, gather_weights, group, sum_choices
from deepseek_jax.parallel.dispatch.travel import travel, travel_back


class RoundPlan(NamedTuple):
    """Where the rows of one round go."""

    legs: tuple[Leg, ...]
    """One per hop."""
    grouping: Grouping
    """Of what comes here, by expert."""
    sizes: jax.Array
    """int32: rows of each local expert."""


@dataclasses.dataclass(frozen=True)
class ExchangeDispatcher:
    """Static buffers, as many rounds as there are to be; what fits in none of them is counted in `Traffic.lost`."""

    hops: tuple[Hop, ...]
    """In the order in which a token takes them; the last one's devices hold the local experts."""
    pairs: int
    """Rows that the local experts have room for in a round, alignment not counted."""
    rounds: int = 1
    alignment: int = 1
    wire: Any = None
    """dtype in which rows travel, see `travel`; None: their own. Weights travel as they are."""

    @property
    def room(self) -> tuple[int, ...]:
        """What `Traffic.demand` may come to, over all rounds: rows for one destination of each hop, and rows here."""
        return (*(self.rounds * hop.capacity for hop in self.hops), self.rounds * self.pairs)

    def fits(self, demand: np.ndarray, *, tokens: int | None = None, margin: float = 1.0) -> bool:
        """Whether there is room for `margin` times a demand as `Traffic` has it.

        Rounds take rows as they come, so the first may get all that one round takes of a demand, and not its even
        share. With `tokens` of a device, no more of them count than there are.
        """
        *sent, pairs = margin * demand
        first = self.hops[0]
        limit = float(sent[0]) if tokens is None else min(float(sent[0]), float(tokens))
        share = min(1.0, first.capacity / max(limit, 1.0))  # of all rows, those of one round
        if share * self.rounds < 1:
            return False
        for place, hop in enumerate(self.hops):
            most = min(limit, sent[place] if place else limit)
            if not hop.holds(share * most, share * pairs):
                return False
            limit *= hop.size
        return bool(self.pairs >= share * pairs)

    def plan(self, experts: jax.Array) -> tuple[tuple[RoundPlan, ...], Traffic]:
        """See `Dispatcher`. The choices travel here, and nowhere else."""
        first = self.hops[0]
        queue = first.queue(experts)
        plans, traffic = zip(*(self._plan_round(experts, queue, number) for number in range(self.rounds)), strict=True)
        total = jax.tree.map(lambda *leaves: sum(leaves), *traffic)
        total = total._replace(
            lost=total.lost + first.left(queue, self.rounds),
            crossed=jnp.concatenate([first.crossing(queue)[None], total.crossed]),
            demand=jnp.concatenate([queue.counts.max()[None], total.demand]),
        )
        return jax.tree.map(lambda leaf: checkpoint_name(leaf, "dispatch_plan"), plans), total

    def _plan_round(self, experts: jax.Array, queue, number: int) -> tuple[RoundPlan, Traffic]:
        """One round's plan, and its traffic without what the first hop's queue tells already."""
        legs: list[Leg] = []
        crossed, demand, lost = [], [], jnp.zeros((), jnp.int32)
        for place, hop in enumerate(self.hops):
            if place:
                queue = hop.queue(experts)
                crossed.append(hop.crossing(queue))
                demand.append(queue.counts.max())
                lost += hop.left(queue)
            legs.append(hop.leg(queue, 0 if place else number))
            lost += legs[-1].lost
            experts = hop.send_choices(experts, legs[-1])
        here = self.hops[-1].experts
        grouping, sizes, homeless = group(experts, here, capacity=self.pairs, alignment=self.alignment)
        received = sizes.sum(dtype=jnp.int32)
        as_array = lambda values: jnp.stack(values) if values else jnp.zeros(0, jnp.int32)  # noqa: E731
        traffic = Traffic(received, as_array(crossed), lost + homeless, as_array([*demand, received + homeless]))
        return RoundPlan(tuple(legs), grouping, sizes), traffic

    def dispatch(self, x: jax.Array, weights: jax.Array, plan: RoundPlan) -> Dispatched:
        """See `Dispatcher`."""
        x, weights = travel(x, plan.legs, self.hops, self.wire), travel(weights, plan.legs, self.hops)
        return Dispatched(gather_tokens(x, plan.grouping), gather_weights(weights, plan.grouping), plan.sizes, plan)

    def combine(self, outputs: jax.Array, handle: RoundPlan) -> jax.Array:
        """See `Dispatcher`."""
        return travel_back(sum_choices(outputs, handle.grouping), handle.legs, self.hops, self.wire)
