"""Every mesh and every portable dispatcher take the steps of one device: losses, gradients, loads and biases."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from small_model import (
    QUICK,
    abstract_state,
    assert_same_metrics,
    gradient_descent,
    hyperparameters,
    initial_state,
    packed,
    quickly,
    small,
    trainer,
)

from deepseek_jax.parallel.mesh import ParallelConfig
from deepseek_jax.parallel.sharding import BATCH_SPEC
from deepseek_jax.training import canonical
from deepseek_jax.training.checkpoint import CheckpointStore
from deepseek_jax.training.optimizer import OptimizerConfig
from deepseek_jax.training.room import RoomControl
from deepseek_jax.tree import flatten

CONFIG = small(moe={"num_experts": 16, "experts_per_token": 4})
STEPS, LENGTH, RATE = 10, 12, 0.2

MESHES = {
    "one, one hop": (ParallelConfig(), "all_to_all"),
    "one, two hops": (ParallelConfig(), "two_hop"),
    "replicas": (ParallelConfig(data=8), None),
    "replicas, one hop": (ParallelConfig(data=8), "all_to_all"),
    "replicas, two hops": (ParallelConfig(data=8), "two_hop"),
    "experts": (ParallelConfig(expert=8), "all_to_all"),
    "experts, two hops": (ParallelConfig(expert=8), "two_hop"),
    "replicas of experts": (ParallelConfig(data=2, expert=4), "all_to_all"),
    "replicas of experts, two hops": (ParallelConfig(data=2, expert=4), "two_hop"),
    "many replicas of experts": (ParallelConfig(data=4, expert=2), "all_to_all"),
    "many replicas of experts, two hops": (ParallelConfig(data=4, expert=2), "two_hop"),
    "nodes": (ParallelConfig(node=2, expert=4), "all_to_all"),
    "nodes, two hops": (ParallelConfig(node=2, expert=4), "two_hop"),
}
"""Layouts, and by what tokens reach experts; two of them have only one device for all experts, and hop in place."""
SAMPLE = ("one, two hops", "replicas", "replicas of experts", "experts, two hops", "nodes, two hops")


def meshes():
    """All of them; the slow mark leaves a sample."""
    for name in MESHES:
        yield pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow)


def routing(kind: str) -> np.ndarray:
    """A router bias `[E]` that makes routing random, or the same for all tokens, or leaves most experts empty."""
    bias = np.zeros(16)
    chosen = {"random": range(16), "skewed": (0, 1, 4, 5), "empty": (0, 2, 3, 9, 10)}[kind]
    bias[[e for e in range(16) if e not in chosen]] = -100.0
    return bias


def batches():
    """Rows of packed documents with padding, other ones on each device; the last batch is mostly empty."""
    documents = [[13], [5, 8], [4, 4], [3, 10], [6], [1, 12], [2], [9, 3]]
    for step in range(STEPS):
        rows = documents[step % 8 :] + documents[: step % 8]
        yield packed(CONFIG, rows if step < STEPS - 1 else [[7], *[[]] * 7], length=LENGTH, seed=step % 2)


@functools.lru_cache(maxsize=4)  # a process may map no more than so many compiled programs into memory
def runner(mesh: str | ParallelConfig | None, dtype, optimizer=gradient_descent, **changes):
    parallel, dispatcher = MESHES[mesh] if isinstance(mesh, str) else (mesh or ParallelConfig(), None)
    return quickly(
        trainer(
            CONFIG,
            parallel=parallel,
            optimizer=optimizer,
            compute_dtype=dtype,
            dispatcher=dispatcher,
            balance_weight=0.01,
            clip_norm=1.0,
            **changes,
        )
    )


def with_adamw(mesh: str | ParallelConfig | None):
    """A runner in float32 that several tests share, with as little room as can be asked for."""
    return runner(mesh, jnp.float32, OptimizerConfig().make, capacity=1.0)


def with_bias(run, state, bias: np.ndarray):
    """The state with every router's bias set to `bias` `[E]`."""
    set_to = lambda old: jax.device_put(np.broadcast_to(bias, old.shape).astype(old.dtype), old.sharding)  # noqa: E731
    return dataclasses.replace(state, router_bias=jax.tree.map(set_to, state.router_bias))


@functools.cache
def course(mesh: str | None, kind: str, dtype=jnp.float64, optimizer=gradient_descent):
    """Ten steps: metrics of each, and the last state."""
    run = runner(mesh, dtype, optimizer)
    state = with_bias(run, initial_state(run, dtype), routing(kind))
    hyper = hyperparameters(learning_rate=RATE, bias_rate=0.01, dtype=dtype)
    seen = []
    for batch in batches():
        state, metrics = run.step(state, jax.device_put(batch, NamedSharding(run.mesh, BATCH_SPEC)), hyper)
        seen.append(jax.tree.map(np.asarray, metrics))
    return seen, jax.tree.map(np.asarray, state)


