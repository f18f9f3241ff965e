"""bfloat16 compute: what is summed over many elements is summed in float32 and rounded once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from small_model import small

from deepseek_jax.model.block import Block
from deepseek_jax.model.parameters import RouterBias, abstract_values, parameter_specs
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.dispatch import LocalDispatcher
from deepseek_jax.parallel.pipeline.stage import merge
from deepseek_jax.tree import map_leaves

CONFIG = small()


def gradient_jaxpr(config, *, dense: bool, dtype):
    """The jaxpr of the gradients of a block's parameters and input, computing in `dtype`."""
    block = Block(config, dense=dense)
    graphdef = nnx.graphdef(block)
    ctx = Transformer(config).context(jnp.broadcast_to(jnp.arange(8), (2, 8)), dtype=dtype)

    def cast(spec, value):
        return jax.ShapeDtypeStruct(value.shape, jnp.float32 if spec.full_precision else dtype)

    params = map_leaves(cast, parameter_specs(block), abstract_values(block))
    bias = abstract_values(block, RouterBias)

    def loss(params, x, bias):
        y, balance_loss, _ = nnx.merge(graphdef, merge(params, bias))(x, ctx)
        return (y.astype(jnp.float32) ** 2).sum() + balance_loss

    x = jax.ShapeDtypeStruct((2, 8, config.hidden_size), dtype)
    return jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params, x, bias).jaxpr


def equations(jaxpr):
    """Every equation of a jaxpr and of those within it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def sums(jaxpr):
    """(name of the dtype, elements per sum) of every reduction and running sum."""
    for equation in equations(jaxpr):
        if equation.primitive.name in ("reduce_sum", "cumsum"):
            operand, result = equation.invars[0].aval, equation.outvars[0].aval
            whole = 1 if equation.primitive.name == "cumsum" else result.size
            yield operand.dtype.name, operand.size // whole


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "moe"])
def test_no_sum_in_a_blocks_gradient_is_made_in_bfloat16(dense):
    """XLA's GPU backend adds in the dtype that it is given: 128 heads of a shared key, 7168 columns of a weight."""
    found = list(sums(gradient_jaxpr(CONFIG, dense=dense, dtype=jnp.bfloat16)))
    assert "float32" in {dtype for dtype, elements in found if elements > 1}
    assert [elements for dtype, elements in found if dtype == "bfloat16" and elements > 1] == []


def test_choices_are_summed_in_float32_and_rounded_once():
    """Forward as in combine, and backward as in dispatch; in bfloat16 256 + 1 is 256 again, each of six times."""
    experts = jnp.arange(8, dtype=jnp.int32)[None]
    dispatcher = LocalDispatcher(8)
    x = jnp.ones((1, 4), jnp.bfloat16)

    def rows(x):
        return dispatcher.dispatch(x, jnp.ones(experts.shape), dispatcher.plan(experts)[0][0])

    handle = rows(x).handle
    outputs = jnp.asarray([256, 1, 1, 1, 1, 1, 1, 0], jnp.bfloat16)[:, None] * x
    np.testing.assert_array_equal(dispatcher.combine(outputs, handle), np.full((1, 4), 262, jnp.bfloat16))
    (gradient,) = jax.vjp(lambda x: rows(x).rows, x)[1](outputs)
    np.testing.assert_array_equal(gradient, np.full((1, 4), 262, jnp.bfloat16))


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "moe"])
def test_float32_pays_nothing_for_it(dense):
    """In float32 no array is converted to another float dtype: the casts are for bfloat16 alone."""
    converted = [
        (equation.invars[0].aval.dtype, equation.outvars[0].aval.dtype)
        for equation in equations(gradient_jaxpr(CONFIG, dense=dense, dtype=jnp.float32))
        if equation.primitive.name == "convert_element_type" and equation.invars[0].aval.ndim
    ]
    floats = [pair for pair in converted if all(jnp.issubdtype(dtype, jnp.floating) for dtype in pair)]
    assert floats == []
