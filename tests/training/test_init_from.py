"""Runs that start from weights: a Hugging Face folder, a converted checkpoint, another run."""

import dataclasses
import json

import numpy as np
import pytest
from hf_folder import read_tensors, write_folder
from tiny_run import MODEL, SENTENCES, VOCABULARY, checkpoint, experiment, quick_runs, records, train, write_texts

import deepseek_jax as ds
from deepseek_jax.config import ConfigError, YarnConfig
from deepseek_jax.config_io import save_config
from deepseek_jax.data import Jsonl
from deepseek_jax.data.tokenizer import Tokenizer, train_tokenizer
from deepseek_jax.interop.errors import InteropError
from deepseek_jax.interop.layout import entries
from deepseek_jax.interop.quantization import Quantization
from deepseek_jax.training.init_from import first_state, starting_from
from deepseek_jax.training.loop import make_trainer
from experiments import run as command_line
from tools import convert

LITE = dataclasses.replace(
    ds.zoo.deepseek_v2_lite(long_context=True),
    vocab_size=VOCABULARY + 20,  # padded beyond the tokenizer, as published ones are
    hidden_size=32,
    num_layers=3,
    dense_ffn_size=48,
    attention=dataclasses.replace(
        ds.zoo.deepseek_v2_lite(long_context=True).attention,
        num_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
    ),
    moe=dataclasses.replace(ds.zoo.deepseek_v2_lite().moe, num_experts=4, experts_per_token=2, expert_ffn_size=16),
)  # fmt: skip
"""V2-Lite, shrunken: no query compression, softmax router without bias, YaRN at 0.707, two shared experts."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    path = tmp_path_factory.mktemp("jsonl") / "own.jsonl"
    lines = [json.dumps({"text": f"# {i}\n" + SENTENCES[i % 3] * (1 + i % 5)}) for i in range(60)]
    path.write_text("\n".join(lines) + "\n")
    return path


def folder_of(path, model, **options):
    """A Hugging Face folder with a tokenizer."""
    write_folder(path, model, **options)
    train_tokenizer(SENTENCES, vocab_size=VOCABULARY).save(path / "tokenizer.json")
    return path


@pytest.fixture(scope="module")
def lite(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("lite") / "hf", LITE)


def test_continued_pretraining_of_v2_lite_on_own_jsonl_is_one_command(lite, jsonl, tmp_path, capsys):
    """The command of the README on a shrunken folder; its checkpoint goes back to Hugging Face's layout."""
    workdir = tmp_path / "run"
    sets = [
        f"data.sources=Jsonl(path={jsonl})",
        "data.sequence_length=32",
        "data.heldout_min_documents=3",
        "schedule.total_tokens=320",
        "schedule.batch_rows.phases.0.value=2",
        "logging.every_steps=1",
        "logging.tensorboard=false",
    ]
    command = ["v2_lite.continue_pretraining", "--init_from", f"hf:{lite}", "--workdir", str(workdir)]
    assert command_line.main(command + [part for each in sets for part in ("--set", each)]) == 0
    assert "resumed" not in capsys.readouterr().out
    assert [record["step"] for record in records(workdir, "train")] == [1, 2, 3, 4, 5]
    assert json.loads((workdir / "config.json").read_text())["init_from"] == f"hf:{lite}"
    saved = Tokenizer.load(workdir / "tokenizer.json")
    assert saved.fingerprint() == Tokenizer.load(lite / "tokenizer.json").fingerprint()
    assert convert.main(["to-hf", str(workdir), str(tmp_path / "out")]) == 0
    assert ds.load(tmp_path / "out", progress=False).config.attention.yarn is not None
    before, after = read_tensors(lite), read_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    # At such a rate five steps hardly change them.
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    np.testing.assert_allclose(after[name].astype(np.float32), before[name].astype(np.float32), atol=2e-3)


