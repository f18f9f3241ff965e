"""What waits between ticks, and the messages from rank to rank; `tables.py` says what lies where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.parallel.pipeline.arrays import put, zeros
from deepseek_jax.parallel.pipeline.protocol import Streams
from deepseek_jax.parallel.pipeline.stage import StageOutputs
from deepseek_jax.parallel.pipeline.steady import Pairs
from deepseek_jax.parallel.pipeline.tables import TickTables

_SIDES = {"left": 1, "right": -1, "self": 0}
"""Where a message comes from, and how far it has gone."""


class Rings(NamedTuple):
    """Buffers `[rows + 1, ...]`, the last row for what nobody reads; empty lists where nothing ever waits."""

    activation: Streams
    gradient: Any
    output: tuple
    residual: list
    stash: list


class Made(NamedTuple):
    """What a tick received, and what its last stage made, to be written before the next one reads."""

    output: tuple
    x: tuple[Streams, ...]
    """From each side that ever sends any, or in steady ticks the one that came."""
    dx: tuple[Streams, ...]


class StageShapes(NamedTuple):
    """What the parts of a stage give, as shapes."""

    out: StageOutputs
    stats: Any
    residual: list
    stash: list


class Post:
    """Writes and sends by a table."""

    def __init__(self, tables: TickTables, columns: Mapping[str, jax.Array], shapes: StageShapes, *, trains: bool):
        """`columns`: this rank's, int32 `[T]`, and of a steady run's arrivals `x_row` and `dx_row`."""
        self._tables, self._columns, self._shapes, self._trains = tables, columns, shapes, trains
        sides = {"x": tables.directions_of_x, "dx": tables.directions_of_dx}
        self._sides = {what: [s for s, u in zip(_SIDES, used, strict=True) if u] for what, used in sides.items()}

    def empty(self) -> Rings:
        """Rings full of zeros."""
        rows, shapes = self._tables.rings, self._shapes
        return Rings(
            activation=zeros(shapes.out.x, rows.activation + 1),
            gradient=zeros(shapes.out.x, rows.gradient + 1) if self._trains else (),
            output=zeros(shapes.out.hidden, rows.output + 1),
            residual=zeros(shapes.residual, rows.residual + 1) if self._trains else [],
            stash=zeros(shapes.stash, rows.stash + 1) if rows.stash else [],
        )

    def nothing(self, *, steady: bool) -> Made:
        """What was made before the first of some ticks, to be written into scratch rows."""
        shapes = self._shapes
        messages = {what: 1 if steady else len(sides) for what, sides in self._sides.items()}
        return Made(
            output=zeros(shapes.out.hidden),
            x=tuple(zeros(shapes.out.x) for _ in range(messages["x"])),
            dx=tuple(zeros(shapes.out.x) for _ in range(messages["dx"] * self._trains)),
        )

    def rows(self, start: int, end: int, *, steady: bool) -> dict[str, jax.Array]:
        """Where goes what the ticks from `start` to before `end` made: `[ticks]`, messages `[ticks, messages]`."""
        found = {"output": self._columns["f_output"][start:end]}
        for what, sides in self._sides.items():
            if steady:
                found[what] = self._columns[f"{what}_row"][:, None]
            else:
                empty = jnp.zeros((end - start, 0), jnp.int32)
                columns = [self._columns[f"{what}_from_{side}"][start:end, None] for side in sides]
                found[what] = jnp.concatenate([empty, *columns], axis=1)
        return found

    def before(self, rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The same for each tick of what the tick before it made; for the first scratch rows."""
        sizes = self._tables.rings
        scratch = {"output": sizes.output, "x": sizes.activation, "dx": sizes.gradient}
        return {name: jnp.concatenate([jnp.full_like(of[:1], scratch[name]), of[:-1]]) for name, of in rows.items()}

    def write(self, rings: Rings, made: Made, rows: Mapping[str, jax.Array]) -> Rings:
        """The rings with what a tick made in its rows."""
        activation, gradient = rings.activation, rings.gradient
        for place, x in enumerate(made.x):
            activation = put(activation, rows["x"][place], x)
        for place, dx in enumerate(made.dx):
            gradient = put(gradient, rows["dx"][place], dx)
        output = put(rings.output, rows["output"], made.output)
        return rings._replace(activation=activation, gradient=gradient, output=output)

    @jax.named_scope("send")
    def send(self, what: str, value: Streams, pairs: Pairs | None) -> tuple[Streams, ...]:
        """What comes to this rank when every rank sends: along known pairs of ranks, or from each side in use."""
        if pairs is not None:
            return (_permuted(value, pairs) if pairs else zeros(value),)
        ranks = self._tables.schedule.ranks
        ways = ([(rank, (rank + _SIDES[side]) % ranks) for rank in range(ranks)] for side in self._sides[what])
        return tuple(value if way[0] == (0, 0) else _permuted(value, way) for way in ways)


def _permuted(tree: Any, way: Sequence[tuple[int, int]]) -> Any:
    return jax.tree.map(lambda leaf: lax.ppermute(leaf, "pipe", way), tree)
