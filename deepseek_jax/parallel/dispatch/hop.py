"""One hop: every device sends each of its rows once to each device along a mesh axis that has an expert of it.

T rows here, K choices per row, R devices along the axis, C rows of room for each. Buffers are static, `[R * C, ...]`:
rows go out in the order of their tokens, and what does not fit waits for the next round, or is counted as lost.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.parallel.dispatch.interface import NO_EXPERT
from deepseek_jax.parallel.dispatch.rows import sum_rows, take_rows


class Queue(NamedTuple):
    """Which rows go where, and in what order. J = min(K, R) columns: a row has at most so many destinations."""

    destination: jax.Array
    """int32 `[T, J]`: a device along the axis."""
    position: jax.Array
    """int32 `[T, J]`: how many rows go there before this one; -1 where this one does not."""
    counts: jax.Array
    """int32 `[R]`: rows for each device."""


class Leg(NamedTuple):
    """The rows of one round."""

    rows: jax.Array
    """int32 `[R * C]`: the row in each slot of the buffer, or T for an empty slot."""
    slots: jax.Array
    """int32 `[T, J]`: the slots of each row, or R * C for none."""
    lost: Any = 0
    """int32 scalar: rows whose turn it is, and for which there is no room."""
    route: Any = None
    """What another kind of exchange needs besides."""


@dataclasses.dataclass(frozen=True)
class Hop:
    """An exchange along `axes`, whose `size` devices have `experts` each, with room for `capacity` rows for each."""

    axes: str | tuple[str, ...]
    size: int
    experts: int
    capacity: int

    @property
    def received(self) -> int:
        """Rows that may come here in a round."""
        return self.size * self.capacity

    def holds(self, sent: float, pairs: float) -> bool:
        """Whether there is room in a round for `sent` rows to any one destination, of rows that hold `pairs` there."""
        del pairs
        return self.capacity >= sent

    def with_room(self, capacity: int) -> Hop:
        """The same hop with room for `capacity` rows from every device to every other."""
        return dataclasses.replace(self, capacity=capacity)

    def queue(self, experts: jax.Array) -> Queue:
        """Lines up rows with choices int32 `[T, K]`, numbered over all experts of the axis, or `NO_EXPERT`."""
        choice = jnp.where(experts < 0, self.size, experts // self.experts)
        wanted = (choice[:, :, None] == jnp.arange(self.size)).any(axis=1)
        before = jnp.cumsum(wanted, axis=0, dtype=jnp.int32) - wanted
        counts = wanted.sum(axis=0, dtype=jnp.int32)
        if self.size <= experts.shape[1]:
            destination = jnp.broadcast_to(jnp.arange(self.size, dtype=jnp.int32), wanted.shape)
            return Queue(destination, jnp.where(wanted, before, -1), counts)
        earlier = jnp.tril(jnp.ones((experts.shape[1],) * 2, bool), -1)
        again = ((choice[:, :, None] == choice[:, None, :]) & earlier).any(axis=2)
        destination = jnp.minimum(choice, self.size - 1).astype(jnp.int32)
        position = jnp.take_along_axis(before, destination, axis=1)
        return Queue(destination, jnp.where(again | (choice == self.size), -1, position), counts)

    def leg(self, queue: Queue, round: int = 0) -> Leg:
        """The rows whose turn it is in a round."""
        room = self.received
        turn = queue.position - round * self.capacity
        goes = (queue.position >= 0) & (turn >= 0) & (turn < self.capacity)
        slots = jnp.where(goes, queue.destination * self.capacity + turn, room)
        tokens = queue.position.shape[0]
        token = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[:, None], slots.shape)
        rows = jnp.full(room, tokens, jnp.int32).at[slots.reshape(-1)].set(token.reshape(-1), mode="drop")
        return Leg(rows, slots)

    def crossing(self, queue: Queue) -> jax.Array:
        """How many rows leave this device, in all rounds together."""
        return queue.counts.sum(dtype=jnp.int32) - queue.counts[lax.axis_index(self.axes)]

    def left(self, queue: Queue, rounds: int = 1) -> jax.Array:
        """How many rows still wait after so many rounds."""
        return jnp.maximum(queue.counts - rounds * self.capacity, 0).sum(dtype=jnp.int32)

    def send_choices(self, experts: jax.Array, leg: Leg) -> jax.Array:
        """The choices int32 `[R * C, K]` of the rows that come here, numbered over this device's experts alone."""
        received = self.there(take_rows(experts, leg.rows, fill=NO_EXPERT), leg, fill=NO_EXPERT)
        mine = received - lax.axis_index(self.axes) * self.experts
        return jnp.where((received >= 0) & (mine >= 0) & (mine < self.experts), mine, NO_EXPERT)

    def send(self, x: jax.Array, leg: Leg) -> jax.Array:
        """Rows `[T, ...]` to those that come here `[R * C, ...]`, zero in empty slots. Without a derivative."""
        return self.there(take_rows(x, leg.rows), leg)

    def bring_back(self, y: jax.Array, leg: Leg, dtype: Any = None) -> jax.Array:
        """Rows `[R * C, ...]` to the sum over each row's destinations `[T, ...]`, of a dtype. Without a derivative."""
        return sum_rows(self.back(y, leg).astype(dtype or y.dtype), leg.slots)

    def there(self, x: jax.Array, leg: Leg, fill: int = 0) -> jax.Array:
        """The exchange of buffers: slot c for device r becomes slot c of this device there. No row holds `fill`."""
        del leg, fill  # every slot is sent, the empty ones as they are
        return lax.all_to_all(x, self.axes, split_axis=0, concat_axis=0, tiled=True)

    def back(self, y: jax.Array, leg: Leg) -> jax.Array:
        """The transpose of `there`."""
        return self.there(y, leg)
