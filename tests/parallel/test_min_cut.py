"""A cut of least capacity, against every cut there is."""

import itertools
import math

import numpy as np

from deepseek_jax.parallel.pipeline.min_cut import min_cut


def capacity(edges, side) -> float:
    return sum(amount for begin, end, amount in edges if begin in side and end not in side)


def test_no_cut_is_cheaper():
    """Random graphs of six nodes, edges there and back and twice, some of which cannot be cut."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        edges = [(*rng.choice(6, 2, replace=False).tolist(), int(rng.integers(1, 9))) for _ in range(14)]
        edges += [(0, 2, math.inf), (3, 5, math.inf), (4, 2, math.inf)]
        sides = [{0, *some} for count in range(5) for some in itertools.combinations(range(1, 5), count)]
        least = min(capacity(edges, side) for side in sides)
        side = min_cut(edges, 0, 5)
        assert side & {0, 5} == {0}
        assert capacity(edges, side) == least


def test_nothing_between_is_cut_nowhere():
    assert min_cut([(0, 1, 3), (2, 3, 4)], 0, 3) == {0, 1}