@pytest.mark.parametrize("kind", ["random", "skewed", "empty"])
@pytest.mark.parametrize("mesh", meshes())
def test_float64_steps_equal_those_of_one_device(mesh, kind):
    """Loads and biases exactly, losses, norms and parameters (so gradients) to 1e-9."""
    with jax.enable_x64(True):
        one, one_state = course(None, kind)
        many, many_state = course(mesh, kind)
    assert_same_metrics(many, one)
    assert one[-3].loss < one[0].loss - 0.1
    for name, bias in flatten(one_state.router_bias).items():
        np.testing.assert_array_equal(flatten(many_state.router_bias)[name], bias, err_msg=name)
    for name, value in flatten(one_state.params).items():
        np.testing.assert_allclose(flatten(many_state.params)[name], value, rtol=1e-9, atol=1e-12, err_msg=name)
    assert many_state.step == STEPS


def test_a_float32_step_from_fixed_routing_agrees():
    """To 1e-5, with AdamW's moments split over eight ranks; later steps part, since one flipped choice changes all."""
    batch, hyper, after = packed(CONFIG, [[13]] * 8, length=LENGTH), hyperparameters(), []
    for mesh in (None, "nodes, two hops"):
        run = with_adamw(mesh)
        state = with_bias(run, initial_state(run), routing("skewed"))
        after.append(run.step(state, placed(run, batch), hyper))
    (one_state, one), (many_state, many) = after
    np.testing.assert_array_equal(many.load, one.load)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(getattr(many, name), getattr(one, name), rtol=1e-5)
    for name, moment in flatten(one_state.opt_state[0].mu).items():
        other, scale = flatten(many_state.opt_state[0].mu)[name], np.abs(moment).max()
        np.testing.assert_allclose(other, moment, rtol=1e-5, atol=1e-5 * scale, err_msg=name)


def test_microbatches_of_an_expert_mesh_add_up():
    """Two of one row on each device, the last one short, are one batch: sums over both, and the larger demand."""
    batch = packed(CONFIG, [[13]] * 5 + [[5]] + [[]] * 2, length=LENGTH)
    after = []
    with jax.enable_x64(True):
        for mesh, changes in ((None, {}), (ParallelConfig(node=2, expert=2), {"microbatch_rows": 1})):
            run = runner(mesh, jnp.float64, **changes)
            state = with_bias(run, initial_state(run, jnp.float64), routing("random"))
            after.append(run.step(state, placed(run, batch), hyperparameters(dtype=jnp.float64)))
    (one_state, one), (many_state, many) = after
    np.testing.assert_array_equal(many.load, one.load)
    np.testing.assert_array_equal(many.load.sum(axis=1), 4 * np.array([5 * 12 + 5, 5 * 12 + 5, 5 * 11 + 4]))
    np.testing.assert_allclose(many.grad_norm, one.grad_norm, rtol=1e-9)
    for name, value in flatten(one_state.params).items():
        np.testing.assert_allclose(flatten(many_state.params)[name], value, rtol=1e-9, atol=1e-12, err_msg=name)


def test_initial_weights_do_not_depend_on_the_mesh():
    """Nor on how masters are split: they are drawn from names and global shapes."""
    one = flatten(runner(None, jnp.float32).params_layout.initial(3))
    for mesh in ("nodes, two hops", "many replicas of experts"):
        for name, value in flatten(runner(mesh, jnp.float32).params_layout.initial(3)).items():
            np.testing.assert_array_equal(value, one[name], err_msg=name)


# --- too little room ------------------------------------------------------------------------------------------------


def placed(run, batch):
    return jax.device_put(batch, NamedSharding(run.mesh, BATCH_SPEC))


