"""The table of names: complete, one to one, and the same numbers there and back."""

import dataclasses

import numpy as np
import pytest
from hf_folder import random_tensors
from small_model import ATTENTION, MOE, small

from deepseek_jax import zoo
from deepseek_jax.interop.layout import LAYER, MTP, entries
from deepseek_jax.model.parameters import RouterBias, abstract_values
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.planning.parameters import total_parameters

MODELS = {
    "v3": small(),
    "two_mtp": small(mtp_depth=2),
    "no_q_lora": small(attention={"q_lora_rank": None}),
    "all_dense": small(num_dense_layers=3, mtp_depth=0),
    "no_dense": small(num_dense_layers=0),
    "no_shared": small(moe={"num_shared_experts": 0}),
    "two_shared": small(moe={"num_shared_experts": 2}),
    "tied": small(tie_embeddings=True),
    "v2": dataclasses.replace(zoo.deepseek_v2_lite(), vocab_size=64, hidden_size=24, num_layers=3, dense_ffn_size=40),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_parameter_has_one_entry_and_every_tensor_one_place(model):
    table = entries(model)
    assert sum(int(np.prod(entry.spec.shape)) for entry in table.values()) == total_parameters(model)
    names = [name for entry in table.values() for row in entry.tensors for name in row]
    names += [copy for entry in table.values() for copy in entry.copies]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_tensors_go_there_and_back(model):
    tensors = random_tensors(model, dtype=np.float32)
    for entry in entries(model).values():
        for row, names in enumerate(entry.tensors):
            block = entry.from_theirs([tensors[name] for name in names])
            assert block.shape == (entry.spec.shape[1:] if entry.stacked else entry.spec.shape), (entry.name, row)
            for name, back in zip(names, entry.to_theirs(block), strict=True):
                np.testing.assert_array_equal(back, tensors[name])


def test_v3_has_the_names_of_the_released_folder():
    """Facts, section 1.3: 61 layers of which 3 dense, MTP as layer 61 with copies of embedding and head."""
    table = entries(zoo.deepseek_v3())
    names = {name for entry in table.values() for row in entry.tensors for name in row}
    names |= {copy for entry in table.values() for copy in entry.copies}
    mtp = {name for name in names if name.startswith("model.layers.61.")}
    own = ("enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head", "embed_tokens")
    assert {f"model.layers.61.{name}.weight" for name in own} < mtp
    assert "model.layers.3.mlp.gate.e_score_correction_bias" in names
    assert "model.layers.60.mlp.experts.255.down_proj.weight" in names
    assert "model.layers.2.mlp.gate_proj.weight" in names
    assert len(names) == 46_183
    # weights with scales in the FP8 folder: all but embedding, head, norms, router and eh_proj
    fp8 = [entry for entry in table.values() if entry.may_be_fp8]
    assert sum(len(entry.tensors) * len(entry.tensors[0]) for entry in fp8) == 62 * 5 + 3 * 3 + 59 * 257 * 3


def test_rotary_rows_take_neighbours_apart():
    """The official layout pairs (2i, 2i + 1); here i is paired with i + R/2. Only rotary rows move."""
    model = small(attention={"qk_nope_head_dim": 3, "qk_rope_head_dim": 6, "num_heads": 2, "kv_lora_rank": 5})
    table = entries(model)
    head = [0, 1, 2, 3, 5, 7, 4, 6, 8]
    assert table["layers.0.attention.q_b.weight"].row_order.tolist() == head + [9 + row for row in head]
    assert table["layers.0.attention.kv_a.weight"].row_order.tolist() == [0, 1, 2, 3, 4, 5, 7, 9, 6, 8, 10]
    moved = {name for name, entry in table.items() if entry.row_order is not None}
    assert {name.split("attention.")[1] for name in moved} == {"q_b.weight", "kv_a.weight"}
    assert len(moved) == 2 * 4  # three layers and one of MTP


def test_half_split_folders_keep_their_rows():
    assert all(entry.row_order is None for entry in entries(small(), rope_interleaved=False).values())


def test_gate_comes_before_up():
    entry = entries(small())["layers.1.ffn.experts.gate_up"]
    gate, up = (np.full((MOE.expert_ffn_size, 24), value, np.float32) for value in (1, 2))
    block = entry.from_theirs([gate, up])
    assert entry.tensors[3] == tuple(f"model.layers.1.mlp.experts.3.{part}_proj.weight" for part in ("gate", "up"))
    assert (block[:, : MOE.expert_ffn_size] == 1).all()
    assert (block[:, MOE.expert_ffn_size :] == 2).all()


def test_the_table_names_every_parameter_of_a_layer_and_no_other():
    """A parameter that the model gets later must get a line here, and one that it loses must lose it."""
    used = set()
    for model in MODELS.values():
        for name in entries(model):
            kind, _, path = name.partition(".")
            if kind in ("layers", "mtp"):
                used.add((kind, path.partition(".")[2]))
    assert {path for kind, path in used if kind == "layers"} == set(LAYER)
    own = {path for path in MTP if not path.startswith("block.")}
    assert own < {path for kind, path in used if kind == "mtp"} <= set(MTP)


def test_biases_are_among_the_entries():
    table = entries(small())
    biases = abstract_values(Transformer(small()), RouterBias)
    assert set(biases) == {"moe", "mtp"}
    assert table["layers.1.ffn.router.bias"].tensors == (("model.layers.1.mlp.gate.e_score_correction_bias",),)
    assert ATTENTION.q_lora_rank is not None
