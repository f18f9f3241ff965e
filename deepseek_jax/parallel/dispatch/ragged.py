"""The hop of GPUs with `ragged_all_to_all`: rows are packed, so no empty slot travels. XLA's CPU backend has none."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.parallel.dispatch.hop import Hop, Leg, Queue


class Route(NamedTuple):
    """Four int32 `[R]` tables by the other device, and the same for the way back."""

    from_row: jax.Array
    """Where the rows for it begin in the packed buffer here."""
    send_rows: jax.Array
    to_row: jax.Array
    """Where they begin in the buffer of what comes there."""
    receive_rows: jax.Array
    back_from_row: jax.Array
    back_to_row: jax.Array


@dataclasses.dataclass(frozen=True)
class RaggedHop(Hop):
    """A hop whose receivers have room for `total` rows from all devices together.

    `capacity` still bounds the rows from one device to another in a round.
    """

    total: int = 0

    @property
    def received(self) -> int:
        """Rows that may come here in a round."""
        return self.total

    def holds(self, sent: float, pairs: float) -> bool:
        """Whether there is room in a round for `sent` rows to any one destination, of rows that hold `pairs` there."""
        return self.capacity >= sent and self.total >= pairs  # no row holds less than one

    def with_room(self, capacity: int) -> RaggedHop:
        """The same hop with room for `capacity` rows from every device to every other."""
        return dataclasses.replace(self, capacity=capacity, total=capacity * self.size)

    def leg(self, queue: Queue, round: int = 0) -> Leg:
        """The rows whose turn it is in a round, packed in the order of their destinations; counts are exchanged."""
        counts = jnp.clip(queue.counts - round * self.capacity, 0, self.capacity)
        begin = jnp.cumsum(counts) - counts
        turn = queue.position - round * self.capacity
        goes = (queue.position >= 0) & (turn >= 0) & (turn < self.capacity)
        tokens, columns = queue.position.shape
        room = min(tokens * columns, self.capacity * self.size)
        slots = jnp.where(goes, begin[queue.destination] + turn, room)
        token = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[:, None], slots.shape)
        rows = jnp.full(room, tokens, jnp.int32).at[slots.reshape(-1)].set(token.reshape(-1), mode="drop")
        route, lost = self._route(counts)
        return Leg(rows, slots, lost, route)

    def there(self, x: jax.Array, leg: Leg, fill: int = 0) -> jax.Array:
        """Packed rows `[*, ...]` to what comes here, `[total, ...]`, `fill` in the rows after it."""
        route, output = leg.route, jnp.full_like(x, fill, shape=(self.total, *x.shape[1:]))
        return lax.ragged_all_to_all(
            x, output, route.from_row, route.send_rows, route.to_row, route.receive_rows, axis_name=self.axes
        )

    def back(self, y: jax.Array, leg: Leg) -> jax.Array:
        """The transpose of `there`."""
        route, output = leg.route, jnp.zeros_like(y, shape=(leg.rows.shape[0], *y.shape[1:]))
        return lax.ragged_all_to_all(
            y, output, route.back_from_row, route.receive_rows, route.back_to_row, route.send_rows, axis_name=self.axes
        )

    def _route(self, counts: jax.Array) -> tuple[Route, jax.Array]:
        """The tables, and how many rows find no room, from int32 `[R]` rows for every device."""
        table = lax.all_gather(counts, self.axes)  # [from, to], the same everywhere
        me = lax.axis_index(self.axes)
        arrive = jnp.cumsum(table, axis=0) - table
        fitting = jnp.clip(self.total - arrive, 0, table)
        depart = jnp.cumsum(table, axis=1) - table
        lost = (table[me] - fitting[me]).sum(dtype=jnp.int32)
        route = Route(
            from_row=depart[me],
            send_rows=fitting[me],
            to_row=jnp.minimum(arrive[me], self.total),
            receive_rows=fitting[:, me],
            back_from_row=jnp.minimum(arrive[:, me], self.total),
            back_to_row=depart[:, me],
        )
        return route, lost
