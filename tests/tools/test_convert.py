"""The command line of conversions: exact both ways, whole or not at all, and refusals in one line."""

import json
import os
import re
import signal
import time

import numpy as np
import pytest
from hf_folder import assert_same_tensors, read_tensors, write_folder, write_tensors
from small_model import small

import deepseek_jax as ds
from deepseek_jax.data.tokenizer import train_tokenizer
from deepseek_jax.interop import weights
from deepseek_jax.interop.huggingface import HuggingFaceFolder
from deepseek_jax.interop.quantization import Quantization
from deepseek_jax.interop.safetensors import TensorFolder
from deepseek_jax.training.checkpoint import CheckpointStore
from deepseek_jax.training.weights import CheckpointWeights
from tools import convert

ODD = small(hidden_size=136, dense_ffn_size=150, attention={"num_heads": 3, "kv_lora_rank": 130}, mtp_depth=2)
FORMS = {
    "bf16": {},
    "fp8": {"fp8": Quantization()},
    "ue8m0": {"fp8": Quantization(scale_format="ue8m0"), "e8m0": True},
}


def run(capsys, *arguments):
    """Exit code, standard output, standard error."""
    code = convert.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix not in (".safetensors",)}


@pytest.fixture
def folder(tmp_path):
    """A folder with everything that lies beside the weights."""
    folder = write_folder(tmp_path / "hf", ODD, config={"eos_token_id": 1})
    train_tokenizer(["a few words, and a few more"], vocab_size=300).save(folder / "tokenizer.json")
    for name, text in {"generation_config.json": '{"eos_token_id": 1}', "LICENSE": "MIT", "modeling.py": "1/0"}.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_hugging_face_to_checkpoint_and_back_is_bit_exact(tmp_path, capsys, form):
    """On a shape that nothing divides, MTP of two depths, scales and their dtype included."""
    folder = write_folder(tmp_path / "hf", ODD, **form)
    assert run(capsys, "to-checkpoint", folder, tmp_path / "ours", "--verify")[0] == 0
    code, out, _ = run(capsys, "to-hf", tmp_path / "ours", tmp_path / "back", "--verify")
    assert code == 0
    assert out.splitlines()[-1] == f"{tmp_path / 'back'} holds what {tmp_path / 'ours'} holds"
    assert_same_tensors(folder, tmp_path / "back")


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_huge_tensors_go_a_piece_at_a_time(tmp_path, capsys, monkeypatch, form):
    """300 rows of embedding and head as 128, 128 and 44, on every way."""
    monkeypatch.setattr(weights, "_PIECE_BYTES", 1)
    reads = []
    real = TensorFolder.read

    def read(self, name, rows=None):
        reads.append((name, rows))
        return real(self, name, rows)

    monkeypatch.setattr(TensorFolder, "read", read)
    folder = write_folder(tmp_path / "hf", small(vocab_size=300), **form)
    run(capsys, "to-checkpoint", folder, tmp_path / "ours", "--verify")
    assert {rows.start for name, rows in reads if name == "lm_head.weight"} == {0, 128, 256}
    assert run(capsys, "to-hf", tmp_path / "ours", tmp_path / "back", "--verify")[0] == 0
    assert run(capsys, "to-hf", folder, tmp_path / "wide", "--precision", "float32", "--verify")[0] == 0
    assert_same_tensors(folder, tmp_path / "back")
    one, other = (ds.load(each, dtype="float32", progress=False) for each in (folder, tmp_path / "wide"))
    tokens = np.arange(0, 300, 25)[None]
    np.testing.assert_array_equal(np.asarray(one(tokens)), np.asarray(other(tokens)))
    head = read_tensors(folder)["lm_head.weight"].astype(np.float32)
    np.testing.assert_array_equal(np.asarray(one.model.head.weight[...]), head.T)


def test_float64_stays_so(tmp_path, capsys):
    """jax would narrow it."""
    folder = write_folder(tmp_path / "hf", ODD, dtype=np.float64)
    assert run(capsys, "to-checkpoint", folder, tmp_path / "ours", "--verify")[0] == 0
    assert run(capsys, "to-hf", tmp_path / "ours", tmp_path / "back", "--verify")[0] == 0
    assert_same_tensors(folder, tmp_path / "back")


