"""Analytic bytes of a step."""

import jax
import jax.numpy as jnp
import pytest
from small_model import small

from deepseek_jax import ops, zoo
from deepseek_jax.planning.memory import StepMemory, layer_activations, layer_bytes, step_memory
from deepseek_jax.planning.parameters import total_parameters
from deepseek_jax.precision.policy import Fp8Config


def test_weights_gradients_and_moments():
    config = small()
    count = total_parameters(config)
    memory = step_memory(config, 0, moment_bytes=2)
    head = 2 * 24 * 64 * 4  # main and MTP loss, D 24, V 64
    parts = {"parameters": 4 * count, "gradients": 4 * count, "moments": 4 * count}
    assert memory == StepMemory(**parts, head_gradients=head, activations=0)
    assert memory.total == 12 * count + head


@pytest.mark.parametrize(
    ("compute_bytes", "microbatches", "parameters", "gradients"),
    [(4, 1, 4, 4), (4, 8, 4, 4 + 4), (2, 1, 4 + 2, 4 + 2), (2, 8, 4 + 2, 4 + 2)],
)
def test_copies_of_weights_and_gradients(compute_bytes, microbatches, parameters, gradients):
    """bfloat16 computes with copies; several microbatches need a sum besides the gradient of the one at work."""
    config = small()
    count = total_parameters(config)
    memory = step_memory(config, 0, compute_bytes=compute_bytes, microbatches=microbatches)
    assert (memory.parameters, memory.gradients) == (parameters * count, gradients * count)
    assert memory.moments == 8 * count


@pytest.mark.parametrize("mtp_depth", [0, 2])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_every_loss_keeps_a_gradient_of_the_head(mtp_depth, dtype):
    """`ops.cross_entropy_sum` keeps `[D, V]` for the backward pass: once for the main model, once per MTP module."""
    config = small(mtp_depth=mtp_depth)
    head = jax.ShapeDtypeStruct((config.hidden_size, config.vocab_size), dtype)
    hidden = jax.ShapeDtypeStruct((8, config.hidden_size), dtype)
    labels, weights = (jax.ShapeDtypeStruct((8,), kind) for kind in (jnp.int32, jnp.float32))

    def backward(hidden, head, labels, weights):
        return jax.vjp(lambda hidden, head: ops.cross_entropy_sum(hidden, head, labels, weights), hidden, head)[1]

    residuals = jax.tree.leaves(jax.eval_shape(backward, hidden, head, labels, weights))
    (kept,) = (leaf for leaf in residuals if leaf.shape == head.shape)
    memory = step_memory(config, 8, compute_bytes=head.dtype.itemsize)
    assert memory.head_gradients == (1 + mtp_depth) * kept.size * kept.dtype.itemsize


def test_activations_of_a_layer_by_hand():
    config = small(num_layers=2, num_dense_layers=1, mtp_depth=0)  # D 24, H 2, q 12, latent 16, qk 12, v 8, F 40
    attention = 2 * 24 + 2 * 16 + 2 * 12 + 2 * 2 * 12 + 2 * 2 * 8 + 2
    assert layer_activations(config, dense=True) == attention + 2 * 24 + 3 * 40
    moe = attention + 2 * 24 + 8 + 3 * 16 + 2 * (2 * 24 + 3 * 16)
    assert layer_activations(config, dense=False) == moe
    per_token = layer_activations(config, dense=True) + moe + 2 * 24
    assert step_memory(config, 10, recompute="none").activations == 10 * per_token * 4
    assert step_memory(config, 10, recompute="none", compute_bytes=2).activations == 10 * per_token * 2


def test_selective_recomputation_keeps_what_the_block_names():
    config = zoo.bench()  # D 256, H 8, q 96, latent 64 + 16, v 32, dense F 768, 32 experts of F 128, 4 + 1 a token
    kept = 2 * 256 + 96 + 64 + 16 + 8 * 33
    assert layer_activations(config, dense=True, selective=True) == kept + 2 * 768
    assert layer_activations(config, dense=False, selective=True) == kept + 32 + 5 * 2 * 128
    selective, whole = (step_memory(config, 4096, recompute=mode).activations for mode in ("selective", "none"))
    assert selective < whole / 2


def test_recomputation_keeps_one_layer_and_the_inputs():
    config = zoo.bench()
    kept, whole = (step_memory(config, 4096, recompute=mode).activations for mode in ("full", "none"))
    layer = layer_activations(config, dense=False)
    assert kept == 4096 * 4 * (config.num_layers * 256 + layer + 2 * 256)
    assert kept < whole / 3


def test_fp8_copies_weights_in_bytes_and_gives_them_float32_gradients():
    config = small(num_layers=1, num_dense_layers=1, mtp_depth=0)  # D 24, H 2, q 12, latent 16, qk 8 + 4, v 8, F 40
    matrices = {
        "q_a": (24, 12),
        "q_b": (12, 2 * 12),
        "kv_a": (24, 16 + 4),
        "kv_b": (16, 2 * (8 + 8)),
        "o": (2 * 8, 24),
        "gate_up": (24, 2 * 40),
        "down": (40, 24),
    }
    count, quantised = total_parameters(config), sum(rows * columns for rows, columns in matrices.values())
    memory = step_memory(config, 0, compute_bytes=2, fp8=Fp8Config())
    scales = 4 * len(matrices)  # none is larger than a block
    assert memory.parameters == 4 * count + 2 * (count - quantised) + quantised + scales
    assert memory.gradients == 4 * count + 2 * (count - quantised) + 4 * quantised
    some = step_memory(config, 0, compute_bytes=2, fp8=Fp8Config(layers=("dense_ffn",)))
    assert some.gradients == 4 * count + 2 * count + 2 * (24 * 80 + 40 * 24)


@pytest.mark.parametrize("selective", [True, False])
def test_fp8_halves_what_linear_layers_and_swiglu_keep(selective):
    """Section 3.3.3: codes with a scale for 128, attention's output in twelve bits, SwiGLU's output made again."""
    config = zoo.deepseek_v3()  # D 7168, q 1536, latent 512 + 64, H 128 of v 128, qk 192, 1 + 8 experts of F 2048
    tiles, packed = 1 + 4 / 128, 1.5 + 4 / 128
    found = layer_bytes(config, dense=False, selective=selective, compute_bytes=2, fp8=True)
    attention, gate_up = packed * 128 * 128, tiles * 9 * 2 * 2048
    if selective:
        assert found == 2 * (2 * 7168 + 1536 + 512 + 64 + 128 + 256) + attention + gate_up
        return
    core = 2 * (2 * 128 * 192 + 128 * 128 + 128)
    plain = 2 * (2 * 7168 + 1536 + 512 + 256) + core
    inputs = tiles * (7168 + 1536 + 512 + 7168 + 8 * 7168)  # norms' outputs, and eight visits of a token to experts
    assert found == plain + 2 * 7168 + inputs + attention + gate_up
