"""Two programs braided into one: the same numbers, one loop where there were two, and nothing waits for the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from split_cases import (
    LAYERS,
    LAYOUTS,
    QUICK,
    layer_arguments,
    layers,
    on_mesh,
    one_after_the_other,
    stage_arguments,
    stage_function,
    two_microbatches,
)

from deepseek_jax.parallel.pipeline.braid import braid, weave
from deepseek_jax.parallel.pipeline.program import Variable, flatten


def scans(function, *arguments) -> list[int]:
    """The lengths of the scans that are not inside others."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return [eqn.params["length"] for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]


def check(first, second, *arguments):
    run = functools.partial(jax.jit, compiler_options=QUICK)
    got = run(braid(first, second))(*arguments)
    jax.tree.map(np.testing.assert_array_equal, got, run(one_after_the_other(first, second))(*arguments))


@pytest.mark.parametrize("part", ["input_gradient", "gradients"])
def test_plain_layers(part):
    """Bit for bit in float64: layer i of F beside layer n - 1 - i of B, whose stacks come out in their order."""
    with jax.enable_x64(True):
        split, *arguments = two_microbatches(layers, *layer_arguments())
        parts = split.forward, getattr(split, part)
        check(*parts, *arguments)
        check(*parts[::-1], *arguments[::-1])
        assert scans(one_after_the_other(*parts), *arguments) == [LAYERS, LAYERS]
        assert scans(braid(*parts), *arguments) == [LAYERS]


def test_v3_blocks():
    """Bit for bit in float64, with grouped experts, custom derivatives, recomputation and dense layers in a branch."""
    with jax.enable_x64(True):
        arguments = jax.tree.map(jnp.asarray, stage_arguments())
        split, *arguments = two_microbatches(stage_function("selective"), *arguments)
        check(split.forward, split.gradients, *arguments)


# --- what waits for what ----------------------------------------------------------------------------------------------


def traced(first, second, *arguments):
    """Of both programs, and of the braid, the turns of the scan that communicates."""

    def body(function, *arguments):
        ops = flatten(jax.make_jaxpr(function)(*arguments)).ops
        (scan,) = [op.scan for op in ops if op.scan is not None and op.exchanges]
        return scan.body.ops

    return body(first, *arguments[0]), body(second, *arguments[1]), body(braid(first, second), *arguments)


def on_layers(recompute, part, layout="one hop"):
    """The same for MoE layers on a mesh."""
    found = []

    def per_device(function_of, arguments):
        split, *arguments = two_microbatches(function_of(recompute), *arguments)
        found.extend(traced(split.forward, getattr(split, part), *arguments))
        return arguments[0][1]

    function, arguments = on_mesh(layout, per_device)
    function.trace(*arguments)
    return found


def waiting(ops) -> tuple[int, int]:
    """How many exchanges there are, and how many pairs of them of which one waits for the other."""
    behind: dict = {}  # value -> exchanges that it depends on
    count = pairs = 0
    for op in ops:
        before = frozenset().union(*(behind.get(v, ()) for v in op.inputs if isinstance(v, Variable)))
        if op.exchanges:
            pairs += len(before)
            before |= {count}
            count += 1
        behind.update(dict.fromkeys(op.outputs, before))
    return count, pairs


RECOMPUTE = pytest.mark.parametrize("recompute", ["none", "selective", "full"])
ONE_HOP, TWO_HOPS, IN_ROUNDS = LAYOUTS


@RECOMPUTE
@pytest.mark.parametrize("part", ["input_gradient", "gradients"])
@pytest.mark.parametrize("layout", [ONE_HOP, TWO_HOPS])
def test_exchanges_of_the_one_do_not_wait_for_the_other(recompute, part, layout):
    """One scan holds the layers of both, and in its body only those exchanges wait for each other that did before."""
    (a, pairs_a), (b, pairs_b), braided = (waiting(ops) for ops in on_layers(recompute, part, layout))
    assert min(a, b) > 0
    assert braided == (a + b, pairs_a + pairs_b)


def test_loops_within_layers_become_one_too():
    """Where tokens need several rounds, those of both microbatches are one loop in the loop over layers."""
    loops = [
        [op.exchanges for op in ops if op.scan and op.exchanges] for ops in on_layers("full", "gradients", IN_ROUNDS)
    ]
    assert [len(one) for one in loops] == [1, 1, 1]
    assert sum(loops[2]) == sum(loops[0]) + sum(loops[1])


@RECOMPUTE
@pytest.mark.parametrize("layout", [ONE_HOP, TWO_HOPS])
def test_beside_each_exchange_the_other_computes(recompute, layout):
    """Between an exchange and what waits for it the other program has a product; nothing runs before its inputs."""
    first, second, _ = on_layers(recompute, "gradients", layout)
    woven = weave(first, second, inside=True)
    assert sorted(map(id, woven)) == sorted(map(id, (*first, *second)))
    for mine, others in ((first, second), (second, first)):
        for place, op in enumerate(woven):
            if op in mine and op.exchanges:
                later = woven[place + 1 :]
                waits = [any(value in op.outputs for value in one.inputs) for one in later].index(True)
                assert any(one.heavy and one in others for one in later[:waits])
    to_come = {output for op in woven for output in op.outputs}
    for op in woven:
        assert not to_come & {value for value in op.inputs if isinstance(value, Variable)}
        to_come -= set(op.outputs)
