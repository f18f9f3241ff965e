"""Dispatch and combine on one device: nothing lost, nothing doubled, under any routing."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from deepseek_jax import ops
from deepseek_jax.parallel.dispatch import NO_EXPERT, LocalDispatcher

EXPERTS, WIDTH = 6, 3


@st.composite
def routings(draw, most_experts: int = EXPERTS):
    """Experts `[T, K]`, distinct within a token, drawn from few enough that some are often empty; some choose none."""
    tokens, choices = draw(st.sampled_from([(1, 1), (5, 2), (7, 4)]))
    allowed = draw(st.integers(choices, most_experts))
    names = draw(st.permutations(range(most_experts)))[:allowed]
    rows = [draw(st.permutations(names))[:choices] for _ in range(tokens)]
    chosen = np.array(rows, np.int32)
    chosen[draw(st.lists(st.integers(0, tokens - 1), max_size=2))] = NO_EXPERT
    return chosen


@settings(max_examples=60)
@given(experts=routings(), alignment=st.sampled_from([1, 4]))
def test_dispatch_then_combine_returns_every_token_k_times(experts, alignment):
    dispatcher = LocalDispatcher(EXPERTS, alignment)
    tokens, _ = experts.shape
    x = 1 + np.arange(tokens * WIDTH, dtype=np.float32).reshape(tokens, WIDTH)
    weights = 1 + jnp.arange(experts.size, dtype=jnp.float32).reshape(experts.shape)
    rows, row_weights, sizes, handle = dispatcher.dispatch(
        jnp.asarray(x), weights, dispatcher.plan(jnp.asarray(experts))[0][0]
    )
    assert sizes.tolist() == [int((experts == e).sum()) for e in range(EXPERTS)]
    # Each group holds its tokens, in order, from its aligned start; every other row is zero.
    starts = np.asarray(ops.group_starts(sizes, alignment))
    assert (starts % alignment == 0).all()
    expected, expected_weights = np.zeros(rows.shape, np.float32), np.zeros(rows.shape[0], np.float32)
    for e in range(EXPERTS):
        members = [t for t in range(tokens) if e in experts[t]]
        group = slice(starts[e], starts[e] + len(members))
        expected[group] = x[members]
        expected_weights[group] = [weights[t, list(experts[t]).index(e)] for t in members]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(row_weights, expected_weights)
    back = dispatcher.combine(rows, handle)
    np.testing.assert_array_equal(back, (experts >= 0).sum(axis=1, keepdims=True) * x)


@pytest.mark.parametrize("alignment", [1, 4])
def test_gradients_equal_those_of_a_dense_sum(alignment):
    rng = np.random.default_rng(0)
    experts = jnp.asarray([[0, 3], [3, 5], [5, 0], [3, 0], [0, 5]], jnp.int32)
    scale = jnp.asarray(rng.normal(size=EXPERTS))

    with jax.enable_x64(True):
        x, weights = jnp.asarray(rng.normal(size=(5, WIDTH))), jnp.asarray(rng.uniform(size=(5, 2)))
        cotangent, scale = jnp.asarray(rng.normal(size=(5, WIDTH))), jnp.asarray(rng.normal(size=EXPERTS))

        def dispatched(x, weights):
            dispatcher = LocalDispatcher(EXPERTS, alignment)
            rows, row_weights, sizes, handle = dispatcher.dispatch(x, weights, dispatcher.plan(experts)[0][0])
            ends = ops.group_starts(sizes, alignment)[:, None] + sizes[:, None]
            group = (jnp.arange(rows.shape[0]) >= ends).sum(axis=0)
            outputs = rows**2 * (jnp.append(scale, 0.0)[group] * row_weights)[:, None]
            return (dispatcher.combine(outputs, handle) * cotangent).sum()

        def dense(x, weights):
            return ((x[:, None] ** 2 * scale[experts][..., None] * weights[..., None]).sum(axis=1) * cotangent).sum()

        for ours, expected in zip(
            jax.grad(dispatched, (0, 1))(x, weights), jax.grad(dense, (0, 1))(x, weights), strict=True
        ):
            np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_the_buffer_holds_the_worst_routing():
    # One token per expert wastes most: every group is padded from 1 to 8 rows.
    dispatcher = LocalDispatcher(EXPERTS, 8)
    experts = jnp.arange(EXPERTS, dtype=jnp.int32)[None]
    rows, _, sizes, _ = dispatcher.dispatch(
        jnp.ones((1, WIDTH)), jnp.ones(experts.shape), dispatcher.plan(experts)[0][0]
    )
    assert rows.shape[0] >= int(ops.group_starts(sizes, 8)[-1] + sizes[-1])
    assert int((rows != 0).any(axis=1).sum()) == EXPERTS
