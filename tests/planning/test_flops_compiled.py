"""The counter of FLOPs against the matrix products in a compiled train step of small models."""

import functools

import jax.numpy as jnp
import pytest
from small_model import abstract_state, full, hyperparameters, small, trainer

from deepseek_jax import ops
from deepseek_jax.planning.compiled import flops, read_program
from deepseek_jax.planning.flops import training_flops_per_token

ROWS, LENGTH = 2, 64


def all_experts(rows, weights, group_sizes, **_):
    """Grouped products where every token visits every expert, so that groups are of one size: plain products, whose
    number a compiled program states."""
    del group_sizes
    count, inputs, outputs = weights.shape
    return jnp.matmul(rows.reshape(count, -1, inputs), weights).reshape(-1, outputs)


@pytest.fixture
def countable(monkeypatch):
    monkeypatch.setattr(ops, "attention", functools.partial(ops.attention, implementation="reference"))
    monkeypatch.setattr(ops, "grouped_matmul", all_experts)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mtp_depth": 0},
        {"num_layers": 2, "num_dense_layers": 2, "mtp_depth": 0},
        {"attention": {"q_lora_rank": None}},
    ],
    ids=["mtp", "no mtp", "dense", "no query compression"],
)
def test_a_compiled_step_does_the_products_that_are_counted(countable, changes):
    """Masked scores are computed too on this path, so attention counts in full; nothing is computed again."""
    experts = {"num_experts": 4, "experts_per_token": 4, "num_groups": 1, "groups_per_token": 1, "expert_ffn_size": 48}
    config = small(moe=experts, hidden_size=64, dense_ffn_size=96, vocab_size=256, **changes)
    one = trainer(config, recompute="none", dispatcher="local")
    batch = full(config, ROWS, LENGTH)
    program = read_program(one.lower(abstract_state(one), batch, hyperparameters()).compile().as_text())
    counted = ROWS * LENGTH * training_flops_per_token(config, LENGTH, causal=False)
    assert flops(program) == pytest.approx(counted, rel=0.01)
