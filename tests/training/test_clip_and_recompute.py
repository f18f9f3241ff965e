"""The gradients of a step: clipped by their global norm, summed in float32, the same whatever is computed again."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from small_model import abstract_state, full, hyperparameters, initial_state, packed, run_step, small, trainer

from deepseek_jax.parallel.pipeline.executor import pipeline
from deepseek_jax.parallel.pipeline.generators import one_rank
from deepseek_jax.parallel.pipeline.protocol import LossScales, StagedModel, Streams
from deepseek_jax.tree import flatten

DENSE = small(num_layers=1, num_dense_layers=1, mtp_depth=0)
EXPERTS = small(num_layers=1, num_dense_layers=0, mtp_depth=0)
BATCH = packed(DENSE, [[9], [4, 5], [6]], length=8)
LEARNING_RATE = 0.01
UNCLIPPED = 1e9


@functools.cache
def stepped(config=DENSE, *, clip_norm: float = UNCLIPPED, recompute: str = "none"):
    """Parameters before and after a step of gradient descent in float64, and its metrics."""
    with jax.enable_x64(True):
        runner = trainer(
            config, compute_dtype=jnp.float64, balance_weight=0.01, clip_norm=clip_norm, recompute=recompute
        )
        before = initial_state(runner, jnp.float64)
        start = flatten(jax.tree.map(np.array, before.params))
        state, metrics = run_step(
            runner, before, BATCH, hyperparameters(learning_rate=LEARNING_RATE, dtype=jnp.float64)
        )
        return start, *jax.tree.map(np.array, (flatten(state.params), metrics))


def gradients() -> dict[str, np.ndarray]:
    """By how far the unclipped step moved each parameter."""
    before, after, _ = stepped()
    return {name: (before[name] - after[name]) / LEARNING_RATE for name in before}


# --- clipping -------------------------------------------------------------------------------------------------------


def test_the_gradient_norm_is_that_of_all_parameters_together():
    norm = np.sqrt(sum(np.square(gradient).sum() for gradient in gradients().values()))
    assert norm > 1
    np.testing.assert_allclose(stepped()[2].grad_norm, norm, rtol=1e-9)


def test_a_gradient_longer_than_the_clip_is_scaled_down_to_it():
    """Section 4.2: every parameter moves by lr x g x clip / norm, and the norm is told as it was before."""
    _, _, unclipped = stepped()
    clip = float(np.float32(unclipped.grad_norm / 4))
    before, after, metrics = stepped(clip_norm=clip)
    for name, gradient in gradients().items():
        wanted = before[name] - LEARNING_RATE * gradient * clip / unclipped.grad_norm
        np.testing.assert_allclose(after[name], wanted, rtol=1e-9, atol=1e-13, err_msg=name)
    np.testing.assert_allclose(metrics.grad_norm, unclipped.grad_norm, rtol=1e-12)
    moved = np.sqrt(sum(np.square(before[name] - after[name]).sum() for name in before)) / LEARNING_RATE
    np.testing.assert_allclose(moved, clip, rtol=1e-9)


def test_a_gradient_shorter_than_the_clip_stays_as_it_is():
    _, expected, unclipped = stepped()
    _, after, _ = stepped(clip_norm=float(unclipped.grad_norm) * 1.001)
    for name, value in expected.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)


# --- recomputation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_computing_activations_again_gives_the_same_step(recompute):
    _, expected, wanted = stepped(EXPERTS)
    _, after, metrics = stepped(EXPERTS, recompute=recompute)
    for name, value in expected.items():
        np.testing.assert_allclose(after[name], value, rtol=1e-9, atol=1e-13, err_msg=name)
    for name in ("loss", "loss_main", "loss_mtp", "loss_balance", "grad_norm"):
        np.testing.assert_allclose(getattr(metrics, name), getattr(wanted, name), rtol=1e-12, err_msg=name)
    np.testing.assert_array_equal(metrics.load, wanted.load)


def test_each_way_to_recompute_multiplies_more_than_the_one_before():
    """Or the three would be one: matmuls of the backward pass, that of selective less than that of full."""
    none, selective, full_ = (dots(step_jaxpr(recompute=way)) for way in ("none", "selective", "full"))
    assert none < selective < full_


# --- accumulation ---------------------------------------------------------------------------------------------------


def equations(jaxpr):
    """Every equation of a program, those of its inner programs as well."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def step_jaxpr(batch=BATCH, **options):
    runner = trainer(DENSE, **options)
    return jax.make_jaxpr(runner._sharded_step)(abstract_state(runner), batch, hyperparameters()).jaxpr


def dots(jaxpr) -> int:
    return sum(equation.primitive.name == "dot_general" for equation in equations(jaxpr))


def test_microbatches_add_their_gradients_in_float32():
    """Of a model of one bfloat16 weight, whose gradients by microbatch are 1 and then many of 2^-10.

    bfloat16 has 8 bits: it would still be 1 at the end.
    """
    count = 512
    model = StagedModel(
        context=lambda batch: None,
        narrow=lambda ctx, real, ahead: ctx,
        embed=lambda params, batch: Streams(batch),
        layers={},
        finish=lambda params, hidden, batch, scales: (
            (params["head"]["weight"] * hidden[0]).sum().astype(jnp.float32) * scales.main,
            {"loss_main": jnp.float32(0), "loss_mtp": jnp.float32(0)},
        ),
    )
    batch = jnp.full((count, 1), 2.0**-10, jnp.bfloat16).at[0].set(1)
    run = pipeline(model, one_rank(count))
    params = {"head": {"weight": jnp.ones((1,), jnp.bfloat16)}}
    _, gradient = run.value_and_grad(params, {}, batch, LossScales(*jnp.ones(3)))
    total = gradient["head"]["weight"]
    assert total.dtype == jnp.float32
    assert float(total[0]) == 1 + (count - 1) * 2.0**-10


def carried_by(scan) -> list:
    """The last carry of a scan: what it gives back as its body does, not stacked."""
    (body,) = jaxprs_in_params(scan.params)
    body = getattr(body, "jaxpr", body)
    return [out.aval for out, one in zip(scan.outvars, body.outvars, strict=True) if out.aval.shape == one.aval.shape]


def test_the_step_sums_bfloat16_gradients_in_float32():
    """What the scan over microbatches carries is a float32 sum for each parameter."""
    microbatches = 5
    batch = full(DENSE, microbatches, 8)
    jaxpr = step_jaxpr(batch, compute_dtype=jnp.bfloat16, microbatch_rows=1)
    scans = [e for e in equations(jaxpr) if e.primitive.name == "scan" and e.params["length"] == microbatches]
    parameters = len(flatten(trainer(DENSE).params_layout.specs))
    (carried,) = [avals for avals in map(carried_by, scans) if len(avals) >= parameters]
    assert {aval.dtype for aval in carried} == {jnp.dtype("float32")}
    assert len(carried) == parameters
