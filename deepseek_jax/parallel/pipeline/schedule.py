"""What a pipeline schedule is: which rank does which work on which microbatch, and in which order. Plain data.

An *op* is one stage's forward (F), input gradient (B) or weight gradient (W) of one microbatch. A *cell* holds the ops
that a rank does together: `F` alone, `B` alone with its `W` put off, `B` and `W` of one microbatch (a full backward),
or a forward beside the backward of another microbatch, so that the exchanges of one hide under the other's compute.
A *schedule* is a list of cells per rank. `generators.py` makes the known ones, `text.py` reads a user's own, `check.py`
says whether one can run, `simulate.py` how long it takes, and `tables.py` what each rank does in each tick.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from deepseek_jax.config import require

OpKind = Literal["F", "B", "W"]
StageMapKind = Literal["straight", "bidirectional", "vee", "interleaved"]

OP_WORDS: dict[OpKind, str] = {"F": "forward", "B": "input gradient", "W": "weight gradient"}
"""Each kind of op in words."""


class Op(NamedTuple):
    """One stage's work on one microbatch. `str(op)` is `F0.3`: kind, slot, microbatch."""

    kind: OpKind
    slot: int
    """Which of its rank's stages."""
    microbatch: int
    """Counted over the whole batch, both directions together."""

    def __str__(self) -> str:
        return f"{self.kind}{self.slot}.{self.microbatch}"


Cell = tuple[Op, ...]
"""What a rank does together, at most one op of each kind."""


def cell_text(cell: Cell) -> str:
    """A cell as text: `F0.6+BW1.10`, where `BW` is B with the W of the same microbatch."""
    words: list[str] = []
    for op in cell:
        if words and op.kind == "W" and words[-1] == f"B{op.slot}.{op.microbatch}":
            words[-1] = f"BW{op.slot}.{op.microbatch}"
        else:
            words.append(str(op))
    return "+".join(words)


