"""A train state as canonical checkpoint entries: their names, and that nothing is lost on the way there and back."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_model import initial_state, small, trainer

from deepseek_jax.config import ModelConfig
from deepseek_jax.config_io import from_dict, override_all, to_dict
from deepseek_jax.training import canonical
from deepseek_jax.training.checkpoint import CheckpointError, CheckpointStore
from deepseek_jax.training.experiment import Experiment
from deepseek_jax.training.optimizer import OptimizerConfig
from deepseek_jax.training.schedules import paper_schedule
from deepseek_jax.training.step import TrainState

# Two layers of each kind, and no two of them alike.
CONFIG = small(num_layers=4, num_dense_layers=2, mtp_depth=2)
STEP = 4321


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def runner(request):
    return trainer(CONFIG, optimizer=OptimizerConfig(moment_dtype=request.param).make)


@pytest.fixture(scope="module")
def state(runner) -> TrainState:
    """A state in which every array is different everywhere: moments, count, biases."""
    rng = np.random.default_rng(7)

    def draw(leaf):
        if leaf.dtype == jnp.int32:
            return jax.device_put(jnp.int32(STEP), leaf.sharding)
        return jax.device_put(rng.standard_normal(leaf.shape).astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(draw, initial_state(runner))


@pytest.fixture(scope="module")
def entries(runner, state):
    return canonical.to_canonical(runner, state)


def assert_same_state(one: TrainState, other: TrainState):
    structure: Any = jax.tree.structure(one)  # jax's stubs do not say that structures compare
    assert structure == jax.tree.structure(other)
    for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        name = jax.tree_util.keystr(path)
        assert (got.dtype, got.shape, got.sharding) == (want.dtype, want.shape, want.sharding), name
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes(), name


def test_there_and_back_is_bit_exact(runner, state, entries):
    assert_same_state(canonical.from_canonical(runner, entries, STEP), state)


def test_there_and_back_through_a_checkpoint_is_bit_exact(runner, state, entries, tmp_path):
    with CheckpointStore(tmp_path) as store:
        store.save(STEP, entries, {}, wait=True)
        restored = store.restore(STEP, canonical.templates(runner))
    assert_same_state(canonical.from_canonical(runner, restored, STEP), state)


def test_templates_are_what_is_saved(runner, entries):
    templates = canonical.templates(runner)
    assert sorted(templates) == sorted(entries)
    for name, like in templates.items():
        array = entries[name]
        assert (array.shape, array.dtype) == (like.shape, like.dtype), name
        assert array.sharding.is_equivalent_to(like.sharding, array.ndim), name


def test_names_have_the_documented_form(entries):
    """One entry per layer and parameter with its global shape; moments beside it; scalars by their path."""
    weights = {name for name in entries if not name.startswith(canonical.OPTIMIZER)}
    layer = re.compile(r"(layers\.[0-3]|mtp\.[01](\.block)?)(\.[a-z_]+)+|(embedding|head)\.weight|final_norm\.scale")
    assert all(layer.fullmatch(name) for name in weights), weights
    for name in (
        "embedding.weight",
        "head.weight",
        "final_norm.scale",
        "layers.0.attention.kv_a.weight",
        "layers.1.ffn.down.weight",
        "layers.3.ffn.router.weight",
        "layers.3.ffn.router.bias",
        "mtp.1.projection.weight",
        "mtp.1.block.ffn.router.bias",
    ):
        assert name in weights
    assert not {name for name in weights if re.search(r"router\.bias", name)} & {"layers.0.ffn.router.bias"}
    biases = {name for name in weights if name.endswith("router.bias")}
    assert len(biases) == 4, "two MoE layers and two MTP modules"
    expected = {f"optimizer.0.{m}/{name}" for m in ("mu", "nu") for name in weights - biases} | {"optimizer.0.count"}
    assert set(entries) - weights == expected
    for name in weights - biases:
        assert entries[f"optimizer.0.mu/{name}"].shape == entries[f"optimizer.0.nu/{name}"].shape == entries[name].shape
    assert entries["layers.3.ffn.router.weight"].ndim == 2, "no stage or slot on disk"
    assert entries["optimizer.0.count"].shape == ()


def test_every_layer_keeps_its_own_values(state, entries):
    """`layers` counts dense and MoE layers together: layer 3 is the second slot of the MoE stack."""
    stack = state.params["moe"]["attention"]["kv_a"]["weight"]
    np.testing.assert_array_equal(entries["layers.3.attention.kv_a.weight"], stack[0, 1])
    np.testing.assert_array_equal(
        entries["layers.0.attention.kv_a.weight"], state.params["dense"]["attention"]["kv_a"]["weight"][0, 0]
    )
    np.testing.assert_array_equal(
        entries["layers.2.ffn.router.bias"], state.router_bias["moe"]["ffn"]["router"]["bias"][0, 0]
    )
    moment = state.opt_state[0].nu["mtp"]["projection"]["weight"]
    np.testing.assert_array_equal(entries["optimizer.0.nu/mtp.1.projection.weight"], moment[0, 1])


def test_weights_alone_are_restored_without_the_optimizer(runner, state, entries, tmp_path):
    wanted = {n: like for n, like in canonical.templates(runner).items() if not n.startswith(canonical.OPTIMIZER)}
    with CheckpointStore(tmp_path) as store:
        store.save(1, entries, {}, wait=True)
        with pytest.raises(CheckpointError, match=r"left over: optimizer\.0\."):
            store.restore(1, wanted)
        weights = store.restore(1, wanted, skip=(canonical.OPTIMIZER,))
    fresh = runner.fresh_state(runner.params_layout.stack(weights), runner.bias_layout.stack(weights))
    assert_same_state(
        TrainState(fresh.params, fresh.router_bias, None, None), TrainState(state.params, state.router_bias, None, None)
    )
    assert int(fresh.step) == int(fresh.opt_state[0].count) == 0
    assert all(not np.asarray(leaf, np.float32).any() for leaf in jax.tree.leaves(fresh.opt_state))


def test_an_optimizer_without_moments_has_no_entries_for_them():
    plain = trainer(CONFIG)  # gradient descent
    state = initial_state(plain)
    entries = canonical.to_canonical(plain, state)
    assert not [name for name in entries if name.startswith(canonical.OPTIMIZER)]
    assert_same_state(canonical.from_canonical(plain, entries, 0), state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Momentum(OptimizerConfig):
    """Gradient descent with momentum: what a recipe with an optimizer of its own writes."""

    decay: float = 0.9

    def make(self, specs) -> optax.GradientTransformation:
        del specs
        return optax.chain(optax.trace(self.decay), optax.scale(0.5))


def test_a_recipe_brings_an_optimizer_of_its_own():
    experiment = Experiment(model=ModelConfig(), schedule=paper_schedule(100, warmup_tokens=10, rows=1))
    experiment = override_all(experiment, ["optimizer=Momentum(decay=0.8)"])
    config = from_dict(Experiment, to_dict(experiment)).optimizer
    assert config == Momentum(decay=0.8)
    runner = trainer(CONFIG, optimizer=config.make)
    start = initial_state(runner)
    filled = dataclasses.replace(start, opt_state=jax.tree.map(lambda leaf: leaf + 2, start.opt_state))
    entries = canonical.to_canonical(runner, filled)
    assert entries["optimizer.0.trace/layers.3.attention.kv_a.weight"].shape == (24, 20)
    assert_same_state(canonical.from_canonical(runner, entries, 0), filled)
