"""Canonical names, the division of layers into stages, and the table of shardings."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from small_model import small

from deepseek_jax import zoo
from deepseek_jax.config import ConfigError
from deepseek_jax.model.parameters import parameter_specs
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.mesh import AXES, ParallelConfig, make_mesh, mesh_of
from deepseek_jax.parallel.pipeline.schedule import StageMap
from deepseek_jax.parallel.placement import KINDS, ParameterLayout, place
from deepseek_jax.parallel.sharding import mesh_axes_of, partition_spec
from deepseek_jax.tree import flatten, unflatten


def one_device(config) -> ParameterLayout:
    mesh = mesh_of(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1))
    return ParameterLayout(parameter_specs(Transformer(config)), place(config), mesh)


BLOCK = [
    "attention_norm.scale",
    *(f"attention.{name}.weight" for name in ("q_a", "q_b", "kv_a", "kv_b", "o")),
    *(f"attention.{name}.scale" for name in ("q_a_norm", "kv_a_norm")),
    "ffn_norm.scale",
]
DENSE = ["ffn.gate_up.weight", "ffn.down.weight"]
MOE = ["ffn.router.weight", "ffn.experts.gate_up", "ffn.experts.down", *(f"ffn.shared.{n[4:]}" for n in DENSE)]
MTP = [*(f"block.{n}" for n in BLOCK + MOE), "embedding_norm.scale", "hidden_norm.scale", "projection.weight"]


def test_canonical_names():
    names = {"embedding.weight", "final_norm.scale", "head.weight"}
    names |= {f"layers.0.{n}" for n in BLOCK + DENSE}
    names |= {f"layers.{i}.{n}" for i in (1, 2) for n in BLOCK + MOE}
    names |= {f"mtp.0.{n}" for n in [*MTP, "final_norm.scale"]}
    layout = one_device(small())
    assert set(layout.canonical()) == names
    # On disk there are no stacks: each entry has the shape of one layer's parameter.
    assert layout.canonical()["layers.2.ffn.experts.down"].shape == (8, 16, 24)
    assert layout.abstract()["moe"]["ffn"]["experts"]["down"].shape == (1, 2, 8, 16, 24)


@pytest.fixture(scope="module")
def drawn():
    """A layout, its initial run-time tree, and the same under canonical names."""
    layout = one_device(small(hidden_size=96, init_std=0.006))
    tree = layout.initial(0)
    return layout, tree, layout.unstack(tree)


def test_stack_and_unstack_are_inverse_bit_for_bit(drawn):
    layout, tree, arrays = drawn
    again = flatten(layout.stack(arrays))
    for name, value in flatten(tree).items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


def test_initial_values_follow_the_declarations(drawn):
    layout, _, arrays = drawn
    for name, value in arrays.items():
        if name.endswith("scale"):
            np.testing.assert_array_equal(value, 1)
        else:
            assert float(value.std()) == pytest.approx(0.006, rel=0.15), name
            assert abs(float(value.mean())) < 0.001, name
    # Layers differ, and another seed gives other weights.
    assert (arrays["layers.1.attention.o.weight"] != arrays["layers.2.attention.o.weight"]).all()
    other = layout.unstack(layout.initial(1))
    assert (arrays["layers.1.attention.o.weight"] != other["layers.1.attention.o.weight"]).all()


def test_v3_in_sixteen_stages():
    """Two dense layers at most and four slots for the others: the shortest tick, and of its kind the least memory."""
    placement = place(zoo.deepseek_v3(), stage_map=StageMap("bidirectional", 16))
    assert placement.slots["dense"][:3] == (("layers.0", "layers.1"), ("layers.2", None), (None, None))
    assert {kind: placement.size(kind) for kind in KINDS} == {"dense": 2, "moe": 3, "mtp": 1}
    occupied = placement.occupied()
    assert (occupied["moe"].sum(axis=1) + occupied["mtp"].sum(axis=1)).tolist() == [0, 3, *[4] * 14]
    assert placement.slots["mtp"][1:3] == ((None,), ("layers.9",))
    assert placement.slots["mtp"][-1] == ("mtp.0",)
    names = [name for stage in range(16) for kind in KINDS for name in placement.slots[kind][stage] if name]
    assert names == [*(f"layers.{i}" for i in range(61)), "mtp.0"]


def test_stages_must_hold_every_layer():
    with pytest.raises(
        ConfigError, match=r"layers_per_stage=\(3, 2\) is for 2 stages with 5 layers; needed are 2 with the model's 3"
    ):
        place(small(), (3, 2))
    with pytest.raises(ConfigError, match="4 stages are more than the model's 3 layers"):
        place(small(), stage_map=StageMap("straight", 4))


def test_logical_axes_map_to_the_mesh():
    experts = partition_spec(("stage", "slot", "expert", "embed", "expert_ffn"))
    assert experts == P("pipe", None, ("node", "expert"), None, None)
    assert partition_spec(("batch", None)) == P(("data", "node", "expert"), None)
    assert mesh_axes_of(partition_spec(("stage", "slot", "expert"))) == {"pipe", "node", "expert"}
    with pytest.raises(ValueError, match="two dimensions on mesh axis"):
        partition_spec(("batch", "expert"))
    with pytest.raises(ValueError, match="unknown logical axis 'head'"):
        partition_spec(("head",))


def test_the_mesh_has_four_axes_and_must_fit_the_devices():
    mesh = make_mesh(ParallelConfig(), jax.devices()[:1])
    assert mesh.axis_names == AXES == ("pipe", "data", "node", "expert")
    with pytest.raises(ConfigError, match=r"needs 3 devices, there are 1; change parallel.data"):
        make_mesh(ParallelConfig(data=3), jax.devices()[:1])
    with pytest.raises(ConfigError, match=r"parallel.node must be at least 1, not 0"):
        ParallelConfig(node=0)
    with pytest.raises(ConfigError, match=r"parallel.dispatcher must be one of local, .*, not 'alltoall'"):
        ParallelConfig(dispatcher="alltoall")
    with pytest.raises(ConfigError, match=r"parallel.capacity must be at least 1, not 0.5"):
        ParallelConfig(capacity=0.5)


def test_flatten_and_unflatten_are_inverse():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flatten(tree) == {"a.b": 1, "a.c.d": 2, "e": 3}
    assert unflatten(flatten(tree)) == tree
