"""Weights move between layouts bit for bit: two unequal stages and back, in memory and through a checkpoint."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import small

from deepseek_jax.model.parameters import RouterBias, parameter_specs
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.mesh import mesh_of
from deepseek_jax.parallel.placement import ParameterLayout, place
from deepseek_jax.training.checkpoint import CheckpointStore
from deepseek_jax.tree import flatten

CONFIG = small(num_layers=4, mtp_depth=1)
MODEL = Transformer(CONFIG)
SPECS = parameter_specs(MODEL)
ONE_STAGE = (1, 1, 1, 1)


@functools.cache
def one_device() -> ParameterLayout:
    return layout(ONE_STAGE)


def layout(shape, layers_per_stage=None, specs=SPECS) -> ParameterLayout:
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return ParameterLayout(specs, place(CONFIG, layers_per_stage), mesh_of(devices))


LAYOUTS = {
    "data_parallel": ((1, 2, 1, 1), None),
    "two_unequal_stages": ((2, 1, 1, 2), (3, 1)),
    "dense_layer_alone": ((2, 1, 1, 1), (1, 3)),
    "experts_over_nodes": ((1, 1, 2, 2), None),
}


def moved(arrays, target: ParameterLayout):
    """Canonical arrays on the devices that `target` wants them on."""
    return {name: jax.device_put(np.asarray(arrays[name]), like.sharding) for name, like in target.canonical().items()}


def assert_equal(arrays, expected):
    assert set(arrays) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(arrays[name], value, err_msg=name)


@pytest.fixture(scope="module")
def weights():
    """Canonical weights drawn on one device."""
    one = one_device()
    return {name: np.asarray(value) for name, value in one.unstack(one.initial(0)).items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_and_back_is_bit_exact(weights, name):
    target = layout(*LAYOUTS[name])
    tree = target.stack(moved(weights, target))
    for path, leaf in flatten(tree).items():
        assert leaf.sharding == flatten(target.shardings())[path], path
        assert leaf.shape == flatten(target.abstract())[path].shape, path
    back = target.unstack(tree)
    assert_equal(back, weights)
    for path, like in target.canonical().items():
        assert back[path].sharding == like.sharding, path
    one = one_device()
    assert_equal(one.unstack(one.stack(moved(back, one))), weights)


@pytest.mark.parametrize("name", ["two_unequal_stages"])
def test_initial_weights_are_the_same_in_every_layout(weights, name):
    target = layout(*LAYOUTS[name])
    assert_equal(target.unstack(target.initial(0)), weights)


def test_uneven_stages_are_padded_with_zeros(weights):
    target = layout(*LAYOUTS["two_unequal_stages"])
    tree = target.stack(moved(weights, target))
    # Stage 0 holds the dense layer and MoE layers 1 and 2, the second in its tail; stage 1 holds MoE layer 3, and the
    # MTP module in its tail.
    router, tail = (np.asarray(of["ffn"]["router"]["weight"]) for of in (tree["moe"], tree["mtp"]["block"]))
    assert router.shape[:2] == tail.shape[:2] == (2, 1)
    np.testing.assert_array_equal(router[:, 0], [weights[f"layers.{i}.ffn.router.weight"] for i in (1, 3)])
    names = ("layers.2.ffn", "mtp.0.block.ffn")
    np.testing.assert_array_equal(tail[:, 0], [weights[f"{name}.router.weight"] for name in names])
    np.testing.assert_array_equal(tree["mtp"]["projection"]["weight"][0], 0)
    np.testing.assert_array_equal(tree["dense"]["attention"]["o"]["weight"][1], 0)
    assert list(target.placement.layers("moe")) == [(0, 0, "layers.1"), (1, 0, "layers.3")]
    assert list(target.placement.layers("mtp")) == [(0, 0, "layers.2"), (1, 0, "mtp.0")]


def test_every_stage_holds_its_own_layers_only():
    target = layout(*LAYOUTS["two_unequal_stages"])
    stages = [set(row.ravel()) for row in target.mesh.devices]
    where = {name: set(like.sharding.device_set) for name, like in target.canonical().items()}
    assert where["layers.2.attention.o.weight"] == stages[0]
    assert where["layers.3.attention.o.weight"] == where["mtp.0.projection.weight"] == stages[1]
    assert where["embedding.weight"] == where["head.weight"] == stages[0] | stages[1]


def test_router_biases_move_with_their_layers():
    specs = parameter_specs(MODEL, RouterBias)
    one, two = layout(ONE_STAGE, specs=specs), layout(*LAYOUTS["two_unequal_stages"], specs=specs)
    values = {
        name: np.random.default_rng(i).normal(size=8).astype(np.float32) for i, name in enumerate(one.canonical())
    }
    assert set(values) == {f"layers.{i}.ffn.router.bias" for i in (1, 2, 3)} | {"mtp.0.block.ffn.router.bias"}
    assert_equal(two.unstack(two.stack(moved(values, two))), values)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_checkpoint_restores_into_unequal_stages_and_back(weights, tmp_path, dtype):
    one, two = one_device(), layout(*LAYOUTS["two_unequal_stages"])
    source = {name: jax.device_put(value.astype(dtype)) for name, value in weights.items()}
    with CheckpointStore(tmp_path, keep_last=2) as store:
        store.save(1, one.unstack(one.stack(source)), {}, wait=True)
        staged = two.stack(store.restore(1, two.canonical(dtype)))
        store.save(2, two.unstack(staged), {}, wait=True)
        back = one.stack(store.restore(2, one.canonical(dtype)))
    assert staged["moe"]["attention"]["o"]["weight"].shape[:2] == (2, 1)
    assert_equal(one.unstack(back), source)
