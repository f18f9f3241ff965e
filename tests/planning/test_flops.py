"""FLOPs and parameters of the published models."""

import pytest
from small_model import small

from deepseek_jax import zoo
from deepseek_jax.planning.flops import backward_flops, forward_flops, training_flops, training_flops_per_token
from deepseek_jax.planning.parameters import active_parameters, count_parameters, total_parameters

V3 = zoo.deepseek_v3()


def test_v3_takes_250_and_260_gigaflops_per_token():
    assert training_flops_per_token(V3, 4096, mtp=False) == pytest.approx(250e9, rel=0.005)
    assert training_flops_per_token(V3, 4096) == pytest.approx(260e9, rel=0.005)


def test_modules_of_v3_by_hand():
    flops = forward_flops(V3, 4096, mtp=False)
    assert flops["mla projections"] == pytest.approx(2 * 61 * 187.1e6, rel=1e-3)
    assert flops["attention"] == 2 * 61 * 128 * (192 + 128) * 4096 / 2
    assert flops["dense ffn"] == pytest.approx(2 * 3 * 396.4e6, rel=1e-3)
    assert flops["routed experts"] == 2 * 58 * 8 * 3 * 7168 * 2048
    assert flops["shared experts"] == flops["routed experts"] / 8
    assert flops["router"] == 2 * 58 * 7168 * 256
    assert flops["output head"] == 2 * 7168 * 129280
    assert flops["mtp projection"] == 0


def test_training_is_three_forward_passes():
    forward, training = forward_flops(V3, 4096), training_flops(V3, 4096)
    assert training == {name: 3 * value for name, value in forward.items()}


def test_backward_passes_are_input_and_weight_gradients():
    """A matrix takes one product in each; attention has no weights. Together they are twice the forward."""
    forward, (inputs, weights) = forward_flops(V3, 4096), backward_flops(V3, 4096)
    assert all(inputs[name] + weights[name] == 2 * forward[name] for name in forward)
    assert weights["attention"] == 0
    assert inputs["routed experts"] == weights["routed experts"] == forward["routed experts"]


def test_attention_in_full_is_twice_the_causal_one():
    """The two counts of published utilisation (arXiv 2505.09343): 432 and 385 TFLOP/s are 280 and 250 GFLOP a token."""
    causal, whole = forward_flops(V3, 4096), forward_flops(V3, 4096, causal=False)
    assert {name for name in causal if causal[name] != whole[name]} == {"attention"}
    assert whole["attention"] == 2 * causal["attention"]
    assert training_flops_per_token(V3, 4096, mtp=False, causal=False) == pytest.approx(280e9, rel=0.005)


def test_only_attention_depends_on_the_length():
    short, long = forward_flops(V3, 4096), forward_flops(V3, 8192)
    assert {name for name in short if short[name] != long[name]} == {"attention"}
    assert long["attention"] == 2 * short["attention"]


def test_flops_without_attention_are_two_per_active_parameter():
    """Matrices that every token passes, plus K of E experts; the embedding is a look-up."""
    config = small(mtp_depth=2)
    counts = count_parameters(config)
    experts = 3 * config.hidden_size * config.moe.expert_ffn_size
    idle = (config.num_moe_layers + 2) * (config.moe.num_experts - config.moe.experts_per_token) * experts
    attention, d = config.attention, config.hidden_size
    norms = {"layer": 2 * d + attention.q_lora_rank + attention.kv_lora_rank, "mtp": 3 * d}
    vectors = (config.num_layers + 2) * norms["layer"] + 2 * norms["mtp"] + d
    vectors += (config.num_moe_layers + 2) * config.moe.num_experts
    active = sum(counts.values()) - counts["embedding"] - vectors - idle + 2 * counts["head"]
    flops = forward_flops(config, 64)
    assert sum(flops.values()) - flops["attention"] == 2 * active


def test_v3_by_module():
    counts = count_parameters(V3)
    assert counts["moe"] / 58 == pytest.approx((11_320 + 187.1 + 0.0) * 1e6, rel=1e-3)
    assert counts["embedding"] == counts["head"] == 129280 * 7168
    assert counts["mtp"] == pytest.approx(11.6e9, rel=0.01)  # weights README: 11.5B, without the shared ends


@pytest.mark.parametrize(
    ("config", "both", "one"),
    [(V3, 37.55, 36.63), (zoo.deepseek_v2_lite(), 2.66, 2.45)],
    ids=["v3", "v2_lite"],
)
def test_active_parameters_with_both_vocabulary_matrices_and_with_one(config, both, one):
    assert round(active_parameters(config, mtp=False) / 1e9, 2) == both
    assert round(active_parameters(config, vocabulary_matrices=1, mtp=False) / 1e9, 2) == one


def test_only_the_experts_that_a_token_does_not_visit_are_inactive():
    config = small(mtp_depth=2)
    expert = 3 * config.hidden_size * config.moe.expert_ffn_size
    idle = config.moe.num_experts - config.moe.experts_per_token
    assert total_parameters(config) - active_parameters(config) == (config.num_moe_layers + 2) * idle * expert
    without = total_parameters(config, mtp=False) - active_parameters(config, mtp=False)
    assert without == config.num_moe_layers * idle * expert


def test_a_tied_vocabulary_matrix_is_active_by_both_counts():
    config = small(tie_embeddings=True)
    assert active_parameters(config, vocabulary_matrices=1) == active_parameters(config)
    assert active_parameters(small()) - active_parameters(config) == config.vocab_size * config.hidden_size
