"""What a run trained with in FP8 is what it exports: each code and each scale, in the published format.

Blocks of 128×128 are those of a matrix of ours when gate and up have whole blocks of columns each, and when the rotary
rows of a head, whose order differs, lie in one block. DeepSeek-V3's sizes have both, and so has the model here. With
others, blocks of gate and up joined, or of rows in another order, hold other numbers than the blocks of a folder, and
codes differ by rounding.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from hf_folder import BFLOAT16
from jax.sharding import PartitionSpec as P
from tiny_run import MODEL, SCHEDULE, experiment, quick_runs, train, write_texts

import deepseek_jax as ds
from deepseek_jax.config import AttentionConfig
from deepseek_jax.interop.huggingface import HuggingFaceFolder
from deepseek_jax.parallel.mesh import AXES
from deepseek_jax.parallel.placement import KINDS
from deepseek_jax.precision.policy import V3_FP8, Fp8Config, PrecisionPolicy
from deepseek_jax.training import loop
from deepseek_jax.training.canonical import from_canonical, templates
from deepseek_jax.training.checkpoint import CheckpointStore
from deepseek_jax.training.weights import CheckpointWeights
from deepseek_jax.tree import flatten
from pallas_kernels.quantize import Quantized
from tools import convert

LIKE_V3 = dataclasses.replace(
    MODEL,
    hidden_size=160,
    dense_ffn_size=256,
    attention=AttentionConfig(
        num_heads=2, q_lora_rank=136, kv_lora_rank=128, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=72
    ),
    moe=dataclasses.replace(MODEL.moe, expert_ffn_size=128),
)
"""Heads of 192 rows and 192 rows of latent and key, as V3 has 576; edges of other matrices are ragged."""
POLICIES = {
    "fp8": V3_FP8,
    "fp8_ue8m0": PrecisionPolicy(compute="float32", fp8=Fp8Config(power_of_two_scales=True)),
}


def copies(trainer, state) -> dict[str, np.ndarray]:
    """The codes and scales that the layers of a step read, as the step makes them, by the names of run-time stacks."""

    def device(state):
        return {name: a for name, a in flatten(trainer._local_weights(state)[1]).items() if "router" not in name}

    run = jax.shard_map(device, mesh=trainer.mesh, in_specs=(trainer.state_specs(),), out_specs=P(AXES))
    return jax.tree.map(np.asarray, jax.jit(run)(state))


@pytest.fixture(scope="module", params=["fp8", pytest.param("fp8_ue8m0", marks=pytest.mark.slow)])
def exported(request, tmp_path_factory):
    """A run of two steps: what its next step would read, its checkpoint, and the FP8 folder made of that."""
    folder = tmp_path_factory.mktemp(request.param)
    run = experiment(write_texts(folder / "texts"), model=LIKE_V3, precision=POLICIES[request.param])
    run = dataclasses.replace(run, schedule=dataclasses.replace(SCHEDULE, total_tokens=4 * run.data.sequence_length))
    with quick_runs():
        train(run, folder / "run")
        trainer = loop.make_trainer(run)
    store = CheckpointStore(folder / "run" / "checkpoints")
    state = from_canonical(trainer, store.restore(2, templates(trainer)), 2)
    assert convert.main(["to-hf", str(folder / "run"), str(folder / "hf"), "--precision", request.param]) == 0
    assert convert.main(["verify", str(folder / "run"), str(folder / "hf")]) == 0
    return trainer.placement, copies(trainer, state), folder


def test_every_code_and_scale_is_that_of_the_layers(exported):
    """After transposes, gate and up side by side and rotary rows in our order; and no other tensor is FP8."""
    placement, trained, folder = exported
    run = CheckpointWeights(folder / "run")
    with HuggingFaceFolder(folder / "hf") as hf:
        left = {name for name, entry in hf.entries.items() if entry.may_be_fp8}
        for stack, codes in trained.items():
            if not stack.endswith("_codes"):
                continue
            kind, _, path = stack.removesuffix("_codes").partition(".")
            assert kind in KINDS
            scales = trained[stack.removesuffix("_codes") + "_scales"]
            for _, slot, _, name in placement.arrays(kind, [path]):
                entry = hf.entries[name]
                rows = range(len(entry.tensors))
                found = [entry.from_theirs(hf.values(entry, row)) for row in rows]
                assert_same(found if entry.stacked else found[0], codes[slot], name)
                found = [entry.scales_from_theirs(hf.scales(entry, row)) for row in rows]
                assert_same(found if entry.stacked else found[0], scales[slot], name)
                left.remove(name)
        assert not left
        for name, entry in hf.entries.items():
            if not entry.may_be_fp8:
                expected = run.values(entry, 0)[0]
                assert_same(hf.values(entry, 0)[0], expected.astype(hf.form(entry).dtype), name)
                assert hf.form(entry).dtype == (np.float32 if name.endswith("router.bias") else BFLOAT16)


def test_it_loads_back_exactly(exported):
    """What every linear layer of a loaded model multiplies with is what those of the step multiplied with."""
    _, trained, folder = exported
    model = ds.load(folder / "hf", dtype="float32", progress=False).model
    loaded = flatten(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    names = [name.removesuffix("_codes") for name in trained if name.endswith("_codes")]
    assert len(names) == 3 * 5 + 2 + 2 * 4
    for name in names:
        copy = Quantized(trained[f"{name}_codes"], trained[f"{name}_scales"], (128, 128))
        assert_same(loaded[name], np.asarray(copy.dequantize()), name)


def test_a_folder_keeps_its_codes_through_a_checkpoint(exported, tmp_path):
    _, _, folder = exported
    assert convert.main(["to-checkpoint", str(folder / "hf"), str(tmp_path / "ours"), "--verify"]) == 0
    assert convert.main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "back"), "--verify"]) == 0
    with HuggingFaceFolder(folder / "hf") as one, HuggingFaceFolder(tmp_path / "back") as other:
        assert one.tensors.keys() == other.tensors.keys()
        for name in one.tensors:
            assert_same(one.tensors.read(name), other.tensors.read(name), name)


def assert_same(one, other, name: str) -> None:
    """The same dtype, shape and bits."""
    one, other = np.asarray(one), np.asarray(other)
    assert (one.dtype, one.shape) == (other.dtype, other.shape), name
    assert one.tobytes() == other.tobytes(), f"{name} differs"
