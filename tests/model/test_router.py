"""Routing (equations 12-16) against an oracle of plain loops that shares no code with the library."""

import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from small_model import small

from deepseek_jax import zoo
from deepseek_jax.config import MoEConfig
from deepseek_jax.model.moe import Router
from deepseek_jax.model.parameters import RouterBias
from deepseek_jax.model.router import combine_weights, expert_load, router_scores, select_experts

V3 = MoEConfig(num_experts=12, experts_per_token=3, num_groups=4, groups_per_token=2)
V2 = MoEConfig(
    num_experts=12,
    experts_per_token=3,
    num_groups=4,
    groups_per_token=2,
    score_function="softmax",
    group_score="max",
    normalize_weights=False,
    routed_scale=16.0,
    use_bias=False,
)
ONE_GROUP = MoEConfig(num_experts=12, experts_per_token=3, num_groups=1, groups_per_token=1)
EVERY_GROUP = MoEConfig(num_experts=12, experts_per_token=3, num_groups=4, groups_per_token=4)
CONFIGS = {"v3": V3, "v2": V2, "one_group": ONE_GROUP, "every_group": EVERY_GROUP}


def best(values: dict[int, float], count: int) -> list[int]:
    """Keys of the `count` largest values, largest first, the lower key first among equals."""
    return sorted(values, key=lambda key: (-values[key], key))[:count]


def oracle_experts(scores, bias, config: MoEConfig) -> list[int]:
    """The experts of one token, from its scores and the biases."""
    biased = {e: float(scores[e]) + float(bias[e]) for e in range(config.num_experts)}
    size = config.num_experts // config.num_groups
    rank = {}
    for group in range(config.num_groups):
        members = sorted((biased[e] for e in range(group * size, (group + 1) * size)), reverse=True)
        rank[group] = members[0] + members[1] if config.group_score == "top2_sum" else members[0]
    kept = best(rank, config.groups_per_token)
    return best({e: b for e, b in biased.items() if e // size in kept}, config.experts_per_token)


def oracle_scores(logits, config: MoEConfig) -> list[float]:
    if config.score_function == "sigmoid":
        return [1 / (1 + math.exp(-x)) for x in logits]
    exponentials = [math.exp(x) for x in logits]
    return [x / sum(exponentials) for x in exponentials]


def oracle_weights(scores, experts, config: MoEConfig) -> list[float]:
    chosen = [scores[e] for e in experts]
    total = sum(chosen) if config.normalize_weights else 1.0
    return [config.routed_scale * s / total for s in chosen]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_routing_equals_the_oracle(config):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, config.num_experts)).astype(np.float32)
    bias = rng.normal(size=config.num_experts).astype(np.float32) if config.use_bias else None
    scores = router_scores(jnp.asarray(logits), config)
    experts = select_experts(scores, None if bias is None else jnp.asarray(bias), config)
    weights = combine_weights(scores, experts, config)
    assert experts.dtype == jnp.int32
    for token in range(len(logits)):
        expected_scores = oracle_scores(logits[token].astype(float), config)
        np.testing.assert_allclose(scores[token], expected_scores, rtol=1e-5)
        expected = oracle_experts(expected_scores, np.zeros(config.num_experts) if bias is None else bias, config)
        assert experts[token].tolist() == expected, token
        # Equation 13: the weights come from the scores without bias.
        np.testing.assert_allclose(weights[token], oracle_weights(expected_scores, expected, config), rtol=1e-5)


@pytest.mark.parametrize("config", [V3, ONE_GROUP], ids=["v3", "one_group"])
@settings(max_examples=60)
@given(data=st.data())
def test_ties_and_negative_biased_scores_equal_the_oracle(config, data):
    # Eighths are exact in float32, so equal sums are equal, and there are many ties.
    scores = data.draw(hnp.arrays(np.int64, (4, 12), elements=st.integers(0, 8))) / 8
    bias = data.draw(hnp.arrays(np.int64, (12,), elements=st.integers(-24, 8))) / 8
    chosen = select_experts(jnp.asarray(scores, jnp.float32), jnp.asarray(bias, jnp.float32), config)
    assert chosen.tolist() == [oracle_experts(row, bias, config) for row in scores]


def test_all_negative_scores_stay_in_the_kept_groups():
    # With a mask of 0 instead of −inf, experts of dropped groups would beat every kept one.
    scores = jnp.full((1, 12), 0.5).at[0, 9:12].set(0.75)
    chosen = select_experts(scores, jnp.full(12, -5.0), V3)
    assert chosen.tolist() == [[9, 10, 11]]
    chosen = select_experts(scores, jnp.full(12, -5.0).at[9:12].set(-9.0), V3)
    assert chosen.tolist() == [[0, 1, 2]]


