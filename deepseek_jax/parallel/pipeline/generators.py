"""The known pipeline schedules, each as a `Schedule`.

    schedule              bubble with F, B, W and F&B as costs     activations of a rank
    gpipe                 (P-1)(F+B+W)                             M
    one_f_one_b           (P-1)(F+B+W)                             P
    eager_one_f_one_b     (P-1)(2F&B-F-B-W)                        2P-1
    interleaved_1f1b      (P-1)(F+B+W) of a chunk                  (V+1)P - 1 chunks
    zb_h1                 (P-1)(F+B-W)                             P
    dualpipe              (P/2-1)(F&B+B-2W)                        P+1
    dualpipe_v            (P-1)(F&B+B-2W) of half a stage          2P+1 half stages

B here is the input gradient alone, so a full backward is B + W. Lock-step ticks, in which one program runs all ranks,
are another matter: see `simulate.py`. `interleaved_1f1b` stands for `interleaved_one_f_one_b`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence

from deepseek_jax.config import ConfigError, require
from deepseek_jax.parallel.pipeline.schedule import Cell, Op, Schedule, StageMap


def one_rank(microbatches: int) -> Schedule:
    """Gradient accumulation: every microbatch forward and backward, one after the other, on one rank."""
    cells = [cell for m in range(microbatches) for cell in (_forward(0, m), _backward(0, m))]
    return Schedule("one_rank", StageMap("straight", 1), microbatches, (tuple(cells),))


def gpipe(ranks: int, microbatches: int) -> Schedule:
    """All forward passes, then all backward passes (Huang et al., arXiv 1811.06965)."""

    def cells(rank: int) -> Iterable[Cell]:
        del rank
        yield from (_forward(0, m) for m in range(microbatches))
        yield from (_backward(0, m) for m in range(microbatches))

    return _schedule("gpipe", StageMap("straight", ranks), microbatches, cells)


def one_f_one_b(ranks: int, microbatches: int) -> Schedule:
    """As many forwards ahead as the stages after this one, then one backward for each forward (arXiv 2006.09503)."""
    forwards = [_forward(0, m) for m in range(microbatches)]
    backwards = [[_backward(0, m)] for m in range(microbatches)]

    def cells(rank: int) -> Iterable[Cell]:
        return _in_turn(ranks - 1 - rank, forwards, backwards)

    return _schedule("one_f_one_b", StageMap("straight", ranks), microbatches, cells)


def eager_one_f_one_b(ranks: int, microbatches: int) -> Schedule:
    """1F1B with twice as many forwards ahead, so that in lock step each tick holds a forward and a backward.

    Rank r runs 2(P - r) - 1 forwards before its first backward: no rank waits in the steady state, and a transfer has a
    whole tick to arrive. The price is memory: the first rank stores 2P - 1 microbatches.
    """

    def cells(rank: int) -> Iterable[Cell]:
        ahead = min(microbatches, 2 * (ranks - rank) - 1)
        yield from (_forward(0, m) for m in range(ahead))
        for m in range(microbatches):
            later = ahead + m
            yield (_forward(0, later) if later < microbatches else ()) + _backward(0, m)

    return _schedule("eager_one_f_one_b", StageMap("straight", ranks), microbatches, cells)


def interleaved_one_f_one_b(ranks: int, microbatches: int, chunks: int = 2) -> Schedule:
    """1F1B over V chunks of layers on each rank (Narayanan et al., arXiv 2104.04473, section 2.2).

    Raises:
      ConfigError: the microbatches are not a multiple of the ranks.
    """
    most = microbatches - microbatches % ranks if ranks else 0
    require(
        ranks < 1 or microbatches % ranks == 0,
        f"interleaved_one_f_one_b over {ranks} ranks needs a multiple of {ranks} microbatches, not {microbatches}: use "
        + (f"{most} or " if most else "")
        + f"{most + ranks}",
    )
    stages = StageMap("interleaved", ranks, chunks)

    def step(k: int) -> tuple[int, int]:
        """(chunk, microbatch) of the k-th forward: P microbatches through each chunk, then the next P."""
        group, within = divmod(k, ranks * chunks)
        return within // ranks, group * ranks + within % ranks

    steps = [step(k) for k in range(microbatches * chunks)]
    forwards = [_forward(chunk, m) for chunk, m in steps]
    backwards = [[_backward(chunks - 1 - chunk, m)] for chunk, m in steps]

    def cells(rank: int) -> Iterable[Cell]:
        return _in_turn(2 * (ranks - 1 - rank) + (chunks - 1) * ranks, forwards, backwards)

    return _schedule("interleaved_one_f_one_b", stages, microbatches, cells)


def zb_h1(ranks: int, microbatches: int) -> Schedule:
    """1F1B whose rank r puts its weight gradients off by r backwards, to fill the bubble at the end with them.

    The handcrafted ZB-H1 of Qi et al., arXiv 2401.10241, figure 3: the memory of 1F1B with a third of its bubble.
    """
    forwards = [_forward(0, m) for m in range(microbatches)]

    def cells(rank: int) -> Iterable[Cell]:
        def backward(m: int) -> list[Cell]:
            """Of microbatch m, and the weight gradient that is due after it."""
            if rank == 0:
                return [_backward(0, m)]
            due: list[Cell] = [(Op("W", 0, m - rank),)] if m >= rank else []
            return [(Op("B", 0, m),), *due]

        yield from _in_turn(ranks - 1 - rank, forwards, [backward(m) for m in range(microbatches)])
        if rank:
            yield from ((Op("W", 0, m),) for m in range(max(microbatches - rank, 0), microbatches))

    return _schedule("zb_h1", StageMap("straight", ranks), microbatches, cells)


def dualpipe(ranks: int, microbatches: int) -> Schedule:
    """Two directions at once, a forward of one beside a backward of the other (DeepSeek-V3 tech report, section 3.2.1).

    The order of ops is that of the published implementation (github.com/deepseek-ai/DualPipe).

    Raises:
      ConfigError: odd ranks, odd microbatches, or fewer than two microbatches per rank.
    """
    require(
        ranks >= 2 and ranks % 2 == 0,
        f"dualpipe needs an even number of ranks, not {ranks}: use "
        + (f"{ranks - 1} or {ranks + 1}" if ranks > 2 else "2"),
    )
    stages = StageMap("bidirectional", ranks)
    _require_microbatches("dualpipe", ranks, microbatches, 2 * ranks)
    share = microbatches // 2

    def cells(rank: int) -> Iterable[Cell]:
        near = 0 if rank < ranks // 2 else 1
        starts = {near: near * share, 1 - near: (1 - near) * share}
        return _two_way(ranks // 2, min(rank, ranks - 1 - rank), share - ranks, near, starts)

    return _schedule("dualpipe", stages, microbatches, cells)


def dualpipe_v(ranks: int, microbatches: int) -> Schedule:
    """DualPipe cut in half: one direction through 2P stages folded over P ranks, no stage held twice.

    The order of ops is that of the published implementation (github.com/deepseek-ai/DualPipe, `dualpipev.py`).

    Raises:
      ConfigError: fewer than two microbatches per rank.
    """
    _require_microbatches("dualpipe_v", ranks, microbatches, 2 * ranks)

    def cells(rank: int) -> Iterable[Cell]:
        return _two_way(ranks, rank, microbatches - 2 * ranks, 0, {0: 0, 1: 0})

    return _schedule("dualpipe_v", StageMap("vee", ranks), microbatches, cells)


def _two_way(half: int, h: int, spare: int, near: int, starts: dict[int, int]) -> Iterable[Cell]:
    """The eight steps of DualPipe, and with other numbers of DualPipeV, on one rank.

    Args:
      half: ranks from a direction's first to the middle.
      h: this rank's distance from the end: half - 1 on a middle rank.
      spare: microbatches of a direction beyond the least, 2·half.
      near: the slot whose direction begins on this side.
      starts: per slot its first microbatch.
    """
    far = 1 - near
    outer = half - 1 - h
    next_of = {(kind, slot): start for kind in "FB" for slot, start in starts.items()}
    put_off: list[Op] = []

    def take(kind: str, slot: int) -> int:
        next_of[kind, slot] += 1
        return next_of[kind, slot] - 1

    def f(slot: int) -> Cell:
        return _forward(slot, take("F", slot))

    def b(slot: int, *, whole: bool = True) -> Cell:
        m = take("B", slot)
        if whole:
            return _backward(slot, m)
        put_off.append(Op("W", slot, m))
        return (Op("B", slot, m),)

    def w() -> Cell:
        return (put_off.pop(0),)

    for _ in range(2 * outer):  # 1
        yield f(near)
    for _ in range(h + 1):  # 2
        yield f(near)
        yield f(far)
    for _ in range(outer):  # 3
        yield b(far, whole=False)
        yield w()
        yield f(far)
    for i in range(spare + h + 1):  # 4
        if i == 0 and outer == 0:  # apart, the two shrink the bubble: nothing is there yet that the pair could hide
            yield f(near)
            yield b(far)
        else:
            yield f(near) + b(far)
        yield f(far) + b(near)
    for _ in range(outer):  # 5
        yield b(far)
        yield f(far) + b(near)
    whole = True
    for i in range(h + 1):  # 6
        middle = i == (h + 1) // 2
        whole = whole and not (middle and h % 2 == 1)
        yield b(far, whole=whole)
        whole = whole and not (middle and h % 2 == 0)
        yield b(near, whole=whole)
    for _ in range(outer):  # 7
        yield w()
        yield b(near, whole=False)
    for _ in range(h + 1):  # 8
        yield w()


def _in_turn(ahead: int, forwards: Sequence[Cell], backwards: Sequence[Sequence[Cell]]) -> Iterable[Cell]:
    """`ahead` forwards, then the cells of each backward in turn, a forward before each as long as there are any."""
    ahead = min(ahead, len(forwards))
    yield from forwards[:ahead]
    for k, backward in enumerate(backwards):
        yield from forwards[ahead + k : ahead + k + 1]
        yield from backward


def _forward(slot: int, microbatch: int) -> Cell:
    return (Op("F", slot, microbatch),)


def _backward(slot: int, microbatch: int) -> Cell:
    return (Op("B", slot, microbatch), Op("W", slot, microbatch))


def _schedule(name: str, stages: StageMap, microbatches: int, cells: Callable[[int], Iterable[Cell]]) -> Schedule:
    return Schedule(name, stages, microbatches, tuple(tuple(cells(rank)) for rank in range(stages.ranks)))


def _require_microbatches(name: str, ranks: int, microbatches: int, least: int) -> None:
    ways = f" ({least // 2} each way)" if name == "dualpipe" else ""
    require(
        microbatches >= least,
        f"{name} over {ranks} ranks needs at least {least} microbatches{ways}, not {microbatches}",
    )


GENERATORS: dict[str, Callable[..., Schedule]] = {
    "gpipe": gpipe,
    "one_f_one_b": one_f_one_b,
    "eager_one_f_one_b": eager_one_f_one_b,
    "interleaved_one_f_one_b": interleaved_one_f_one_b,
    "zb_h1": zb_h1,
    "dualpipe": dualpipe,
    "dualpipe_v": dualpipe_v,
}
"""Schedules over several ranks by name, as a recipe or the command line names them: `(ranks, microbatches)`."""


def make_schedule(name: str, ranks: int, microbatches: int, *, chunks: int | None = None) -> Schedule:
    """The schedule of that name; over one rank with `one_rank`, gradient accumulation.

    Args:
      name: a key of `GENERATORS`, or `one_rank`.
      ranks: pipeline ranks.
      microbatches: of a step, both directions together.
      chunks: chunks of layers per rank, of an interleaved schedule only; 2 where left out.

    Raises:
      ConfigError: no such schedule, or it cannot have so many ranks or microbatches.
    """
    names = ["one_rank", *GENERATORS]
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(names)}"
        raise ConfigError(f"there is no schedule {name!r}; {hint}")
    interleaved = name == "interleaved_one_f_one_b"
    require(chunks is None or interleaved, f"chunks belong to interleaved_one_f_one_b, not to {name}")
    if name == "one_rank":
        require(ranks == 1, f"schedule one_rank runs on one pipeline rank, not on {ranks}")
        return one_rank(microbatches)
    if interleaved and chunks is not None:
        return interleaved_one_f_one_b(ranks, microbatches, chunks)
    return GENERATORS[name](ranks, microbatches)
