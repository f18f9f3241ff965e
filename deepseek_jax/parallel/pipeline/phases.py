"""Which of a rank's slots is which *phase*.

In the steady ticks of a schedule of two slots, one rank does the forward of its first slot when its neighbour does
that of its second. Phase 0 is the slot that a rank begins its steady ticks with, so in each of them all ranks work on
weights of the same phase, and the program need not choose. Without steady ticks phases are slots.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.parallel.pipeline.arrays import choose, joined, where
from deepseek_jax.parallel.pipeline.evaluate import rows_of
from deepseek_jax.parallel.pipeline.schedule import StageMap
from deepseek_jax.tree import Tree

Phase = int | jax.Array
"""A number where it is known beforehand, or an int32 scalar."""


class Phases:
    """The slots of this rank, inside `shard_map`."""

    def __init__(self, stages: StageMap, flip: jax.Array | None):
        """`flip`: int32 scalar, the slot of phase 0 of two, or None where phases are slots."""
        self._stages, self._flip = stages, flip

    def of(self, slot: jax.Array) -> Phase:
        """The phase of a slot; of no slot (-1) any."""
        if self._stages.slots == 1:
            return 0
        slot = jnp.maximum(slot, 0)
        return slot if self._flip is None else slot ^ self._flip

    def copies(self, stacks: Tree) -> tuple[Tree, ...]:
        """Per phase the stacks `[layers, ...]` that it works with, from those that the rank keeps.

        A rank keeps the stacks of all its slots, one after the other. Where two directions share the model, it keeps
        those of its first slot, and has those of its second from the rank that keeps them.
        """
        count = self._stages.slots
        if self._stages.copies == 2:
            return self._by_phase((stacks, self._mirrored(stacks)))
        part = lambda leaf, slot: leaf.reshape(count, leaf.shape[0] // count, *leaf.shape[1:])[slot]  # noqa: E731
        return self._by_phase(tuple(jax.tree.map(functools.partial(part, slot=slot), stacks) for slot in range(count)))

    def home(self, by_phase: tuple, add: Callable[[Any, Any], Any]) -> Any:
        """The way back, for what was summed over each phase's work; `add` joins the sums of two copies."""
        by_slot = self._by_phase(by_phase)
        return add(by_slot[0], self._mirrored(by_slot[1])) if self._stages.copies == 2 else joined(by_slot)

    def sums_home(self, stacks: Tree) -> Tree:
        """The way back of sums that are stacked by phase, `[phases, layers, ...]`.

        Leaf after leaf: of two directions, what is sent and what comes is as large as half of all sums. One leaf at a
        time it is as large as that.
        """
        leaves, tree = jax.tree.flatten(stacks)
        found: list[jax.Array] = []
        for leaf in leaves:
            if found:
                leaf, found[-1] = lax.optimization_barrier((leaf, found[-1]))
            found.append(self._sum_home(leaf))
        return jax.tree.unflatten(tree, found)

    def _sum_home(self, leaf: jax.Array) -> jax.Array:
        slots = self._stages.slots
        if slots == 1 or (self._flip is None and self._stages.copies == 1):
            return leaf.reshape(-1, *leaf.shape[2:])
        phases = [slot if self._flip is None else slot ^ self._flip for slot in range(slots)]
        by_slot = [lax.dynamic_index_in_dim(leaf, phase, keepdims=False) for phase in phases]
        return by_slot[0] + self._mirrored(by_slot[1]) if self._stages.copies == 2 else jnp.concatenate(by_slot)

    def added(self, totals: tuple, phase: Phase, tree: Any, add: Callable[[Any, Any], Any]) -> tuple:
        """Per-phase totals with a tree added to one of them."""
        known = isinstance(phase, int)
        return tuple(
            (add(total, tree) if phase == number else total) if known else add(total, where(phase == number, tree))
            for number, total in enumerate(totals)
        )

    def pick(self, by_phase: Sequence[Any] | Tree, phase: Phase) -> Any:
        """One phase's, of a sequence or, as rows, of stacked arrays `[phases, ...]`."""
        if not isinstance(by_phase, Sequence):
            return rows_of(by_phase, phase)
        return by_phase[phase] if isinstance(phase, int) else choose(phase, by_phase)

    def _by_phase(self, by_slot: tuple) -> tuple:
        """By slot to by phase, and back."""
        if self._flip is None:
            return by_slot
        return choose(self._flip, by_slot), choose(1 - self._flip, by_slot)

    @jax.named_scope("mirror")
    def _mirrored(self, tree: Tree) -> Tree:
        """Between the two ranks that have the same two stages."""
        last = self._stages.ranks - 1
        return jax.tree.map(lambda leaf: lax.ppermute(leaf, "pipe", [(r, last - r) for r in range(last + 1)]), tree)
