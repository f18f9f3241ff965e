"""Every schedule takes the steps of one device, over real blocks: losses, gradients, loads and biases.

MLA, MoE with exchanges, balance loss, dense layers, MTP; stages of unequal depth, short last microbatches, evaluation.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from small_model import abstract_state, gradient_descent, hyperparameters, packed, quickly, small

from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.mesh import ParallelConfig, make_mesh
from deepseek_jax.parallel.placement import place
from deepseek_jax.parallel.sharding import BATCH_SPEC
from deepseek_jax.training import canonical
from deepseek_jax.training.step import Trainer
from deepseek_jax.training.step_config import StepConfig

CONFIG = small(num_layers=17, num_dense_layers=2, mtp_depth=1)
DEEPER = dataclasses.replace(CONFIG, mtp_depth=2)
LENGTH, RATE = 12, 0.2
SCHEDULES = (
    "gpipe", "one_f_one_b", "eager_one_f_one_b", "interleaved_one_f_one_b", "zb_h1", "dualpipe", "dualpipe_v"
)  # fmt: skip
MESHES = {2: {"data": 2, "expert": 2}, 4: {"expert": 2}, 8: {}}
SAMPLE = {("dualpipe", 2, "steady"), ("zb_h1", 4, "none"), ("dualpipe_v", 2, "none")}
CASES = [(name, pipe, "none") for name in SCHEDULES for pipe in MESHES]
CASES += [(name, pipe, how) for name in ("dualpipe", "dualpipe_v", "eager_one_f_one_b") for pipe in (2, 4)
          for how in ("steady", "braid")]  # fmt: skip
CASES += [("dualpipe", 8, "braid")]


def cases():
    """Every schedule, size and way; the slow mark leaves a sample."""
    for case in CASES:
        yield pytest.param(*case, marks=() if case in SAMPLE else pytest.mark.slow, id="-".join(map(str, case)))


def make(parallel: ParallelConfig, config=CONFIG, *, dtype=jnp.float64, optimizer=gradient_descent, **step) -> Trainer:
    mesh = make_mesh(parallel, jax.devices()[: np.prod(parallel.shape)])
    placement = place(config, parallel.layers_per_stage, stage_map=parallel.schedule_choice.stage_map)
    step = {"compute_dtype": dtype, "balance_weight": 0.01, "microbatch_rows": parallel.microbatch_rows} | step
    options = StepConfig(schedule=parallel.schedule, overlap=parallel.overlap, **step)
    return quickly(Trainer(Transformer(config), placement, mesh, optimizer, options))


def batch_of(trainer: Trainer, rows: int, seed: int = 0, config=CONFIG):
    """Packed documents, then as many empty rows as the trainer needs: the last microbatches are short."""
    documents = [[13], [5, 8], [4, 4], [3, 10], [6], [1, 12], [2], [9, 3]]
    filled = [documents[(row + seed) % 8] for row in range(rows)]
    filled += [[]] * (trainer.padded_rows(rows) - rows)
    return jax.device_put(packed(config, filled, length=LENGTH, seed=seed), NamedSharding(trainer.mesh, BATCH_SPEC))


def course(trainer: Trainer, rows: int, *, steps: int = 2, dtype=jnp.float64, config=CONFIG):
    """Metrics of each step, a later evaluation, and the canonical arrays at the end."""
    state = trainer.fresh_state(trainer.params_layout.initial(0, dtype), trainer.bias_layout.initial(0, dtype))
    hyper = hyperparameters(learning_rate=RATE, bias_rate=0.01, dtype=dtype)
    seen = []
    for seed in range(steps):
        state, metrics = trainer.step(state, batch_of(trainer, rows, seed, config), hyper)
        seen.append(jax.tree.map(np.asarray, metrics))
    evaluated = trainer.evaluate(state, batch_of(trainer, rows, steps, config))
    arrays = {name: np.asarray(array) for name, array in canonical.to_canonical(trainer, state).items()}
    return seen, [float(value) for value in evaluated], arrays


@functools.cache
def one_device(rows: int, config=CONFIG):
    return course(make(ParallelConfig(), config), rows, config=config)


def assert_same_course(trainer: Trainer, rows: int, config=CONFIG):
    """Loads and biases exactly; losses, norms, parameters (so gradients) and evaluation to 1e-9."""
    seen, evaluated, arrays = course(trainer, rows, config=config)
    wanted, wanted_evaluation, wanted_arrays = one_device(rows, config)
    for step, (metrics, expected) in enumerate(zip(seen, wanted, strict=True)):
        np.testing.assert_array_equal(metrics.load, expected.load, err_msg=f"step {step}")
        np.testing.assert_array_equal(metrics.received.sum(axis=1), metrics.load.sum(axis=1), err_msg=f"step {step}")
        for name in ("loss", "loss_main", "loss_mtp", "loss_balance", "grad_norm"):
            value, other = getattr(metrics, name), getattr(expected, name)
            np.testing.assert_allclose(value, other, rtol=1e-9, err_msg=f"{name} of step {step}")
    np.testing.assert_allclose(evaluated, wanted_evaluation, rtol=1e-9)
    assert arrays.keys() == wanted_arrays.keys()
    for name, value in wanted_arrays.items():
        if name.endswith("router.bias"):
            np.testing.assert_array_equal(arrays[name], value, err_msg=name)
        else:
            np.testing.assert_allclose(arrays[name], value, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize(("name", "pipe", "overlap"), cases())
def test_a_schedule_takes_the_steps_of_one_device(name, pipe, overlap):
    """Two steps and an evaluation in float64, of batches whose last microbatches are empty."""
    parallel = ParallelConfig(pipe=pipe, **MESHES[pipe], schedule=name, overlap=overlap, microbatch_rows=1)
    with jax.enable_x64(True):
        trainer = make(parallel)
        # So many that schedules of two slots have steady ticks.
        rows = 4 * pipe * parallel.batch_shards - 1
        assert_same_course(trainer, rows)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_what_is_recomputed_changes_nothing(recompute):
    parallel = ParallelConfig(pipe=2, node=2, expert=2, microbatch_rows=2, overlap="steady")
    with jax.enable_x64(True):
        assert_same_course(make(parallel, recompute=recompute), 31)


@pytest.mark.slow
def test_stages_as_the_user_cuts_them_and_two_mtp_modules():
    """A first stage of dense layers alone, a last one of MTP modules and one layer, in tails of two slots."""
    parallel = ParallelConfig(pipe=4, data=2, layers_per_stage=(2, 6, 8, 1), microbatch_rows=1)
    with jax.enable_x64(True):
        assert_same_course(make(parallel, DEEPER), 16, DEEPER)


@pytest.mark.slow
def test_a_float32_step_agrees():
    """One step to 1e-5; later ones part, since one flipped choice changes all after it."""
    with jax.enable_x64(False):
        parallel = ParallelConfig(pipe=2, data=2, expert=2, microbatch_rows=1)
        (many,), _, arrays = course(make(parallel, dtype=jnp.float32), 16, steps=1, dtype=jnp.float32)
        (one,), _, expected = course(make(ParallelConfig(), dtype=jnp.float32), 16, steps=1, dtype=jnp.float32)
    np.testing.assert_array_equal(many.load, one.load)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(getattr(many, name), getattr(one, name), rtol=1e-5)
    for name, value in expected.items():
        np.testing.assert_allclose(arrays[name], value, rtol=1e-5, atol=2e-6, err_msg=name)


@pytest.mark.slow
def test_a_bfloat16_step_agrees():
    """Of losses 1e-3, of the norm of the gradient 2e-2: bfloat16 has 8 bits, and sums are in other orders."""
    parallel = ParallelConfig(pipe=2, data=2, expert=2, microbatch_rows=1)
    (many,), _, _ = course(make(parallel, dtype=jnp.bfloat16), 16, steps=1, dtype=jnp.float32)
    (one,), _, _ = course(make(ParallelConfig(), dtype=jnp.bfloat16), 16, steps=1, dtype=jnp.float32)
    np.testing.assert_allclose(many.loss, one.loss, rtol=1e-3)
    np.testing.assert_allclose(many.grad_norm, one.grad_norm, rtol=2e-2)


# --- the program ------------------------------------------------------------------------------------------------------


def jaxpr_of(parallel: ParallelConfig, microbatches: int, config=CONFIG):
    trainer = make(parallel, config, dtype=jnp.float32)
    rows = parallel.batch_shards * microbatches
    batch = packed(config, [[13]] * rows, length=LENGTH)
    return jax.make_jaxpr(trainer._sharded_step, static_argnums=3)(abstract_state(trainer), batch, hyperparameters(), 0)


def equations(jaxpr):
    """All equations, with those of inner programs."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


def scans_over_ticks(jaxpr) -> list:
    """Bodies of the scans that carry rings, from the first on: those whose carry is largest."""
    scans = [eqn for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "scan"]
    most = max(eqn.params["num_carry"] for eqn in scans)
    return [eqn for eqn in scans if eqn.params["num_carry"] >= most - 40]
