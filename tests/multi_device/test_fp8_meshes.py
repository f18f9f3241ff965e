"""FP8 training over meshes: what one device computes, within what tiles of other tokens may change.

A forward pass rounds each token by itself, so losses agree as float32 sums do. A weight's gradient is made of tiles of
128 tokens that share scales, and experts over devices see the tokens of several microbatches in one tile: there the
rounding differs, within E4M3's precision.
"""

from __future__ import annotations

import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from small_model import gradient_descent, hyperparameters, packed, quickly, small

from deepseek_jax.model.parameters import abstract_values
from deepseek_jax.model.quantized import QuantizedWeight
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.dispatch.travel import FP8, bytes_there
from deepseek_jax.parallel.mesh import ParallelConfig, make_mesh
from deepseek_jax.parallel.placement import place
from deepseek_jax.parallel.sharding import BATCH_SPEC
from deepseek_jax.precision.policy import Fp8Config
from deepseek_jax.training import canonical
from deepseek_jax.training.sharding_table import abstract_mesh, step_collectives
from deepseek_jax.training.step import Trainer
from deepseek_jax.training.step_config import StepConfig
from deepseek_jax.tree import flatten

CONFIG = small(num_layers=2, num_dense_layers=1, mtp_depth=1)
DOCUMENTS = [[13], [5, 8], [4, 4], [3, 10], [6], [1, 12], [2], [9, 3]]
ROWS, LENGTH, RATE = 16, 12, 0.1
SAME_TILES, OTHER_TILES = 1e-3, 6e-2
"""Of the norm of each parameter's change in two steps. With the same tiles, sums in another order now and then round to
another code."""


def make(parallel: ParallelConfig, mesh=None) -> Trainer:
    mesh = mesh or make_mesh(parallel, jax.devices()[: np.prod(parallel.shape)])
    placement = place(CONFIG, stage_map=parallel.schedule_choice.stage_map)
    options = StepConfig(
        schedule=parallel.schedule,
        overlap=parallel.overlap,
        microbatch_rows=1,
        balance_weight=0.01,
        dispatch_dtype=FP8,
    )
    return quickly(Trainer(Transformer(CONFIG, Fp8Config()), placement, mesh, gradient_descent, options))


@functools.cache
def course(parallel: ParallelConfig):
    """Losses of two steps and of an evaluation, loads, and how far each parameter moved."""
    trainer = make(parallel)
    state = trainer.initial_state(0)
    begin = {name: np.asarray(array) for name, array in canonical.to_canonical(trainer, state).items()}
    losses, loads = [], []
    for seed in range(2):
        rows = packed(CONFIG, [DOCUMENTS[(row + seed) % 8] for row in range(ROWS)], length=LENGTH, seed=seed)
        batch = jax.device_put(rows, NamedSharding(trainer.mesh, BATCH_SPEC))
        state, metrics = trainer.step(state, batch, hyperparameters(learning_rate=RATE))
        losses.append(float(metrics.loss))
        loads.append(np.asarray(metrics.load))
    loss, labels = trainer.evaluate(state, batch)
    end = {name: np.asarray(array) for name, array in canonical.to_canonical(trainer, state).items()}
    moved = {name: end[name] - begin[name] for name in end if name.endswith(("weight", "gate_up", "down"))}
    return losses, float(loss / labels), loads, moved


MESHES = {
    "data 4": (ParallelConfig(data=4, microbatch_rows=1), SAME_TILES),
    "expert 4": (ParallelConfig(expert=4, microbatch_rows=1), OTHER_TILES),
    "node 2 x expert 2, two hops": (ParallelConfig(node=2, expert=2, microbatch_rows=1), OTHER_TILES),
    "1F1B over 2": (ParallelConfig(pipe=2, schedule="one_f_one_b", microbatch_rows=1), SAME_TILES),
    "DualPipe over 2, steady, x expert 2": (
        ParallelConfig(pipe=2, expert=2, overlap="steady", microbatch_rows=1),
        OTHER_TILES,
    ),
}
SAMPLE = ("node 2 x expert 2, two hops",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SAMPLE else pytest.mark.slow) for n in MESHES])
def test_a_mesh_takes_the_steps_of_one_device(name):
    parallel, tolerance = MESHES[name]
    losses, evaluated, loads, moved = course(parallel)
    expected, expected_evaluation, expected_loads, expected_moves = course(ParallelConfig(microbatch_rows=1))
    np.testing.assert_allclose(losses[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(losses[1], expected[1], rtol=1e-6 if tolerance == SAME_TILES else 1e-4)
    np.testing.assert_allclose(evaluated, expected_evaluation, rtol=1e-5 if tolerance == SAME_TILES else 5e-3)
    np.testing.assert_array_equal(loads[0], expected_loads[0])
    assert moved.keys() == expected_moves.keys()
    for weight, value in expected_moves.items():
        difference = np.linalg.norm(moved[weight] - value) / np.linalg.norm(value)
        assert difference < tolerance, (weight, difference)


def test_tokens_travel_as_codes_and_scales_and_return_in_the_compute_dtype():
    """Section 3.3.3: dispatch, and the gradients before the down projection, in FP8; what is summed is not."""
    parallel = ParallelConfig(expert=4)
    trainer = make(parallel, abstract_mesh(parallel))
    exchanges = [one for one in step_collectives(trainer, (ROWS, LENGTH + 1)) if one.kind == "all_to_all"]
    of_rows = collections.Counter()
    for one in exchanges:
        if one.shape[-1] == CONFIG.hidden_size:
            of_rows[one.dtype] += one.calls
    layers = CONFIG.num_layers - CONFIG.num_dense_layers + CONFIG.mtp_depth
    both_ways = 2 * layers * trainer.microbatches((ROWS, LENGTH + 1))
    assert of_rows == {"float8_e4m3fn": both_ways, "float32": both_ways}
    assert sum(one.calls for one in exchanges if one.shape[-1] == 1 and one.dtype == "float32") == both_ways


def test_a_row_of_deepseek_v3_takes_7392_bytes():
    """7168 codes and 56 scales (facts 7.1)."""
    assert bytes_there(7168, FP8) == 7392
    assert bytes_there(7168, jnp.bfloat16) == 14336


def codes_of(trainer: Trainer) -> list[tuple[int, ...]]:
    """Shapes of all codes of a rank's stage."""
    codes = flatten(abstract_values(trainer.model, QuantizedWeight))
    stacked = trainer.params_layout.abstract()
    names = [name.removesuffix("_codes") for name in codes if name.endswith("_codes")]
    return [flatten(stacked)[name].shape[1:] for name in names]


def test_a_mirrored_stage_gets_codes_and_no_weight():
    """Over DualPipe's two ranks: codes and scales to the other rank, and float32 gradients back."""
    parallel = ParallelConfig(pipe=2, microbatch_rows=1)
    trainer = make(parallel, abstract_mesh(parallel))
    sent = [one for one in step_collectives(trainer, (4, LENGTH + 1)) if one.purpose == "mirror"]
    numbers = collections.Counter()
    for one in sent:
        numbers[one.dtype] += one.calls * math.prod(one.shape)
    weights = sum(np.prod(shape) for shape in codes_of(trainer))
    assert numbers["float8_e4m3fn"] == weights
    # Gradients of all weights back; of what is not quantised (norms, the router, MTP's projection) the weights as well.
    assert numbers["float32"] < 1.5 * weights