def test_a_step_without_room_changes_nothing_and_says_so():
    """Parameters, moments, biases and step number stay bit for bit; the same batch then runs with more room."""
    run = with_adamw("nodes, two hops")
    state = with_bias(run, initial_state(run), routing("skewed"))
    before = jax.tree.map(np.array, state)
    ladder = run.dispatchers((8, LENGTH + 1))
    assert len(ladder) == 3
    batch, hyper = placed(run, packed(CONFIG, [[13]] * 8, length=LENGTH)), hyperparameters()
    state, metrics = run._step(state, batch, hyper, 0)
    assert int(metrics.lost) > 0
    assert not ladder[0].fits(np.asarray(metrics.demand))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, state), before)
    run.room = RoomControl()
    run.room.set_state({"setting": 0, "calm": 0, "patience": 2})
    state, metrics = run.step(state, batch, hyper)
    assert (int(metrics.lost), int(state.step), run.room.used) == (0, 1, 2)
    assert run.room.reruns == 2
    assert ladder[2].fits(np.asarray(metrics.demand))
    # Twelve tokens of eight devices, each with two of its four experts on either of two devices of the first node.
    np.testing.assert_array_equal(np.asarray(metrics.demand), [12, 2 * 12, 8 * 12 * 2])
    state, _ = run.step(state, batch, hyper)
    assert run.room.reruns == 2, "the second step begins with the room that the first one needed"


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_more_rounds_need_hardly_more_memory(recompute):
    """Promise of the last setting: one round's buffers exist at a time, forward and backward."""
    moe = {"num_experts": 32, "experts_per_token": 4, "expert_ffn_size": 64}
    config = small(num_layers=1, num_dense_layers=0, mtp_depth=0, hidden_size=64, moe=moe)
    run = trainer(config, parallel=ParallelConfig(expert=8), recompute=recompute)
    batch = placed(run, packed(config, [[257]] * 8, length=256))
    ladder = run.dispatchers(batch.tokens.shape)
    assert [one.rounds for one in ladder] == [1, 1, 3]
    state = abstract_state(run)
    temporary = [
        run.lower(state, batch, hyperparameters(), setting).compile(QUICK).memory_analysis().temp_size_in_bytes
        for setting in (1, 2)
    ]
    assert temporary[1] < 1.3 * temporary[0], temporary


def test_a_model_without_experts_trains_on_any_mesh():
    config = small(num_layers=1, num_dense_layers=1, mtp_depth=0)
    run = quickly(trainer(config, parallel=ParallelConfig(node=2, expert=4)))
    state = initial_state(run)
    for step in range(2):
        state, metrics = run.step(state, placed(run, packed(config, [[13]] * 8, length=LENGTH)), hyperparameters())
        assert (int(state.step), int(metrics.lost)) == (step + 1, 0)


def test_held_out_text_is_evaluated_with_enough_room():
    one, many = runner(None, jnp.float32), runner("experts", jnp.float32, capacity=1.0)
    batch = packed(CONFIG, [[13]] * 8, length=LENGTH)
    (loss, labels), (wanted, count) = (
        run.evaluate(with_bias(run, initial_state(run), routing("skewed")), placed(run, batch)) for run in (many, one)
    )
    assert int(labels) == int(count) == 96
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)


# --- state that exists once ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", ["replicas", "many replicas of experts", "nodes, two hops"])
def test_masters_and_moments_exist_once(mesh):
    """ZeRO-1: of every matrix whose size divides, no number is on two devices; without it, on all that compute it."""
    parallel, _ = MESHES[mesh]
    copies = {}
    for zero in (True, False):
        run = trainer(CONFIG, parallel=parallel, optimizer=OptimizerConfig().make, zero=zero)
        state = initial_state(run)
        for part, tree in {"params": state.params, "mu": state.opt_state[0].mu}.items():
            for name, array in flatten(tree).items():
                held = sum(shard.data.size for shard in array.addressable_shards)
                copies[zero, part, name] = held / array.size
    for (zero, _, name), count in copies.items():
        experts = ".experts." in name
        everywhere = parallel.data if experts else 8
        if not zero or "scale" in name:
            assert count == everywhere, name
        else:
            # Two matrices have no dimension that eight divides: 12 rows of a latent, 28 columns.
            assert count == 1 or (count == 2 and everywhere == 8), (name, count)


def test_every_mesh_takes_up_what_another_left(tmp_path):
    """A checkpoint of 8 devices restores on 2, and that of 2 on 4: every weight, moment and bias bit for bit."""
    meshes = ["nodes, two hops", ParallelConfig(data=2), ParallelConfig(data=2, expert=2)]
    runs = [with_adamw(mesh) for mesh in meshes]
    state, batch = initial_state(runs[0], seed=3), packed(CONFIG, [[13]] * 8, length=LENGTH)
    written: dict[str, np.ndarray] = {}
    for number, run in enumerate(runs):
        if number:
            with CheckpointStore(tmp_path / str(number - 1)) as store:
                state = canonical.from_canonical(run, store.restore(1, canonical.templates(run)), number)
            for name, array in canonical.to_canonical(run, state).items():
                np.testing.assert_array_equal(np.asarray(array), written[name], err_msg=name)
        state, metrics = run.step(state, placed(run, batch), hyperparameters())
        assert np.isfinite(metrics.loss)
        entries = canonical.to_canonical(run, state)
        written = {name: np.asarray(array) for name, array in entries.items()}
        with CheckpointStore(tmp_path / str(number)) as store:
            store.save(1, entries, {"meta": {"step": 1}})
