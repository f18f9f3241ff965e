"""A Hugging Face folder straight onto eight devices: experts split, nothing twice, the same numbers as on one."""

import contextlib
import ctypes
import gc
import math
import re
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hf_folder import write_folder
from small_model import small

import deepseek_jax as ds
from deepseek_jax.config import ConfigError
from deepseek_jax.interop.huggingface import HuggingFaceFolder
from deepseek_jax.interop.load import load_state
from deepseek_jax.interop.quantization import Quantization
from deepseek_jax.model.parameters import RouterBias, parameter_specs
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.mesh import mesh_of
from deepseek_jax.parallel.placement import ParameterLayout, place
from deepseek_jax.tree import flatten

MODEL = small(moe={"num_experts": 16})


def mesh(*shape):
    return mesh_of(np.array(jax.devices()[: math.prod(shape)]).reshape(shape))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("load") / "hf", MODEL, fp8=Quantization())


@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (1, 1, 2, 4), (1, 4, 1, 2)], ids=["expert8", "nodes", "replicas"])
def test_experts_are_split_and_the_numbers_are_those_of_one_device(folder, shape):
    one = ds.load(folder, dtype="float32", progress=False)
    many = ds.load(folder, dtype="float32", mesh=mesh(*shape), progress=False)
    weight = many.model.moe.ffn.experts.gate_up[...]
    ranks = shape[2] * shape[3]
    assert {shard.data.shape[1] for shard in weight.addressable_shards} == {16 // ranks}
    assert many.model.head.weight[...].sharding.is_fully_replicated
    for path in ("moe.ffn.experts.down", "moe.ffn.router.bias", "mtp.block.ffn.experts.gate_up", "head.weight"):
        first, second = (_at(each.model, path) for each in (one, many))
        np.testing.assert_array_equal(np.asarray(first), np.asarray(second), err_msg=path)
    tokens = np.arange(16, dtype=np.int32).reshape(2, 8)
    np.testing.assert_allclose(np.asarray(many(tokens)), np.asarray(one(tokens)), atol=1e-5)


def test_stages_and_experts_get_what_a_training_run_holds(folder):
    """Two uneven stages: each device holds its stage's layers and its own experts, as a run's state lies."""
    model = Transformer(MODEL)
    place_on = [(mesh(1, 1, 1, 1), None), (mesh(2, 1, 1, 4), (2, 1))]
    trees = []
    with HuggingFaceFolder(folder) as source:
        for devices, layers in place_on:
            placement = place(MODEL, layers)
            layouts = [
                ParameterLayout(parameter_specs(model, kind), placement, devices) for kind in (nnx.Param, RouterBias)
            ]
            params, bias = load_state(source, *layouts)
            trees.append({**layouts[0].unstack(params), **layouts[1].unstack(bias)})
    assert trees[0].keys() == trees[1].keys()
    for name, array in trees[0].items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(trees[1][name]), err_msg=name)


def test_a_mesh_of_several_stages_is_refused(folder):
    with pytest.raises(ConfigError, match="make the mesh with pipe=1, not 2"):
        ds.load(folder, mesh=mesh(2, 1, 1, 1), progress=False)


def test_a_mesh_of_other_axes_or_that_splits_no_experts_is_refused(folder):
    with pytest.raises(ConfigError, match=r"^the mesh has the axes expert; make it with .*mesh_of, .*\[pipe, data"):
        ds.load(folder, mesh=jax.make_mesh((8,), ("expert",)), progress=False)
    with pytest.raises(ConfigError, match=r"^16 experts cannot be split evenly over 3 devices \(node 1 x expert 3\)"):
        ds.load(folder, mesh=mesh(1, 1, 1, 3), progress=False)


def test_a_mesh_generates_what_one_device_does(folder):
    prompts = [[1, 2, 3], [5], [7, 8, 9, 10, 11]]
    one, many = (ds.load(folder, dtype="float32", mesh=on, progress=False) for on in (None, mesh(1, 1, 2, 4)))
    assert ds.generate(one, prompts, max_new_tokens=12) == ds.generate(many, prompts, max_new_tokens=12)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of the process from /proc")
def test_memory_is_what_the_devices_hold_and_little_more(tmp_path):
    """Promise: about one tensor beyond the arrays themselves. A second copy of one stack would be 100 MB."""
    model = small(hidden_size=512, moe={"num_experts": 32, "expert_ffn_size": 1024}, mtp_depth=0)
    folder = write_folder(tmp_path / "hf", model)
    on = mesh(1, 1, 1, 8)
    ds.load(folder, mesh=on, progress=False)  # compiles
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free counts as ours until it goes back
    before = anonymous_bytes()
    with peak_of(anonymous_bytes) as peak:
        loaded = ds.load(folder, mesh=on, progress=False)
    arrays = jax.tree.leaves(jax.tree.map(jnp.asarray, flatten(_values(loaded.model))))
    held = sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards)
    assert held > 190e6
    stack = loaded.model.moe.ffn.experts.gate_up[...]
    assert stack.nbytes > 100e6
    assert peak() - before < held + 40e6, (peak() - before, held)


@contextlib.contextmanager
def peak_of(measure):
    """The largest value of `measure` while the body runs, looked at every millisecond."""
    largest, done = [measure()], threading.Event()

    def watch():
        while not done.wait(0.001):
            largest[0] = max(largest[0], measure())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: largest[0]
    finally:
        done.set()
        thread.join()


def anonymous_bytes():
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def _at(model, path):
    for part in path.split("."):
        model = getattr(model, part)
    return model[...]


def _values(model):
    return nnx.to_pure_dict(nnx.state(model))
