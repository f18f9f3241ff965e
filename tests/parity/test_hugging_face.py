"""Parity with Hugging Face's `DeepseekV3ForCausalLM`: logits, first gradients, and twenty steps of training."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from small_model import ATTENTION, MOE, full, gradient_descent, hyperparameters, run_step, small, trainer

from deepseek_jax.config import YarnConfig
from deepseek_jax.parallel.pipeline.stage import merge
from deepseek_jax.training.optimizer import OptimizerConfig
from deepseek_jax.tree import map_leaves

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
hf = pytest.importorskip("hf")

BASE = small(mtp_depth=0, hidden_size=32)
CONFIGS = {
    "v3": BASE,
    "no_q_lora": dataclasses.replace(BASE, attention=dataclasses.replace(ATTENTION, q_lora_rank=None)),
    "one_group_two_shared": dataclasses.replace(
        BASE, moe=dataclasses.replace(MOE, num_groups=1, groups_per_token=1, num_shared_experts=2, experts_per_token=3)
    ),
    "yarn": dataclasses.replace(
        BASE,
        attention=dataclasses.replace(
            ATTENTION, qk_rope_head_dim=16, yarn=YarnConfig(factor=8.0, original_length=32, beta_fast=4.0)
        ),
    ),
    "no_renormalisation_unusual_eps": dataclasses.replace(
        BASE, rms_norm_eps=1e-3, moe=dataclasses.replace(MOE, normalize_weights=False, routed_scale=1.5)
    ),
}
ROWS, LENGTH = 4, 24
STEPS = 20


def pair(config, *, optimizer=gradient_descent, seed=0, clip_norm=1.0):
    """Their model and our state, with the same weights and the same random selection biases."""
    model = hf.build(config, seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers[config.num_dense_layers :]:
        gate = layer.mlp.gate
        gate.e_score_correction_bias.copy_(0.3 * torch.randn(config.moe.num_experts, generator=generator) - 0.5)
    runner = trainer(config, optimizer=optimizer, clip_norm=clip_norm, balance_weight=0.0)
    params = runner.params_layout.stack(put(hf.to_ours(config, model.state_dict())))
    bias = runner.bias_layout.stack(put(hf.biases(config, model)))
    return model, runner, runner.fresh_state(params, bias)


def put(arrays):
    return {name: jax.device_put(array, jax.devices()[0]) for name, array in arrays.items()}


def mean_loss(model, batch):
    """The plain mean cross entropy of the next token."""
    tokens = torch.tensor(batch.tokens, dtype=torch.long)
    logits = model(tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits(config):
    model, runner, state = pair(config)
    tokens = full(config, ROWS, LENGTH).tokens[:, :-1]
    with torch.no_grad():
        theirs = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    merged = {kind: merge(tree, state.router_bias.get(kind)) for kind, tree in state.params.items()}
    merged = {
        kind: map_leaves(lambda leaf: leaf[0], tree) if kind in ("dense", "moe") else tree
        for kind, tree in merged.items()
    }
    graphdef = nnx.graphdef(runner.model)
    ours = np.asarray(jax.jit(lambda values, tokens: nnx.merge(graphdef, values)(tokens))(merged, tokens))
    assert theirs.std() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("name", ["v3", "no_q_lora"])
def test_weights_go_there_and_back(name):
    config = CONFIGS[name]
    model = hf.build(config)
    there = hf.to_theirs(config, hf.to_ours(config, model.state_dict()))
    expected = dict(model.named_parameters())
    assert set(there) == set(expected)
    for key, tensor in there.items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("config", [CONFIGS["v3"], CONFIGS["no_q_lora"]], ids=["v3", "no_q_lora"])
def test_first_gradients(config):
    """Of every tensor, relative to its norm: the step is gradient descent, so parameters move by the gradients."""
    model, runner, state = pair(config, clip_norm=1e9)
    batch = full(config, ROWS, LENGTH)
    loss = mean_loss(model, batch)
    loss.backward()
    expected = hf.to_ours(config, {name: p.grad for name, p in model.named_parameters()})
    before = {name: np.asarray(value) for name, value in runner.params_layout.unstack(state.params).items()}
    # Large, so that the parameters' own rounding is small against the move.
    rate = 2.0**6
    state, metrics = run_step(runner, state, batch, hyperparameters(learning_rate=rate, bias_rate=0.0))
    after = runner.params_layout.unstack(state.params)
    np.testing.assert_allclose(metrics.loss, loss.item(), rtol=1e-5)
    squares = 0.0
    for name, gradient in expected.items():
        ours = (before[name] - np.asarray(after[name])) / rate
        norm = np.linalg.norm(gradient)
        assert norm > 0, name
        assert np.linalg.norm(ours - gradient) < 1e-4 * norm, name
        squares += norm.astype(float) ** 2
    np.testing.assert_allclose(metrics.grad_norm, np.sqrt(squares), rtol=1e-4)


@pytest.mark.parametrize("config", [CONFIGS["v3"], CONFIGS["no_q_lora"]], ids=["v3", "no_q_lora"])
def test_twenty_steps_of_adamw(config):
    """The same weights and batches, clipping at 1, decay on matrices only, no bias update: losses within 1e-4."""
    constants = OptimizerConfig()
    model, runner, state = pair(config, optimizer=constants.make)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    scales = [p for p in model.parameters() if p.ndim == 1]
    rate = 3e-3
    theirs = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": constants.weight_decay}, {"params": scales, "weight_decay": 0.0}],
        lr=rate,
        betas=(constants.beta1, constants.beta2),
        eps=constants.epsilon,
    )
    hyper = hyperparameters(learning_rate=rate, bias_rate=0.0)
    expected, ours = [], []
    for step in range(STEPS):
        batch = full(config, ROWS, LENGTH, seed=step % 4)
        theirs.zero_grad()
        loss = mean_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), constants.clip_norm)
        theirs.step()
        expected.append(loss.item())
        state, metrics = run_step(runner, state, batch, hyper)
        ours.append(float(metrics.loss))
    np.testing.assert_allclose(ours, expected, rtol=1e-4)
    assert expected[-1] < expected[0] - 0.1
