"""The latent cache against recomputation: MLA expanded = absorbed, prefill + decode = the whole sequence at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.config import YarnConfig
from deepseek_jax.inference.cache import LatentCache
from deepseek_jax.inference.forward import decode_step, extend, prefill
from tests.inference.conftest import CONFIG, layer_of, lively_model


@pytest.mark.parametrize("yarn", [None, YarnConfig(factor=4.0, original_length=16, mscale=1.0, mscale_all_dim=0.8)])
@pytest.mark.parametrize("q_lora_rank", [None, 12])
def test_mla_absorbed_equals_expanded(q_lora_rank, yarn):
    """Equations 1-11 in both forms: W_UK folded into the query, W_UV applied to the attended latent."""
    attention_config = dataclasses.replace(CONFIG.attention, q_lora_rank=q_lora_rank, yarn=yarn)
    with jax.enable_x64(True):
        model = lively_model(dataclasses.replace(CONFIG, attention=attention_config), jnp.float64)
        attention = layer_of(model.dense, 0).attention
        x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, CONFIG.hidden_size)))
        ctx = model.context(jnp.broadcast_to(jnp.arange(9), (2, 9)), dtype=x.dtype)
        expected, entries = jax.jit(lambda a, x: a.expanded(x, ctx))(attention, x)
        cache = jax.jit(lambda a, x: a.cache_entries(x, ctx))(attention, x)
        np.testing.assert_allclose(entries, cache, rtol=0, atol=1e-12)
        unused = jnp.full((2, 3, cache.shape[-1]), 7.0)  # entries of no token yet: masked, whatever they hold
        visible = jnp.broadcast_to(jnp.tril(jnp.ones((9, 12), bool)), (2, 9, 12))
        held = jnp.concatenate([cache, unused], axis=1)
        absorbed = jax.jit(lambda a, x, held: a.absorbed(x, held, visible, ctx))(attention, x, held)
        assert float(jnp.abs(expected).max()) > 0.1
        np.testing.assert_allclose(absorbed, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4)])
def test_prefill_and_decode_give_the_logits_of_full_recomputation(dtype, tolerance):
    lengths, total = [3, 7], 16
    with jax.enable_x64(dtype == "float64"):
        model = lively_model(CONFIG, dtype)
        tokens = np.random.default_rng(1).integers(CONFIG.vocab_size, size=(2, total))
        expected = jax.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(tokens, jnp.int32))
        prompts = np.where(np.arange(8) < np.array(lengths)[:, None], tokens[:, :8], 0)
        cache = LatentCache.empty(CONFIG, 2, total, dtype)
        logits, cache = jax.jit(prefill)(model, jnp.asarray(prompts, jnp.int32), jnp.asarray(lengths), cache)
        step = jax.jit(decode_step)
        for done in range(total - max(lengths)):
            at = [length + done for length in lengths]
            for row in range(2):
                np.testing.assert_allclose(logits[row], expected[row, at[row] - 1], rtol=0, atol=tolerance)
            assert cache.lengths.tolist() == at
            logits, cache = step(model, cache, jnp.asarray(tokens[[0, 1], at], jnp.int32))
        assert logits.dtype == dtype


def test_the_routing_of_this_model_depends_on_its_bias(model64):
    """The test above would prove little of the router if its bias were idle."""
    with jax.enable_x64(True):
        router = layer_of(model64.moe, 0).ffn.router
        x = jnp.asarray(np.random.default_rng(0).normal(size=(64, CONFIG.hidden_size)))
        biased = router(x)[1].experts
        router.bias = nnx.Variable(jnp.zeros(CONFIG.moe.num_experts))
        assert (jnp.sort(biased) != jnp.sort(router(x)[1].experts)).any(axis=1).mean() > 0.3


def test_extend_equals_steps_one_by_one(model32):
    rng = np.random.default_rng(2)
    tokens = jnp.asarray(rng.integers(CONFIG.vocab_size, size=(2, 4)), jnp.int32)
    empty = LatentCache.empty(CONFIG, 2, 12)
    held = {kind: jnp.asarray(rng.normal(size=a.shape), a.dtype) for kind, a in empty.entries.items()}
    cache = LatentCache(held, jnp.asarray([2, 5]))
    together, grown = jax.jit(extend)(model32, cache, tokens)
    step = jax.jit(decode_step)
    for i in range(4):
        logits, cache = step(model32, cache, tokens[:, i])
        np.testing.assert_allclose(together[:, i], logits, rtol=0, atol=1e-4)
    assert cache.lengths.tolist() == grown.lengths.tolist() == [6, 9]


def test_compiled_size_does_not_grow_with_depth():
    """Design: compile time of a step must not grow with the number of layers of one kind."""

    def lines(layers: int) -> int:
        config = dataclasses.replace(CONFIG, num_layers=layers)
        model = lively_model(config, jnp.float32)
        cache = LatentCache.empty(config, 1, 8)
        return len(jax.jit(decode_step).lower(model, cache, jnp.zeros(1, jnp.int32)).as_text().splitlines())

    assert lines(6) == lines(8)
