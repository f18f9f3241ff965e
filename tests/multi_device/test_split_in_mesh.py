"""A stage's backward pass in two parts, and the braid, on devices that exchange tokens: the same numbers."""

import functools

import jax
import numpy as np
import pytest
from split_cases import (
    LAYOUTS,
    QUICK,
    at_once,
    equal,
    in_parts,
    on_mesh,
    one_after_the_other,
    two_microbatches,
    whole,
)

from deepseek_jax.parallel.pipeline.braid import braid

SLOW = pytest.mark.slow
ONE_HOP, _, TWO_HOPS = LAYOUTS


def run(layout: str, per_device):
    """What it gives on eight devices, in float64."""
    with jax.enable_x64(True):
        function, arguments = on_mesh(layout, per_device, jax.devices())
        return jax.device_get(function.lower(*arguments).compile(compiler_options=QUICK)(*arguments))


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [
        (ONE_HOP, "none"),
        (TWO_HOPS, "full"),
        pytest.param(ONE_HOP, "selective", marks=SLOW),
        pytest.param(ONE_HOP, "full", marks=SLOW),
        pytest.param(TWO_HOPS, "none", marks=SLOW),
        pytest.param(TWO_HOPS, "selective", marks=SLOW),
    ],
)
def test_the_parts_are_the_whole_on_every_device(layout, recompute):
    """Outputs, dx and dparams of B then W, and of both at once, are `jax.vjp`'s; loads are equal."""

    def per_device(function_of, arguments):
        function = function_of(recompute)
        *parts, _ = in_parts(function, *arguments)
        return tuple(parts), at_once(function, *arguments), whole(function, *arguments)

    parts, together, expected = run(layout, per_device)
    equal(parts, expected)
    equal(together, expected)
    for leaf in jax.tree.leaves(expected[1]["dense"]):  # rank 1 of the pipe has none
        assert np.abs(leaf[:4]).max() > np.abs(leaf[4:]).max() == 0


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [
        (ONE_HOP, "selective"),
        pytest.param(TWO_HOPS, "selective", marks=SLOW),
        pytest.param(TWO_HOPS, "none", marks=SLOW),
        pytest.param(ONE_HOP, "full", marks=SLOW),
    ],
)
def test_the_braid_is_the_two_calls_on_every_device(layout, recompute):
    """Bit for bit in float64: F of one microbatch, and dx and dparams of another."""

    def per_device(function_of, arguments, together):
        split, *arguments = two_microbatches(function_of(recompute), *arguments)
        return together(split.forward, split.gradients)(*arguments)

    got, expected = (
        run(layout, functools.partial(per_device, together=together)) for together in (braid, one_after_the_other)
    )
    jax.tree.map(np.testing.assert_array_equal, got, expected)
