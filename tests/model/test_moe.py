"""The MoE layer (equations 12-15) against loops over tokens and experts, and its gradients against a dense form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_model import small

from deepseek_jax.config import ModelConfig, MoEConfig
from deepseek_jax.model.context import LayerContext
from deepseek_jax.model.moe import MoE
from deepseek_jax.model.router import combine_weights, router_scores, select_experts, sequence_balance_loss
from deepseek_jax.parallel.dispatch import LocalDispatcher
from deepseek_jax.tree import flatten, unflatten

SOFTMAX = {"score_function": "softmax", "group_score": "max", "normalize_weights": False, "use_bias": False}
CONFIGS = {
    "v3": small(),
    "v2": small(moe=SOFTMAX | {"num_shared_experts": 2}),
    "no_shared_expert": small(moe={"num_shared_experts": 0, "num_groups": 1, "groups_per_token": 1}),
}
BATCH, LENGTH = 2, 5


def context(moe: MoEConfig, **changes) -> LayerContext:
    unused = jnp.zeros(0)
    return LayerContext(unused, unused, LocalDispatcher(moe.num_experts, alignment=4), **changes)


def draw(config: ModelConfig, seed: int = 0):
    """A module's structure and float64 values, with the last expert out of everyone's reach."""
    module = MoE(config)
    rng = np.random.default_rng(seed)
    variables = nnx.to_pure_dict(nnx.state(module))
    values = {name: rng.normal(size=leaf.shape) * 0.3 for name, leaf in flatten(variables).items()}
    if config.moe.use_bias:
        values["router.bias"][-1] = -10
    x = rng.normal(size=(BATCH, LENGTH, config.hidden_size))
    return nnx.graphdef(module), values, x


@functools.partial(jax.jit, static_argnames=("graphdef", "from_routed"))
def layer(graphdef, values, x, valid=None, *, from_routed=False):
    module = nnx.merge(graphdef, unflatten(values))
    ctx = context(module.router.config, valid=valid, balance_from_routed=from_routed)
    return module(x, ctx), module.router(x.reshape(-1, x.shape[-1]))


def silu(x):
    return x / (1 + np.exp(-x))


def ffn(x, gate_up, down):
    """SwiGLU of one token."""
    size = down.shape[0]
    return (silu(x @ gate_up[:, :size]) * (x @ gate_up[:, size:])) @ down


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_layer_equals_a_loop_over_tokens_and_experts(config):
    graphdef, values, x = draw(config)
    with jax.enable_x64(True):
        out, _ = layer(graphdef, values, x)
        scores = router_scores(jnp.asarray(x.reshape(-1, x.shape[-1]) @ values["router.weight"]), config.moe)
        experts = select_experts(scores, values.get("router.bias"), config.moe)
        weights = combine_weights(scores, experts, config.moe)
        balance = sequence_balance_loss(scores.reshape(BATCH, LENGTH, -1), None, config.moe)
    experts, weights = np.asarray(experts), np.asarray(weights)
    expected, load = np.zeros_like(x).reshape(-1, x.shape[-1]), np.zeros(config.moe.num_experts, int)
    for token, row in enumerate(x.reshape(-1, x.shape[-1])):
        if config.moe.num_shared_experts:
            expected[token] += ffn(row, values["shared.gate_up.weight"], values["shared.down.weight"])
        for expert, weight in zip(experts[token], weights[token], strict=True):
            expected[token] += weight * ffn(row, values["experts.gate_up"][expert], values["experts.down"][expert])
            load[expert] += 1
    np.testing.assert_allclose(out.y, expected.reshape(x.shape), rtol=1e-9, atol=1e-12)
    assert out.stats.load.tolist() == load.tolist()
    np.testing.assert_allclose(out.balance_loss, balance, rtol=1e-9)


@pytest.mark.parametrize("config", [CONFIGS["v3"], CONFIGS["v2"]], ids=["v3", "v2"])
def test_gradients_equal_those_of_a_dense_layer(config):
    graphdef, values, x = draw(config)
    cotangent = np.random.default_rng(1).normal(size=x.shape)
    bias = values.pop("router.bias", None)

    def grouped(values, x):
        state = {**values} if bias is None else {**values, "router.bias": jnp.asarray(bias)}
        out = nnx.merge(graphdef, unflatten(state))(x, context(config.moe))
        return (out.y * cotangent).sum()

    def dense(values, x):
        """Every expert computes every token; a `[T, E]` matrix of weights, zero off the choice, selects."""
        tokens = x.reshape(-1, x.shape[-1])
        scores = router_scores(tokens @ values["router.weight"], config.moe)
        experts = select_experts(scores, bias, config.moe)
        chosen = (experts[..., None] == jnp.arange(config.moe.num_experts)).any(axis=1)
        weights = jnp.where(chosen, scores, 0.0)
        if config.moe.normalize_weights:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        gate, up = jnp.split(jnp.einsum("td,edf->tef", tokens, values["experts.gate_up"]), 2, axis=-1)
        outputs = jnp.einsum("tef,efd->ted", jax.nn.silu(gate) * up, values["experts.down"])
        y = config.moe.routed_scale * jnp.einsum("te,ted->td", weights, outputs)
        gate, up = jnp.split(tokens @ values["shared.gate_up.weight"], 2, axis=-1)
        y = y + (jax.nn.silu(gate) * up) @ values["shared.down.weight"]
        return (y.reshape(x.shape) * cotangent).sum()

    with jax.enable_x64(True):
        arguments = jax.tree.map(jnp.asarray, values), jnp.asarray(x)
        ours, expected = (jax.jit(jax.grad(f, (0, 1)))(*arguments) for f in (grouped, dense))
    np.testing.assert_allclose(ours[1], expected[1], rtol=1e-9, atol=1e-12)
    for name in values:
        np.testing.assert_allclose(ours[0][name], expected[0][name], rtol=1e-9, atol=1e-12, err_msg=name)
    if bias is not None:
        np.testing.assert_array_equal(ours[0]["experts.gate_up"][-1], 0)  # the expert that nobody chose


def test_padding_is_left_out_of_routing_load_and_balance_loss():
    config = CONFIGS["v3"].moe
    graphdef, values, x = draw(CONFIGS["v3"])
    valid = np.ones((BATCH, LENGTH), bool)
    valid[1, 2:] = False
    with jax.enable_x64(True):
        out, (scores, routing) = layer(graphdef, values, x, valid)
        unmasked, _ = layer(graphdef, values, x)
        balance = sequence_balance_loss(scores.reshape(BATCH, LENGTH, -1), None, config, valid)
    chosen = np.asarray(routing.experts)[valid.ravel()]
    assert out.stats.load.tolist() == np.bincount(chosen.ravel(), minlength=config.num_experts).tolist()
    np.testing.assert_allclose(out.balance_loss, balance, rtol=1e-9)
    assert abs(float(out.balance_loss) - float(unmasked.balance_loss)) > 1e-3
    np.testing.assert_allclose(out.y[valid], unmasked.y[valid], rtol=1e-9)
    # Padding goes to no routed expert: only shared ones see it.
    shared = np.stack([ffn(row, values["shared.gate_up.weight"], values["shared.down.weight"]) for row in x[~valid]])
    np.testing.assert_allclose(out.y[~valid], shared, rtol=1e-9)
    assert int(out.stats.traffic.received) == valid.sum() * config.experts_per_token


def test_the_balance_loss_can_follow_the_routed_experts():
    config = CONFIGS["v3"].moe
    graphdef, values, x = draw(CONFIGS["v3"])
    with jax.enable_x64(True):
        raw, _ = layer(graphdef, values, x)
        routed, (scores, routing) = layer(graphdef, values, x, from_routed=True)
        shape = (BATCH, LENGTH, -1)
        expected = sequence_balance_loss(scores.reshape(shape), routing.experts.reshape(shape), config)
    np.testing.assert_allclose(routed.balance_loss, expected, rtol=1e-9)
    assert float(routed.balance_loss) != float(raw.balance_loss)
