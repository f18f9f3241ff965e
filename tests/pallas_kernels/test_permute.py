"""`gather_rows` and `combine_rows`: every implementation against the reference, gradients too, and their errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.parallel.dispatch.local import gather_tokens, group, sum_choices
from pallas_kernels.permute import check_inverse, combine_rows, gather_rows, inverse_of_slots
from pallas_kernels.quantize import quantize

IMPLEMENTATIONS = ["portable", "reference"]


def problem(tokens=9, rows=31, choices=3, width=7, dtype=jnp.float64):
    """Rows in a random order with some empty, tokens without a slot, and entries beyond both ends."""
    rng = np.random.default_rng(0)
    slots = rng.permutation(rows)[: tokens * choices].reshape(tokens, choices)
    slots[rng.random(slots.shape) < 0.2] = rows
    slots[2], slots[4, 1], slots[5, 0] = rows + 40, -1, -rows
    slots = jnp.asarray(slots, jnp.int32)
    x, buffer, weights = (
        jnp.asarray(rng.standard_normal(s), dtype) for s in ((tokens, width), (rows, width), (tokens, choices))
    )
    return x, buffer, slots, inverse_of_slots(slots, rows), weights


def test_the_meaning_by_hand():
    x = jnp.asarray([[1.0, 2.0], [3.0, 4.0]])
    for name in IMPLEMENTATIONS:
        rows = gather_rows(x, jnp.asarray([1, -1, 0, 2, 1]), implementation=name)
        np.testing.assert_array_equal(rows, [[3, 4], [0, 0], [1, 2], [0, 0], [3, 4]])
        slots, weights = (
            jnp.asarray([[0, 2], [5, 4], [-1, 7]]),
            jnp.asarray([[10.0, 1.0], [np.nan, 2.0], [np.inf, 1.0]]),
        )
        y = combine_rows(rows, slots, weights, implementation=name)
        np.testing.assert_array_equal(y, [[31, 42], [6, 8], [0, 0]])
        np.testing.assert_array_equal(combine_rows(rows, slots, implementation=name), [[4, 6], [3, 4], [0, 0]])


@pytest.mark.parametrize("given", [True, False], ids=["inverse given", "no inverse"])
def test_gradients_are_those_of_the_reference(given):
    with jax.enable_x64(True):
        x, buffer, slots, index, weights = problem()

        def loss(x, buffer, weights, name):
            how = {"implementation": name}
            gathered = gather_rows(x, index, **how, **({"inverse": slots} if given else {}))
            inverse = {"inverse": index} if given else {}
            plain = combine_rows(gathered * buffer, slots, **how, **inverse)
            return (jnp.sin(combine_rows(jnp.cos(gathered) + buffer, slots, weights, **how, **inverse)) * plain).sum()

        got = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3)(x, buffer, weights, "portable")
        want = jax.grad(loss, argnums=(0, 1, 2))(x, buffer, weights, "reference")
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
            assert np.abs(b).max() > 0.1


def test_without_an_inverse_rows_may_be_used_many_times():
    with jax.enable_x64(True):
        x, buffer, _, _, weights = problem()
        index, slots = jnp.asarray([3, 3, 3, 0, -1, 3]), jnp.zeros(weights.shape, jnp.int32).at[1, 1].set(4)

        def loss(x, buffer, weights, name):
            y = combine_rows(buffer, slots, weights, implementation=name)
            return (gather_rows(x, index, implementation=name) ** 2).sum() + (y**3).sum()

        grad = jax.grad(loss, argnums=(0, 1, 2))
        for a, b in zip(grad(x, buffer, weights, "portable"), grad(x, buffer, weights, "reference"), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_sums_are_made_in_float32_and_rounded_once(name):
    rows = jnp.asarray([[256.0], [1.0], [1.0]], jnp.bfloat16)  # 256 + 1 is 256 in bfloat16.
    y = combine_rows(rows, jnp.asarray([[0, 1, 2]]), implementation=name)
    assert (float(y[0, 0]), y.dtype) == (258.0, jnp.bfloat16)
    third = jnp.full((1, 3), 1 / 3, jnp.float32)
    assert float(combine_rows(rows, jnp.asarray([[0, 1, 2]]), third, implementation=name)[0, 0]) == 86.0


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_quantised_rows_keep_codes_and_scales(name):
    q = quantize(jnp.asarray(np.random.default_rng(0).standard_normal((5, 300)), jnp.float32), (1, 128))
    rows = gather_rows(q, jnp.asarray([4, 5, 0, -1]), implementation=name)
    np.testing.assert_array_equal(rows.dequantize()[jnp.asarray([0, 2])], q.dequantize()[jnp.asarray([4, 0])])
    assert rows.tile == (1, 128)
    for leaf in (rows.codes, rows.scales):
        assert not np.asarray(leaf.astype(jnp.float32))[[1, 3]].any()
    message = "gather_rows: a Quantized has no gradient"
    with pytest.raises(ValueError, match=message):
        jax.grad(lambda x: gather_rows(quantize(x, (1, 128)), jnp.arange(2)).dequantize().sum())(jnp.ones((2, 3)))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_vmap(name):
    x, buffer, slots, index, weights = problem(dtype=jnp.float32)
    tables = jnp.stack([slots, slots[::-1]])
    got = jax.vmap(lambda s: combine_rows(buffer, s, weights, implementation=name))(tables)
    for one, table in zip(got, tables, strict=True):
        np.testing.assert_allclose(one, combine_rows(buffer, table, weights, implementation="reference"), rtol=1e-6)
    got = jax.vmap(lambda x: gather_rows(x, index, implementation=name))(jnp.stack([x, -x]))
    np.testing.assert_array_equal(got[1], -got[0])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("sizes", [(0, 4, 2), (3, 0, 2), (3, 4, 0)], ids=["no tokens", "no rows", "no choices"])
def test_empty_arrays(name, sizes):
    tokens, rows, choices = sizes
    gathered = gather_rows(jnp.ones((tokens, 5)), jnp.zeros(rows, jnp.int32), implementation=name)
    assert gathered.shape == (rows, 5)
    y = combine_rows(gathered, jnp.full((tokens, choices), rows), jnp.ones((tokens, choices)), implementation=name)
    np.testing.assert_array_equal(y, np.zeros((tokens, 5)))


def test_they_do_what_the_dispatcher_does():
    """With the tables of `group`, forward and backward, bit for bit."""
    rng = np.random.default_rng(0)
    experts = jnp.asarray(rng.integers(-1, 5, (20, 3)), jnp.int32)
    grouping, _, _ = group(experts, 5, capacity=60, alignment=8)
    index, slots = grouping.pairs // experts.shape[1], grouping.some
    check_inverse(index, slots)
    x = jnp.asarray(rng.standard_normal((20, 6)), jnp.bfloat16)

    def ours(x):
        rows = gather_rows(x, index, inverse=slots)
        return rows, combine_rows(rows * rows, slots, inverse=index)

    def theirs(x):
        rows = gather_tokens(x, grouping)
        return rows, sum_choices(rows * rows, grouping)

    (got, pull), (want, pull_want) = jax.vjp(ours, x), jax.vjp(theirs, x)
    for a, b in zip((*got, *pull(got)), (*want, *pull_want(want)), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_check_inverse_says_what_is_wrong():
    slots = np.asarray([[0, 3], [2, -1]])
    check_inverse([0, -1, 1, 0], slots)
    with pytest.raises(ValueError, match="slots name row 2 2 times"):
        check_inverse([0, -1, 1, 0], [[0, 2], [2, -1]])
    with pytest.raises(ValueError, match="index has 1 for row 3, and slots have token 0 there"):
        check_inverse([0, -1, 1, 1], slots)
    with pytest.raises(ValueError, match="index has 1 for row 1, and slots have no token there"):
        check_inverse([0, 1, 1, 0], slots)
    with pytest.raises(ValueError, match=r"needs index \[R\] and slots \[T, K\], not \(2, 2\) and \(2, 2\)"):
        check_inverse(slots, slots)


def test_bad_arguments():
    x, index, slots = jnp.ones((4, 8)), jnp.zeros(6, jnp.int32), jnp.zeros((4, 2), jnp.int32)
    q = quantize(x, (1, 128))
    for message, call in {
        r"gather_rows needs x \[T, D\] and index \[R\], not \(4,\)": lambda: gather_rows(x[:, 0], index),
        r"and index \[R\], not \(4, 8\) and \(4, 2\)": lambda: gather_rows(x, slots),
        "gather_rows: index must be integers, not float32": lambda: gather_rows(x, index * 1.0),
        "gather_rows: x must be of a float dtype, not int32": lambda: gather_rows(slots, index),
        r"gather_rows: inverse must be \[4, K\], not \(6,\)": lambda: gather_rows(x, index, inverse=index),
        r"tiles of 1×128, which keep rows apart, not \(128, 1\)": lambda: gather_rows(quantize(x, (128, 1)), index),
        "a Quantized has no gradient, so `inverse`": lambda: gather_rows(q, index, inverse=slots),
        "gather_rows has no implementation 'fast'": lambda: gather_rows(x, index, implementation="fast"),
        r"combine_rows needs rows \[R, D\] and slots \[T, K\]": lambda: combine_rows(x, index),
        r"a weight for every slot: \(4, 2\), not \(4,\)": lambda: combine_rows(x, slots, jnp.ones(4)),
        "weights must be of a float dtype, not int32": lambda: combine_rows(x, slots, slots),
        "slots must be integers, not bool": lambda: combine_rows(x, slots > 0),
        r"combine_rows: inverse must be \[4\], not \(6,\)": lambda: combine_rows(x, slots, inverse=index),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
