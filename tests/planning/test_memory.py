"""Analytic bytes of a step."""

from small_model import small

from deepseek_jax import zoo
from deepseek_jax.planning.memory import StepMemory, layer_activations, step_memory
from deepseek_jax.planning.parameters import total_parameters


def test_weights_gradients_and_moments():
    config = small()
    count = total_parameters(config)
    memory = step_memory(config, 0, moment_bytes=2)
    assert memory == StepMemory(parameters=4 * count, gradients=4 * count, moments=4 * count, activations=0)
    assert memory.total == 12 * count


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
