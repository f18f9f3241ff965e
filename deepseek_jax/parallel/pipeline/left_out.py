"""Work that a tick may leave out: a loop of one turn or none, whose carry is what the work adds to.

XLA updates a loop's carry in place. What goes through a conditional it copies on a GPU, each sum in every tick, and
zeros out of one would have to be made and added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.compat import to_varying
from deepseek_jax.parallel.mesh import AXES
from deepseek_jax.parallel.pipeline.arrays import zeros
from deepseek_jax.parallel.pipeline.steady import Tick

Known = Tick | bool | None
"""Whether the work is done: in a steady tick that is known beforehand; None where it is not."""


def when(name: str, predicate: jax.Array, known: Known, at: dict, run: Callable[[dict], Any]) -> Any:
    """`run(at)`, or zeros where the predicate is false.

    The name, a key of `tables.work_shares`, is the scope of the conditional or of the loop.
    """
    return adding(name, predicate, known, at, lambda at: (run(at), ()), ())[0]


def adding(
    name: str,
    predicate: jax.Array,
    known: Known,
    at: dict,
    run: Callable[..., tuple[Any, tuple]],
    sums: tuple,
    otherwise: Any = None,
) -> Any:
    """The same of `run(at, *sums) -> (result, sums with what it added)`; instead of zeros maybe something else."""
    # Rows and numbers depend on the turn, or XLA would see that the work does not, and do it before each loop.
    turned = lambda turn, *sums: run({column: value + turn for column, value in at.items()}, *sums)  # noqa: E731
    checked = lambda turn, *sums: to_varying(turned(turn, *sums), AXES)  # noqa: E731
    if known:
        with jax.named_scope(name):
            return checked(0, *sums)
    shapes, _ = jax.eval_shape(checked, 0, *sums)
    if known is False:
        return zeros(shapes), sums
    with jax.named_scope(name):
        if not sums:
            return lax.cond(predicate, lambda: checked(0), lambda: (zeros(shapes), ()))
        turns = to_varying(predicate, AXES).astype(jnp.int32)
        begin = zeros(shapes) if otherwise is None else otherwise
        return lax.fori_loop(0, turns, lambda turn, carry: checked(turn, *carry[1]), (begin, sums))