@dataclasses.dataclass(frozen=True)
class StageMap:
    """On which rank, and in which of its slots, each stage of the model lives.

    - `straight`: stage r on rank r.
    - `bidirectional` (DualPipe): two directions that share the model. Slot 0 of rank r holds stage r of direction 0,
      slot 1 stage P - 1 - r of direction 1; each stage's parameters are on two ranks.
    - `vee` (DualPipeV): 2P stages folded once; slot 0 of rank r holds stage r, slot 1 stage 2P - 1 - r.
    - `interleaved`: V·P stages; slot v of rank r holds stage v·P + r.
    """

    kind: StageMapKind
    ranks: int
    chunks: int = 1
    """V of `interleaved`; 1 in all others."""

    def __post_init__(self):
        require(self.ranks >= 1, f"a pipeline needs at least one rank, not {self.ranks}")
        require(self.chunks >= 1, f"a rank needs at least one chunk of layers, not {self.chunks}")
        require(
            self.kind == "interleaved" or self.chunks == 1,
            f"{self.chunks} chunks on a rank need an interleaved stage map, not a {self.kind} one",
        )
        if self.kind == "bidirectional":
            least = max(self.ranks - 1, 2)
            require(
                self.ranks % 2 == 0,
                f"two directions need an even number of ranks, not {self.ranks}: use {least} or {self.ranks + 1}",
            )

    @property
    def slots(self) -> int:
        """Stages that each rank runs."""
        return {"straight": 1, "bidirectional": 2, "vee": 2, "interleaved": self.chunks}[self.kind]

    @property
    def directions(self) -> int:
        """Streams of microbatches, each of which runs through the whole model."""
        return 2 if self.kind == "bidirectional" else 1

    @property
    def stages(self) -> int:
        """Stages that the model is cut into."""
        return self.ranks * self.slots // self.directions

    @property
    def copies(self) -> int:
        """Ranks that hold each stage's parameters."""
        return self.directions

    def direction(self, slot: int) -> int:
        """Whose microbatches a slot works on."""
        return slot if self.kind == "bidirectional" else 0

    def stage(self, rank: int, slot: int) -> int:
        """The stage of the model, of `slot`'s direction, that a rank has in a slot."""
        back = slot == 1 and self.kind in ("bidirectional", "vee")
        return (self.stages - 1 - rank) if back else slot * self.ranks + rank

    def home(self, direction: int, stage: int) -> tuple[int, int]:
        """(rank, slot) of a direction's stage."""
        if self.kind == "bidirectional":
            return (stage, 0) if direction == 0 else (self.ranks - 1 - stage, 1)
        if self.kind == "vee":
            return (stage, 0) if stage < self.ranks else (self.stages - 1 - stage, 1)
        return stage % self.ranks, stage // self.ranks


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The order of work of every rank in one step.

    Made by a generator or read from text, a schedule is only a claim until `check` has looked at it.
    """

    name: str
    stages: StageMap
    microbatches: int
    """Of a step, both directions together: each direction has an equal, contiguous share."""
    cells: tuple[tuple[Cell, ...], ...]
    """Per rank, its cells in order."""

    def __post_init__(self):
        directions = self.stages.directions
        require(
            re.fullmatch(r"[\w.-]+", self.name) is not None,
            f"a schedule's name is one word of letters, digits, _, - and dots, not {self.name!r}",
        )
        require(self.microbatches >= 1, f"a schedule needs at least one microbatch, not {self.microbatches}")
        require(
            self.microbatches % directions == 0,
            f"two directions need an even number of microbatches, not {self.microbatches}: use "
            f"{self.microbatches + 1}, one of which may be empty",
        )
        require(
            len(self.cells) == self.ranks,
            f"schedule {self.name!r} lists the cells of {len(self.cells)} ranks, its stage map has {self.ranks}",
        )

    @property
    def ranks(self) -> int:
        """Pipeline ranks."""
        return self.stages.ranks

    def microbatches_of(self, slot: int) -> range:
        """The microbatches that a slot works on: those of its direction."""
        share = self.microbatches // self.stages.directions
        start = share * self.stages.direction(slot)
        return range(start, start + share)

    def ops(self, rank: int) -> Iterator[tuple[int, Op]]:
        """(cell index, op) of a rank, in order."""
        for index, cell in enumerate(self.cells[rank]):
            for op in cell:
                yield index, op

    def needs(self, rank: int, op: Op) -> list[tuple[int, Op]]:
        """The (rank, op) pairs whose results `op` reads on `rank`.

        F of a stage needs F of the stage before; B needs its own F, and B of the stage after unless it is the last,
        whose cotangent comes from the loss; W needs its own B.
        """
        kind, slot, microbatch = op
        if kind == "W":
            return [(rank, Op("B", slot, microbatch))]
        found = [(rank, Op("F", slot, microbatch))] if kind == "B" else []
        sender = self.sender(rank, op)
        if sender is not None:
            found.append((sender[0], Op(kind, sender[1], microbatch)))
        return found

    def sender(self, rank: int, op: Op) -> tuple[int, int] | None:
        """(rank, slot) that an F has its input from, or a B its cotangent; None where that is the model's end."""
        stage, direction = self.stages.stage(rank, op.slot), self.stages.direction(op.slot)
        before = stage - 1 if op.kind == "F" else stage + 1
        if op.kind == "W" or not 0 <= before < self.stages.stages:
            return None
        return self.stages.home(direction, before)

    def receiver(self, rank: int, op: Op) -> tuple[int, int] | None:
        """(rank, slot) that the result of an F or a B goes to; None where that is the model's end, and for a W."""
        stage, direction = self.stages.stage(rank, op.slot), self.stages.direction(op.slot)
        after = stage + 1 if op.kind == "F" else stage - 1
        if op.kind == "W" or not 0 <= after < self.stages.stages:
            return None
        return self.stages.home(direction, after)
