"""The step with no implementation named: its memory is linear in the sequence, its work that of the active experts.

Whatever an op can do, this is what it does where the model calls it.
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from small_model import abstract_state, full, hyperparameters, small, trainer

from deepseek_jax import ops
from deepseek_jax.model.context import LayerContext
from deepseek_jax.model.moe import MoE
from deepseek_jax.parallel.dispatch import LocalDispatcher

# --- memory linear in the sequence ----------------------------------------------------------------------------------

LENGTH = 640
"""Several of the attention's blocks, and longer than all the elements that any array holds of one token."""
CONFIG = small(num_layers=1, num_dense_layers=0)


def lowered_step(**options) -> str:
    """The train step of an MoE layer and an MTP module, forward and backward, as it is given to XLA."""
    runner = trainer(CONFIG, **options)
    batch = full(CONFIG, 2, LENGTH)
    return runner.lower(abstract_state(runner), batch, hyperparameters()).as_text()


def square_in_the_sequence(text: str) -> set[str]:
    """Types of the arrays of a program with two dimensions of a sequence or more, or of as many elements as that."""
    found = set()
    for dimensions in set(re.findall(r"tensor<((?:\d+x)+)", text)):
        sizes = [int(size) for size in dimensions.split("x")[:-1]]
        if sum(size >= LENGTH for size in sizes) > 1 or np.prod(sizes) >= LENGTH * LENGTH:
            found.add(dimensions)
    return found


@pytest.mark.parametrize("options", [{}, {"compute_dtype": jnp.bfloat16, "mask_documents": True}])
def test_no_array_of_the_train_step_is_square_in_the_sequence(options):
    text = lowered_step(**options)
    assert f"tensor<2x{LENGTH}x" in text, "what is looked for has another form"
    assert square_in_the_sequence(text) == set()


def test_attention_that_holds_all_scores_would_be_noticed(monkeypatch):
    monkeypatch.setattr(ops, "attention", functools.partial(ops.attention, implementation="reference"))
    heads = CONFIG.attention.num_heads
    assert f"2x{heads}x{LENGTH}x{LENGTH}x" in square_in_the_sequence(lowered_step())


# --- cost of the active experts ---------------------------------------------------------------------------------------


def moe_dot_flops(experts: int) -> int:
    """FLOPs of the matmuls of an MoE layer with its gradients, but for the router's; a loop's body counts once."""
    config = small(moe={"num_experts": experts})
    module = MoE(config)
    graphdef, state = nnx.split(module)
    ctx = LayerContext(jnp.zeros(0), jnp.zeros(0), LocalDispatcher(experts, ops.preferred_alignment()))

    def loss(params, x):
        return nnx.merge(graphdef, params)(x, ctx).y.sum()

    x = jax.ShapeDtypeStruct((2, LENGTH, config.hidden_size), jnp.float32)
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(nnx.to_pure_dict(state), x).jaxpr
    router = 2 * 2 * LENGTH * config.hidden_size * experts
    return dot_flops(jaxpr) - 3 * router


def dot_flops(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            factors = [equation.invars[0].aval.shape[dimension] for dimension in contracted]
            total += 2 * int(np.prod([*factors, *equation.outvars[0].aval.shape]))
        total += sum(dot_flops(inner) for inner in jaxprs_in_params(equation.params))
    return total


def test_an_moe_layer_of_more_experts_multiplies_no_more():
    """Section 2.1.2: the work follows the tokens and the experts that each one uses."""
    few, many = moe_dot_flops(8), moe_dot_flops(64)
    assert 0 < many <= few


def test_experts_that_see_every_token_would_be_noticed(monkeypatch):
    monkeypatch.setattr(ops, "grouped_matmul", functools.partial(ops.grouped_matmul, implementation="reference"))
    few, many = moe_dot_flops(8), moe_dot_flops(64)
    assert many > 4 * few
