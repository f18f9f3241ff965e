"""The steady run of a schedule's tables: ticks so alike that a program needs neither a branch nor a spare transfer.

In them every rank does a forward and a full backward of slots that are known beforehand, so the program's body is
straight-line code. And no rank receives two activations, or two gradients, in one tick, so that one permutation carries
a tick's activations, and another its gradients, instead of one to each side. NumPy only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Pairs = tuple[tuple[int, int], ...]
"""(source, destination) ranks."""


class Steady(NamedTuple):
    """A run of ticks that repeat a pattern of `period` ticks; tick start + i follows tick i % period of it."""

    start: int
    """First tick."""
    end: int
    """Tick after the last; end - start is a multiple of period."""
    period: int
    """Ticks after which the pattern repeats: 1 with one slot; 2 for DualPipe, whose slots take turns."""
    f_slot: np.ndarray
    """int32 `[period, P]`: the slot of each rank's F."""
    b_slot: np.ndarray
    """int32 `[period, P]`: the slot of each rank's B and W."""
    embed: tuple[bool, ...]
    """Per tick of the pattern, whether the embedding works in it, for any direction."""
    head: tuple[bool, ...]
    """The same of the head."""
    embed_gradient: tuple[bool, ...]
    """The same of the embedding's gradient."""
    x_sends: tuple[Pairs, ...]
    """Per tick of the pattern, who sends its F's output to whom: exactly what is stored, no rank twice on a side."""
    dx_sends: tuple[Pairs, ...]
    """The same of the input gradients of B."""
    x_row: np.ndarray
    """int32 `[end - start, P]`: the row of `activation` for what arrives at the end of each tick, or scratch."""
    dx_row: np.ndarray
    """The same for `gradient`."""


class Tick(NamedTuple):
    """What is known of a steady tick before the program runs."""

    phase_f: int
    phase_b: int
    embed: bool
    head: bool
    embed_gradient: bool
    x_sends: Pairs
    dx_sends: Pairs


class _Arrivals(NamedTuple):
    """What is stored at the end of each tick."""

    sends: list[Pairs | None]
    """None where a rank sends to two, or receives from two."""
    rows: np.ndarray
    """int32 `[T, P]`: the row of the one value, or scratch."""


def find_steady(columns: Mapping[str, np.ndarray], *, slots: int, activation: int, gradient: int) -> Steady | None:
    """The longest steady run, and of equally long ones that with the shortest period, then the first.

    Args:
      columns: of `TickTables`, `[T, P]` or `[T, directions]`.
      slots: stages of a rank; periods up to twice as many ticks are tried.
      activation: the scratch row of the ring `activation`.
      gradient: the same of `gradient`.

    Returns:
      None where not even one period of ticks is steady.
    """
    x = _arrivals(columns, "x", activation)
    dx = _arrivals(columns, "dx", gradient)
    kinds = _kinds(columns, x, dx)
    found = [(*_longest(kinds, period), period) for period in range(1, 2 * slots + 1)]
    length, start, period = max(found, key=lambda run: (run[0], -run[2]))
    if not length:
        return None
    end, pattern = start + length, range(start, start + period)

    def sends(arrivals: _Arrivals) -> tuple[Pairs, ...]:
        return tuple(arrivals.sends[tick] or () for tick in pattern)

    def works(name: str) -> tuple[bool, ...]:
        return tuple(bool((columns[name][tick] >= 0).any()) for tick in pattern)

    return Steady(
        start,
        end,
        period,
        columns["f_slot"][start : start + period],
        columns["b_slot"][start : start + period],
        works("embed"),
        works("head"),
        works("embed_gradient"),
        sends(x),
        sends(dx),
        x.rows[start:end],
        dx.rows[start:end],
    )


def known_ticks(steady: Steady | None, slots: int) -> tuple[Tick, ...]:
    """The ticks of a pattern, where all ranks work on weights of the same phase (`phases.py`) in each; else none."""
    if steady is None:
        return ()
    flip = steady.f_slot[0] if slots == 2 else 0
    ticks = []
    for place in range(steady.period):
        phase_f, phase_b = ({int(slot) for slot in of[place] ^ flip} for of in (steady.f_slot, steady.b_slot))
        if len(phase_f) > 1 or len(phase_b) > 1:
            return ()
        ends = (steady.embed[place], steady.head[place], steady.embed_gradient[place])
        ticks.append(Tick(phase_f.pop(), phase_b.pop(), *ends, steady.x_sends[place], steady.dx_sends[place]))
    return tuple(ticks)


def _arrivals(columns: Mapping[str, np.ndarray], what: str, scratch: int) -> _Arrivals:
    """Of `x` or `dx`: one list of pairs for the columns of all three sides."""
    shape = columns["f_slot"].shape
    pairs: list[list[tuple[int, int]]] = [[] for _ in range(shape[0])]
    rows = np.full(shape, scratch, np.int32)
    for side, away in (("left", -1), ("self", 0), ("right", 1)):
        column = columns[f"{what}_from_{side}"]
        stored = column != scratch
        rows[stored] = column[stored]
        for tick, rank in np.argwhere(stored).tolist():
            pairs[tick].append(((rank + away) % shape[1], rank))

    def once(ranks: Sequence[int]) -> bool:
        return max(Counter(ranks).values(), default=1) == 1

    sends = [
        tuple(sorted(of_tick)) if once([s for s, _ in of_tick]) and once([d for _, d in of_tick]) else None
        for of_tick in pairs
    ]
    return _Arrivals(sends, rows)


def _kinds(columns: Mapping[str, np.ndarray], x: _Arrivals, dx: _Arrivals) -> list[int]:
    """One number per tick, equal for ticks that one body can run; -1 where a tick cannot be steady."""
    full = np.all((columns["f_slot"] >= 0) & (columns["b_slot"] >= 0) & (columns["w_own"] > 0), axis=1)
    number: dict[tuple, int] = {}
    kinds = []
    for tick, (is_full, x_sends, dx_sends) in enumerate(zip(full.tolist(), x.sends, dx.sends, strict=True)):
        if not is_full or x_sends is None or dx_sends is None:
            kinds.append(-1)
            continue
        slots = tuple(tuple(columns[name][tick].tolist()) for name in ("f_slot", "b_slot"))
        ends = tuple(tuple((columns[name][tick] >= 0).tolist()) for name in ("embed", "head", "embed_gradient"))
        kinds.append(number.setdefault((slots, ends, x_sends, dx_sends), len(number)))
    return kinds


def _longest(kinds: Sequence[int], period: int) -> tuple[int, int]:
    """(ticks, first tick) of the longest run that repeats after `period` ticks, in whole periods; or (0, 0)."""
    best = (0, 0)
    steady = repeating = 0  # how many ticks from here on are steady, and equal to the one a period later
    for tick in reversed(range(len(kinds))):
        steady = steady + 1 if kinds[tick] >= 0 else 0
        repeats = steady > period and kinds[tick] == kinds[tick + period]
        repeating = repeating + 1 if repeats else 0
        length = min(steady, repeating + period)
        length -= length % period
        if length and length >= best[0]:
            best = (length, tick)
    return best