@pytest.mark.parametrize("fp8", [None, Quantization()], ids=["bf16", "fp8"])
def test_a_run_starts_with_the_folders_weights_and_biases(tmp_path, texts, fp8):
    """All of them, MTP included, in float32; the optimizer is new."""
    folder = folder_of(tmp_path / "hf", MODEL, fp8=fp8)
    start = starting_from(experiment(texts), f"hf:{folder}")
    frozen = dataclasses.replace(start.schedule, total_tokens=2 * 32, bias_rate=start.schedule.bias_rate)
    start = dataclasses.replace(start, schedule=frozen, optimizer=dataclasses.replace(start.optimizer, peak_lr=1e-30))
    with quick_runs():
        train(start, tmp_path / "run")
    arrays, _ = checkpoint(tmp_path / "run", 1)
    model = ds.load(folder, dtype="float32", progress=False).model
    expected = np.asarray(model.moe.ffn.experts.gate_up[...])[0]
    np.testing.assert_array_equal(arrays["layers.1.ffn.experts.gate_up"], expected)
    tensors = read_tensors(folder)
    norm = tensors["model.layers.2.shared_head.norm.weight"].astype(np.float32)
    np.testing.assert_array_equal(arrays["mtp.0.final_norm.scale"], norm)
    bias = tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert np.abs(arrays["layers.1.ffn.router.bias"] - bias).max() <= 0.0201  # one update of 0.02
    assert {name for name in arrays if not name.startswith("optimizer.")} == entries(MODEL).keys()


def test_a_run_starts_from_another_runs_weights(tmp_path, texts):
    """Its own optimizer, tokens and step count from zero; what a context extension changes may differ."""
    with quick_runs():
        train(dataclasses.replace(experiment(texts)), tmp_path / "first")
        start = starting_from(experiment(texts), str(tmp_path / "first"))
        assert start.tokenizer.path == str(tmp_path / "first" / "tokenizer.json")
        attention = dataclasses.replace(start.model.attention, yarn=YarnConfig(factor=2.0, original_length=32))
        still = dataclasses.replace(start.schedule, total_tokens=2 * 32)
        start = dataclasses.replace(
            start,
            model=dataclasses.replace(start.model, attention=attention),
            schedule=still,
            optimizer=dataclasses.replace(start.optimizer, peak_lr=1e-30),
        )
        train(start, tmp_path / "second")
    first, _ = checkpoint(tmp_path / "first", 20)
    second, documents = checkpoint(tmp_path / "second", 1)
    assert documents["meta"]["tokens"] == 64
    for name in ("embedding.weight", "layers.1.ffn.router.weight", "mtp.0.projection.weight"):
        np.testing.assert_array_equal(second[name], first[name])


def test_a_resumed_run_goes_on_from_its_own_checkpoint(tmp_path, texts):
    folder = folder_of(tmp_path / "hf", MODEL)
    start = starting_from(experiment(texts), f"hf:{folder}")
    short = dataclasses.replace(start, schedule=dataclasses.replace(start.schedule, total_tokens=20 * 32))
    with quick_runs():
        train(short, tmp_path / "run")
        (folder / "model.safetensors").unlink()  # not needed any more
        (folder / "config.json").unlink()
        result, printed = train(start, tmp_path / "run", resume=True)
    assert result.step == 20
    assert "resumed from step 10" in printed


