"""A cut of least capacity through a directed graph."""

from __future__ import annotations

import collections
from collections.abc import Hashable, Iterable, Sequence
from typing import Any


def min_cut(edges: Iterable[tuple[Hashable, Hashable, float]], source: Hashable, sink: Hashable) -> set[Any]:
    """The nodes on the source's side of a cut of least capacity, by Edmonds and Karp's shortest augmenting paths.

    Where cuts are equal it is the one nearest to the source.

    Args:
      edges: `(from, to, capacity)`; those between the same nodes add up, and `math.inf` is never cut. Every path from
        the source to the sink must have an edge of finite capacity.
    """
    left: dict[Hashable, dict[Hashable, float]] = collections.defaultdict(lambda: collections.defaultdict(int))
    for begin, end, capacity in edges:
        left[begin][end] += capacity
        left[end][begin] += 0
    while path := _shortest_path(left, source, sink):
        amount = min(left[begin][end] for begin, end in path)
        for begin, end in path:
            left[begin][end] -= amount
            left[end][begin] += amount
    return set(_reached(left, source, sink))


def _shortest_path(left: Any, source: Hashable, sink: Hashable) -> Sequence[tuple[Hashable, Hashable]]:
    came_from = _reached(left, source, sink)
    path: list[tuple[Hashable, Hashable]] = []
    node = sink
    while node != source:
        if node not in came_from:
            return ()
        path.append((came_from[node], node))
        node = came_from[node]
    return path


def _reached(left: Any, source: Hashable, sink: Hashable) -> dict[Hashable, Hashable]:
    """The nodes reached through what is left of the edges, up to the sink -> the node before each."""
    came_from: dict[Hashable, Hashable] = {source: source}
    queue = collections.deque([source])
    while queue and sink not in came_from:
        node = queue.popleft()
        for end, capacity in left[node].items():
            if capacity > 0 and end not in came_from:
                came_from[end] = node
                queue.append(end)
    return came_from
