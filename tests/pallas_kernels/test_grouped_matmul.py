"""`grouped_matmul`: exact for every layout of groups, at a cost that follows the rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from pallas_kernels.grouped_matmul import group_starts, grouped_matmul, grouped_matmul_dw, grouped_matmul_dx
from pallas_kernels.grouped_matmul.blocked import quarter_rows, tile_counts, tile_rows

SIZES = {
    "uneven, some empty": [0, 130, 1, 0, 255, 7],
    "all in one": [0, 0, 393, 0],
    "all empty": [0, 0, 0],
    "a row each": [1, 1, 1, 1, 1, 1, 1, 1],
    "even": [64, 64, 64, 64],
}


def problem(sizes, alignment, *, spare=5, k=6, n=4, dtype=jnp.float64):
    """x with garbage in its padding rows, w, sizes, a cotangent, and which rows are real."""
    rng = np.random.default_rng(0)
    sizes = np.asarray(sizes, np.int32)
    rows = int((-(-sizes // alignment) * alignment).sum()) + spare
    starts = np.asarray(group_starts(jnp.asarray(sizes), alignment))
    real = np.zeros(rows, bool)
    for start, size in zip(starts, sizes, strict=True):
        real[start : start + size] = True
    x, w, g = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((rows, k), (len(sizes), k, n), (rows, n)))
    return x, w, jnp.asarray(sizes), g, real


def value_and_gradients(name, x, w, sizes, g, alignment):
    def f(x, w):
        y = grouped_matmul(x, w, sizes, alignment=alignment, implementation=name)
        return (y * g).sum(), y

    (_, y), gradients = jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(x, w)
    return y, *gradients


@pytest.mark.parametrize("alignment", [1, 8, 128])
@pytest.mark.parametrize("name", SIZES)
def test_blocked_is_the_reference(name, alignment):
    with jax.enable_x64(True):
        x, w, sizes, g, real = problem(SIZES[name], alignment)
        got = value_and_gradients("blocked", x, w, sizes, g, alignment)
        for a, b in zip(got, value_and_gradients("reference", x, w, sizes, g, alignment), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)
        y, dx, dw = got
        assert not np.asarray(y)[~real].any(), "padding rows give zero whatever they hold"
        assert not np.asarray(dx)[~real].any()
        assert not np.asarray(dw)[np.asarray(sizes) == 0].any(), "an empty group has an exactly zero gradient"


def test_reference_by_hand():
    x, w, sizes, _, _ = problem([2, 0, 3], 4, dtype=jnp.float32)
    y = grouped_matmul(x, w, sizes, alignment=4, implementation="reference")
    np.testing.assert_allclose(y[:2], x[:2] @ w[0], rtol=1e-5)
    np.testing.assert_allclose(y[4:7], x[4:7] @ w[2], rtol=1e-5)
    assert not np.asarray(y)[[2, 3, *range(7, len(y))]].any()


@pytest.mark.parametrize("name", ["blocked", "reference"])
def test_input_and_weight_gradients_stand_alone(name):
    with jax.enable_x64(True):
        x, w, sizes, g, _ = problem(SIZES["uneven, some empty"], 8)
        _, dx, dw = value_and_gradients("reference", x, w, sizes, g, 8)
        for f, a, b, wanted in ((grouped_matmul_dx, g, w, dx), (grouped_matmul_dw, x, g, dw)):
            got = f(a, b, sizes, alignment=8, implementation=name)
            np.testing.assert_allclose(got, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["blocked", "reference"])
def test_padding_rows_may_hold_nan(name):
    x, w, sizes, g, real = problem(SIZES["uneven, some empty"], 8, dtype=jnp.float32)
    poisoned = [jnp.where(real[:, None], a, jnp.nan) for a in (x, g)]
    for f, operands, clean in (
        (grouped_matmul, (poisoned[0], w), (x, w)),
        (grouped_matmul_dx, (poisoned[1], w), (g, w)),
        (grouped_matmul_dw, poisoned, (x, g)),
    ):
        got, wanted = (f(*both, sizes, alignment=8, implementation=name) for both in (operands, clean))
        np.testing.assert_array_equal(got, wanted)


def test_bfloat16_in_bfloat16_out():
    x, w, sizes, g, _ = problem(SIZES["uneven, some empty"], 1, dtype=jnp.bfloat16)
    got = value_and_gradients("blocked", x, w, sizes, g, 1)
    assert all(a.dtype == jnp.bfloat16 for a in got)
    wanted = value_and_gradients("reference", *(a.astype(jnp.float32) for a in (x, w)), sizes, g.astype(jnp.float32), 1)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.02 * float(jnp.abs(b).max()))


def dot_flops_inside_loops(jaxpr):
    """FLOPs of every matmul of a program, each counted once however often its loop runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (left, _), _ = equation.params["dimension_numbers"]
            contracted = np.prod([equation.invars[0].aval.shape[d] for d in left])
            total += 2 * contracted * np.prod(equation.outvars[0].aval.shape)
        for sub in jaxprs_in_params(equation.params):
            total += dot_flops_inside_loops(sub)
    return total