@pytest.mark.parametrize("command", ["to-checkpoint", "to-hf"])
def test_an_interrupted_conversion_ends_at_once_and_leaves_nothing(tmp_path, capsys, monkeypatch, folder, command):
    """Ctrl-C while weights are read, in the background or not: no other tensor is read, and the folder is gone."""
    reading, read = [], HuggingFaceFolder.values

    def values(self, entry, row, rows=None):
        reading.append(entry.name)
        if len(reading) == 20:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.02)
        return read(self, entry, row, rows)

    monkeypatch.setattr(HuggingFaceFolder, "values", values)
    code, _, error = run(capsys, command, folder, tmp_path / "out")
    assert (code, error) == (130, "stopped; nothing is left behind\n")
    assert len(reading) < 40
    time.sleep(0.2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_checkpoint_that_names_no_model_is_refused(tmp_path, capsys, folder):
    run(capsys, "to-checkpoint", folder, tmp_path / "ours")
    (tmp_path / "ours" / "checkpoints" / "0" / "documents" / "documents.json").write_text("{}")
    code, _, error = run(capsys, "to-hf", tmp_path / "ours", tmp_path / "x")
    assert (code, error) == (1, f"error: checkpoint 0 in {tmp_path / 'ours'} does not say which model it holds\n")


def test_what_lies_beside_the_weights_comes_along(tmp_path, capsys, folder):
    run(capsys, "to-checkpoint", folder, tmp_path / "ours")
    run(capsys, "to-hf", tmp_path / "ours", tmp_path / "back")
    before, after = files(folder), files(tmp_path / "back")
    assert before.keys() == after.keys()
    assert json.loads(before.pop("config.json")) == json.loads(after.pop("config.json"))
    assert before == after


def test_a_checkpoint_holds_canonical_entries(tmp_path, capsys, folder):
    """So a run starts from it on any mesh, as from any other."""
    run(capsys, "to-checkpoint", folder, tmp_path / "ours")
    store = CheckpointStore(tmp_path / "ours" / "checkpoints")
    names = store.entries(0)
    assert names["layers.1.ffn.experts.gate_up"].shape == (8, 136, 32)
    assert names["mtp.1.block.attention.o.weight"].dtype == "bfloat16"
    theirs = read_tensors(folder)["model.layers.0.self_attn.o_proj.weight"]
    ours = store.restore(0, {"layers.0.attention.o.weight": names["layers.0.attention.o.weight"]}, skip=("",))
    np.testing.assert_array_equal(np.asarray(ours["layers.0.attention.o.weight"]), theirs.T)


def test_fp8_to_bf16_and_back_gives_the_same_codes(tmp_path, capsys):
    folder = write_folder(tmp_path / "hf", ODD, fp8=Quantization())
    assert run(capsys, "to-hf", folder, tmp_path / "bf16", "--precision", "bfloat16", "--verify")[0] == 0
    assert run(capsys, "to-hf", tmp_path / "bf16", tmp_path / "fp8", "--precision", "fp8", "--verify")[0] == 0
    before, after = read_tensors(folder), read_tensors(tmp_path / "fp8")
    assert before.keys() == after.keys()
    for name, array in before.items():
        if name.endswith("_scale_inv"):
            assert np.abs(after[name] / array - 1).max() <= 2**-8, name
        else:
            assert array.tobytes() == after[name].tobytes(), name


def test_verify_finds_one_changed_number(tmp_path, capsys, folder):
    run(capsys, "to-hf", folder, tmp_path / "b", "--precision", "fp8")
    assert run(capsys, "verify", folder, tmp_path / "b")[0] == 0
    tensors = read_tensors(tmp_path / "b")
    name = "model.layers.2.mlp.experts.3.down_proj.weight"
    tensors[name].view(np.uint8)[5, 7] ^= 1
    (tmp_path / "b" / "model.safetensors").unlink()
    write_tensors(tmp_path / "b", tensors)
    code, _, error = run(capsys, "verify", folder, tmp_path / "b")
    assert (code, error) == (1, f"error: 1 tensors differ: {name}\n")


def test_inspect_sums_up_layers_and_experts(tmp_path, capsys, folder):
    code, out, error = run(capsys, "inspect", folder)
    assert (code, error) == (0, "")
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    # two layers of the main model and two of MTP, eight experts each
    assert lines["model.layers.1-4.mlp.experts.0-7.up_proj.weight"] == ["32", "16", "x", "136", "bfloat16", "0.14"]
    assert lines["model.layers.0.mlp.up_proj.weight"][:4] == ["1", "150", "x", "136"]
    assert re.search(r"\d+ tensors, 0\.0\d GB in 1 file", out)
    every = run(capsys, "inspect", folder, "--all")[1]
    assert len(every.splitlines()) == len(read_tensors(folder)) + 3


def test_inspect_names_what_is_missing_and_what_is_left_over(tmp_path, capsys, folder):
    tensors = read_tensors(folder)
    tensors["extra.weight"] = tensors.pop("lm_head.weight")
    (folder / "model.safetensors").unlink()
    write_tensors(folder, tensors)
    code, out, error = run(capsys, "inspect", folder)
    assert code == 1
    assert "extra.weight" in out
    assert error == "error: 1 tensor is missing: lm_head.weight\nerror: 1 tensor is left over: extra.weight\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("to-hf", "nowhere", "x"), "nowhere does not exist"),
        (("to-hf", "hf", "hf"), "hf exists already; choose another name or remove it"),
        (("to-checkpoint", "hf", "hf"), "hf exists already"),
        (("to-hf", "empty", "x"), "empty holds no checkpoint"),
        (("to-hf", "hf", "x", "--step", "3"), "--step chooses a checkpoint, and hf is a Hugging Face folder"),
        (("to-hf", "hf", "x", "--shard_gb", "0"), "--shard_gb must be positive, not 0.0"),
        (("to-hf", "hf", "x", "--shard_gb", "nan"), "--shard_gb must be positive, not nan"),
        (("to-hf", "hf", "x", "--shard_gb", "1e-10"), "--shard_gb must be positive, not 1e-10"),
        (("inspect", "empty"), "there is no safetensors file"),
        (("verify", "hf", "other"), "other holds another architecture than hf"),
        (("to-hf", "gs://bucket/a", "x"), "must be on a local or mounted disk"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(tmp_path, capsys, monkeypatch, folder, arguments, message):
    write_folder(tmp_path / "other", small())
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text((folder / "config.json").read_text())
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    code, _, error = run(capsys, *arguments)
    assert code == 1
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path, capsys, folder):
    run(capsys, "to-checkpoint", folder, tmp_path / "ours")
    path = tmp_path / "ours" / "checkpoints" / "0" / "documents" / "documents.json"
    documents = json.loads(path.read_text())
    documents["meta"]["model"]["dense_ffn_size"] = 160
    path.write_text(json.dumps(documents))
    with pytest.raises(ValueError, match=r"of another architecture; entries 2 of another shape: layers.0.ffn.down"):
        CheckpointWeights(tmp_path / "ours")


def test_a_source_that_fails_on_the_way_is_one_line_and_leaves_nothing(tmp_path, capsys, folder):
    """The copies of MTP are compared while they are read, so this is found in the middle."""
    tensors = read_tensors(folder)
    copy = "model.layers.4.shared_head.head.weight"
    tensors[copy] = tensors[copy].copy()
    tensors[copy].view(np.uint8)[5, 7] ^= 1
    (folder / "model.safetensors").unlink()
    write_tensors(folder, tensors)
    for command in ("to-checkpoint", "to-hf"):
        code, _, error = run(capsys, command, folder, tmp_path / "x")
        assert code == 1
        assert error == (
            f"error: {folder}: {copy} differs from lm_head.weight; MTP shares it with the main model (section 2.2), "
            "so both cannot be kept\n"
        )
        assert [path.name for path in tmp_path.iterdir()] == ["hf"]
