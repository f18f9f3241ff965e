"""The backward pass in two parts is the whole one: the same gradients, and no product made twice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.extend.core import jaxprs_in_params
from small_model import small

from deepseek_jax.model.block import SAVED_ACTIVATIONS, Block
from deepseek_jax.model.parameters import stack
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.pipeline.split_vjp import split_vjp

LAYERS, ROWS, LENGTH = 3, 2, 16
CONFIG = small(mtp_depth=0)


def products(function, *arguments) -> int:
    """FLOPs of the matrix products of a function; a loop's body counts as often as a scan runs, else once."""

    def count(jaxpr, times):
        total = 0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                (contract, _), _ = eqn.params["dimension_numbers"]
                depth = np.prod([eqn.invars[0].aval.shape[axis] for axis in contract], dtype=int)
                total += 2 * times * int(eqn.outvars[0].aval.size * depth)
            inner = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
            total += sum(count(one, inner) for one in jaxprs_in_params(eqn.params))
        return total

    return count(jax.make_jaxpr(function)(*arguments).jaxpr, 1)


def in_parts(function, params, x, cotangents):
    """Outputs and both gradients through the split, and what is kept between its parts."""
    split = split_vjp(function, params, x)
    outputs, residuals = split.forward(params, x)
    dx, stash = split.input_gradient(params, residuals, cotangents)
    return outputs, split.weight_gradient(params, residuals, stash), dx, (residuals, stash)


def whole(function, params, x, cotangents):
    outputs, pullback = jax.vjp(function, params, x)
    return outputs, *pullback(cotangents)


def check(function, params, x, cotangents):
    """The split of a function gives what `jax.vjp` gives, and multiplies as much."""
    split = split_vjp(function, params, x)
    expected = jax.jit(functools.partial(whole, function))(params, x, cotangents)
    *got, (residuals, stash) = jax.jit(functools.partial(in_parts, function))(params, x, cotangents)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13), tuple(got), expected)
    first = products(split.input_gradient, params, residuals, cotangents)
    second = products(split.weight_gradient, params, residuals, stash)
    all_of_it = products(functools.partial(whole, function), params, x, cotangents)
    assert first + second == all_of_it - products(split.forward, params, x)
    return first, second, residuals, stash


# --- by hand ----------------------------------------------------------------------------------------------------------


def layers(params, x, remat):
    def layer(x, weights):
        def block(x, weights):
            return x + jnp.tanh(x @ weights["up"]) @ weights["down"]

        y = (jax.checkpoint(block) if remat else block)(x, weights)
        return y, (y**2).sum()

    y, aux = lax.scan(layer, x * params["scale"], params["layers"])
    return y, aux.sum()


def layer_arguments():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    params = {"scale": draw(8), "layers": {"up": draw(LAYERS, 8, 16), "down": draw(LAYERS, 16, 8)}}
    return params, draw(5, 8), (draw(5, 8), draw())


@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_over_layers_is_cut_inside(remat):
    """B has one product for each matrix, W one; with recomputation B has the forward product as well."""
    with jax.enable_x64(True):
        first, second, _, stash = check(functools.partial(layers, remat=remat), *layer_arguments())
    each = 2 * 5 * 8 * 16 * LAYERS
    assert (first, second) == ((3 if remat else 2) * each, 2 * each)
    assert any(leaf.shape[0] == LAYERS for leaf in stash)


def test_the_second_part_needs_no_cotangents_and_the_first_no_weight_gradients():
    """Or the parts would be the whole twice: W of a function without weights is nothing, and B without input."""
    with jax.enable_x64(True):
        params, x, cotangents = layer_arguments()
        first, second, *_ = check(lambda _, x: (jnp.tanh(x @ jnp.ones((8, 8))), x.sum()), {}, x, cotangents)
        assert (first > 0, second) == (True, 0)
        weights_only = lambda p, _: (p["layers"]["up"][0] @ jnp.ones((16, 8)), p["scale"].sum())  # noqa: E731
        first, second, *_ = check(weights_only, params, x, (jnp.ones((8, 8)), cotangents[1]))
        assert (first, second > 0) == (0, True)


def test_casts_of_weights_are_made_again_and_not_kept():
    params, x, _ = layer_arguments()
    params, x = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, x))

    def function(params, x):
        return x @ params["layers"]["up"][0].astype(jnp.bfloat16).astype(jnp.float32)

    split = split_vjp(function, params, x)
    _, residuals = split.forward(params, x)
    assert [leaf.shape for leaf in residuals] == [x.shape]


# --- DeepSeek-V3's blocks ---------------------------------------------------------------------------------------------


def stage(recompute: str):
    """`(params, x) -> (x, balance loss)` of a scanned stage of MoE blocks, its weights and its input."""
    model = Transformer(CONFIG)
    blocks = stack(Block(CONFIG), LAYERS)
    graphdef, state = nnx.split(blocks)
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape)), nnx.to_pure_dict(state))
    bias = values["ffn"]["router"].pop("bias")
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))
    ctx = model.context(positions, dtype=jnp.float64)

    def layer(params, bias, x):
        params = {**params, "ffn": {**params["ffn"], "router": {**params["ffn"]["router"], "bias": bias}}}
        return nnx.merge(graphdef, params)(x, ctx)[:2]

    if recompute != "none":
        names = SAVED_ACTIVATIONS if recompute == "selective" else ()
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)

    def function(params, x):
        x, aux = lax.scan(lambda x, inputs: layer(*inputs, x), x, (params, bias))
        return x, aux.sum()

    x = jnp.asarray(rng.normal(size=(ROWS, LENGTH, CONFIG.hidden_size)))
    return function, values, x, (jnp.asarray(rng.normal(size=x.shape)), jnp.asarray(0.7))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_stage_of_v3_blocks_is_cut_without_loss_and_without_more_work(recompute):
    """MLA, router, grouped experts, RMSNorm and SwiGLU, custom derivatives and rematerialisation included."""
    with jax.enable_x64(True):
        first, second, *_ = check(*stage(recompute))
    assert first > 0 < second