@pytest.mark.parametrize("groups", [8, 32, 64, 128])
def test_cost_follows_the_rows(groups):
    rows, k, n = 16384, 32, 16
    tile = tile_rows(rows, groups)
    x, w = jnp.zeros((rows, k)), jnp.zeros((groups, k, n))
    sizes = jnp.asarray(np.random.default_rng(0).multinomial(rows, np.ones(groups) / groups), jnp.int32)
    loss = jax.grad(lambda x, w: grouped_matmul(x, w, sizes, implementation="blocked").sum() ** 2, argnums=(0, 1))
    # A tile and a quarter forward, the same for dx; a tile and one to four quarters for dw, of which a group runs one
    # choice: the only matmuls in the program, whatever the number of groups.
    quarters = 3 * 4 + 2 + (1 + 2 + 3 + 4)
    assert dot_flops_inside_loops(jax.make_jaxpr(loss)(x, w).jaxpr) == quarters * 2 * (tile // 4) * k * n
    # And the loops run for the rows there are: these counts are their bounds.
    whole, rest = tile_counts(sizes, tile)
    assert int(whole.sum()) * tile + int(rest.sum()) * quarter_rows(tile) <= 1.15 * rows


def test_an_empty_group_runs_no_tile():
    whole, quarters = tile_counts(np.asarray([0, 1, 32, 33, 127, 128, 129]), 128)
    assert whole.tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert quarters.tolist() == [0, 1, 1, 2, 4, 0, 1]


@pytest.mark.parametrize("tile", range(1, 13))
def test_quarters_cover_what_whole_tiles_leave(tile):
    """Any tile, since there may be fewer rows than the smallest: at most four quarters, none of them useless."""
    sizes = np.arange(3 * tile)
    whole, quarters = tile_counts(sizes, tile)
    left, quarter = sizes - whole * tile, quarter_rows(tile)
    assert (left <= quarters * quarter).all()
    assert (left > (quarters - 1) * quarter).all()
    assert quarters.max() <= 4


def test_tiles_shrink_with_the_groups_and_never_exceed_the_rows():
    assert [tile_rows(16384, g) for g in (8, 32, 64, 128)] == [128, 128, 128, 64]
    assert tile_rows(5, 2) == 5


def test_bad_arguments_say_what_would_be_valid():
    x, w, sizes, _, _ = problem([2, 3], 1, dtype=jnp.float32)
    with pytest.raises(ValueError, match="blocked, reference"):
        grouped_matmul(x, w, sizes, implementation="ragged")
    with pytest.raises(ValueError, match=r"w \[G, K, N\]"):
        grouped_matmul(x, w.swapaxes(1, 2), sizes)
    with pytest.raises(ValueError, match="alignment must be at least 1"):
        grouped_matmul(x, w, sizes, alignment=0)