def test_weights_of_another_architecture_are_refused(tmp_path, texts):
    folder = folder_of(tmp_path / "hf", dataclasses.replace(MODEL, mtp_depth=0))
    start = experiment(texts)
    named = dataclasses.replace(start.tokenizer, path=str(folder / "tokenizer.json"))
    start = dataclasses.replace(start, init_from=f"hf:{folder}", tokenizer=named)
    with (
        quick_runs(),
        pytest.raises(ConfigError, match=r"model.mtp_depth is 0 there and 1 here; start with --init_from"),
    ):
        train(start, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_folder_without_a_tokenizer_needs_one(tmp_path, texts):
    folder = write_folder(tmp_path / "hf", MODEL)
    with pytest.raises(ConfigError, match=r"has no tokenizer.json, .*: set tokenizer.path"):
        starting_from(experiment(texts), f"hf:{folder}")


def test_the_tokenizer_of_a_folder_above_is_another_models(tmp_path, texts):
    """But that of a run is above its checkpoints."""
    folder = write_folder(tmp_path / "hf", MODEL)
    train_tokenizer(SENTENCES, vocab_size=VOCABULARY).save(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"has no tokenizer.json"):
        starting_from(experiment(texts), f"hf:{folder}")
    assert convert.main(["to-checkpoint", str(folder), str(tmp_path / "ours")]) == 0
    with pytest.raises(ConfigError, match=r"has no tokenizer.json"):
        starting_from(experiment(texts), str(tmp_path / "ours"))
    train_tokenizer(SENTENCES, vocab_size=VOCABULARY).save(tmp_path / "ours" / "tokenizer.json")
    start = starting_from(experiment(texts), str(tmp_path / "ours" / "checkpoints"))
    assert start.tokenizer.path == str(tmp_path / "ours" / "tokenizer.json")


def test_a_hugging_face_folder_without_hf_before_it(tmp_path, texts):
    folder = folder_of(tmp_path / "hf", MODEL)
    with pytest.raises(ConfigError, match=f"is a Hugging Face folder: start from it with hf:{folder}"):
        starting_from(experiment(texts), str(folder))


@pytest.mark.parametrize("fp8", [None, Quantization()], ids=["bf16", "fp8"])
def test_a_converted_checkpoint_starts_a_run_as_its_folder_does(tmp_path, texts, fp8):
    folder = folder_of(tmp_path / "hf", MODEL, fp8=fp8)
    assert convert.main(["to-checkpoint", str(folder), str(tmp_path / "ours")]) == 0
    states = []
    for start in (f"hf:{folder}", str(tmp_path / "ours")):
        begun = starting_from(experiment(texts), start)
        assert Tokenizer.load(begun.tokenizer.path).fingerprint() == Tokenizer.load(folder).fingerprint()
        trainer = make_trainer(begun)
        state = first_state(begun, trainer)
        states.append(trainer.params_layout.unstack(state.params) | trainer.bias_layout.unstack(state.router_bias))
    assert states[0].keys() == states[1].keys() == entries(MODEL).keys()
    for name, array in states[0].items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(states[1][name]), err_msg=name)


@pytest.mark.parametrize(
    ("init_from", "message"),
    [("hf:nowhere", "nowhere/config.json cannot be read"), ("nowhere", "nowhere holds no checkpoint")],
)
def test_a_folder_that_is_not_there(tmp_path, texts, monkeypatch, init_from, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        starting_from(experiment(texts), init_from)


def test_init_from_and_resume_are_two_things(capsys):
    assert command_line.main(["tiny.pretrain", "--resume", "--init_from", "hf:x"]) == 2
    assert "--resume continues from the run's own checkpoint; leave out --init_from" in capsys.readouterr().err


def test_a_damaged_folder_is_an_error_before_anything_is_written(tmp_path, capsys):
    folder = folder_of(tmp_path / "hf", MODEL)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    command = ["tiny.pretrain", "--init_from", f"hf:{folder}", "--workdir", str(tmp_path / "run")]
    assert command_line.main(command) == 2
    assert "truncated" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert issubclass(InteropError, ValueError)
    assert Jsonl is not None


def test_a_tokenizer_may_be_named_for_a_folder_without_one(tmp_path, texts, capsys):
    folder = folder_of(tmp_path / "hf", MODEL)
    (folder / "tokenizer.json").rename(tmp_path / "own.json")
    named = ["--set", f"tokenizer.path={tmp_path / 'own.json'}", "--print_config"]
    assert command_line.main(["tiny.pretrain", "--init_from", f"hf:{folder}", *named]) == 0
    assert "own.json" in capsys.readouterr().out


def test_init_from_alone_is_refused(texts):
    with pytest.raises(ConfigError, match="init_from needs the tokenizer of its weights: start with --init_from"):
        dataclasses.replace(experiment(texts), init_from="hf:somewhere")


def test_a_run_that_died_before_its_first_checkpoint_does_not_begin_with_other_weights(tmp_path, texts):
    """Resumed by its recipe's name it would begin from the seed."""
    folder = folder_of(tmp_path / "hf", MODEL)
    start = starting_from(experiment(texts), f"hf:{folder}")
    (tmp_path / "run").mkdir()
    save_config(start, tmp_path / "run" / "config.json")
    with quick_runs(), pytest.raises(ConfigError, match=r"began from hf:.* and has no checkpoint yet: resume it with"):
        train(experiment(texts), tmp_path / "run", resume=True)