def test_equal_experts_and_groups_go_to_the_lower_index():
    assert select_experts(jnp.full((1, 12), 0.5), jnp.zeros(12), V3).tolist() == [[0, 1, 2]]
    assert select_experts(jnp.full((1, 12), 0.5), jnp.zeros(12).at[7].set(0.5), V3).tolist() == [[7, 0, 1]]


def test_a_group_is_ranked_by_its_two_best_in_v3_and_by_its_best_in_v2():
    scores = jnp.array([[0.9, 0.1, 0.1, 0.6, 0.6, 0.1, 0.5, 0.55, 0.1, 0.8, 0.0, 0.1]])
    assert select_experts(scores, None, V3).tolist() == [[3, 4, 7]]  # 1.0, 1.2, 1.05, 0.9
    assert select_experts(scores, None, V2).tolist() == [[0, 9, 1]]  # 0.9, 0.6, 0.55, 0.8


def test_the_routed_scale_comes_after_renormalisation():
    scores = jnp.asarray(np.random.default_rng(1).uniform(0.1, 0.9, (5, 12)), jnp.float32)
    weights = combine_weights(scores, select_experts(scores, None, V3), V3)
    np.testing.assert_allclose(weights.sum(axis=-1), 2.5, rtol=1e-6)
    experts = select_experts(scores, None, V2)
    np.testing.assert_allclose(
        combine_weights(scores, experts, V2), 16 * np.take_along_axis(np.asarray(scores), np.asarray(experts), 1)
    )


def test_the_bias_steers_the_choice_and_never_the_weights():
    config = small()
    router = Router(config)
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(9, config.hidden_size)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(config.hidden_size, 8)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=8), jnp.float32)
    graphdef = nnx.graphdef(router)

    def route(bias):
        return nnx.merge(graphdef, {"weight": weight, "bias": bias})(x)

    assert isinstance(router.bias, RouterBias)
    scores, routing = route(bias)
    assert (routing.experts != route(jnp.zeros(8))[1].experts).any()
    np.testing.assert_allclose(routing.weights, combine_weights(scores, routing.experts, config.moe))
    gradient = jax.grad(lambda b: (route(b)[1].weights * jnp.arange(2.0)).sum() + route(b)[0].sum())(bias)
    np.testing.assert_array_equal(gradient, np.zeros(8))


@pytest.mark.parametrize("normalize", [True, False])
def test_the_gradient_reaches_only_the_chosen_experts(normalize):
    config = MoEConfig(
        num_experts=6, experts_per_token=2, num_groups=1, groups_per_token=1, normalize_weights=normalize
    )
    logits = np.array([[0.3, -0.4, 1.2, 0.1, -2.0, 0.9]])
    experts = oracle_experts(oracle_scores(logits[0], config), np.zeros(6), config)
    factors = np.array([0.7, -1.3])

    def output(logits):
        scores = router_scores(logits, config)
        return (combine_weights(scores, select_experts(scores, None, config), config) * factors).sum()

    def oracle(row):
        return float(np.dot(oracle_weights(oracle_scores(row, config), experts, config), factors))

    with jax.enable_x64(True):
        gradient = np.asarray(jax.grad(output)(jnp.asarray(logits)))[0]
    for expert in range(6):
        step = np.zeros(6)
        step[expert] = 1e-6
        expected = (oracle(logits[0] + step) - oracle(logits[0] - step)) / 2e-6
        np.testing.assert_allclose(gradient[expert], expected, atol=1e-8)
        assert (gradient[expert] == 0) == (expert not in experts)


def test_scores_are_float32_for_bfloat16_activations():
    config = small()
    graphdef = nnx.graphdef(Router(config))
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(9, config.hidden_size)), jnp.bfloat16)
    weight = jnp.asarray(rng.normal(size=(config.hidden_size, 8)), jnp.float32)
    scores, routing = nnx.merge(graphdef, {"weight": weight, "bias": jnp.zeros(8)})(x)
    assert scores.dtype == routing.weights.dtype == jnp.float32
    exact = 1 / (1 + np.exp(-(np.asarray(x, np.float64) @ np.asarray(weight, np.float64))))
    np.testing.assert_allclose(scores, exact, rtol=1e-5)


def test_load_counts_valid_choices():
    experts = jnp.array([[0, 3], [3, 1], [3, 0]])
    assert expert_load(experts, 5).tolist() == [2, 1, 0, 3, 0]
    assert expert_load(experts, 5, jnp.array([True, False, True])).tolist() == [2, 0, 0, 2, 0]


def test_the_zoo_routes_as_the_papers_do():
    v3, lite = zoo.deepseek_v3().moe, zoo.deepseek_v2_lite().moe
    assert (v3.score_function, v3.group_score, v3.normalize_weights, v3.use_bias) == ("sigmoid", "top2_sum", True, True)
    expected = ("softmax", False, False, 1.0)
    assert (lite.score_function, lite.normalize_weights, lite.use_bias, lite.routed_scale) == expected
