"""Statistics of a run's quantised tensors: all of them, of the model that trains, and the first that is not finite."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver
from small_model import QUICK, initial_state, quickly
from tiny_run import LENGTH, MODEL, VOCABULARY, experiment, write_texts

from deepseek_jax.config_io import save_config
from deepseek_jax.evaluation.report import QUANTIZATION_NAME, write_report
from deepseek_jax.model.targets import Microbatch
from deepseek_jax.parallel.pipeline.protocol import LossScales
from deepseek_jax.precision.policy import V3_FP8
from deepseek_jax.training.checkpoint import CheckpointStore
from deepseek_jax.training.loop import make_trainer
from tools import quantization_stats as tool

FP8 = dataclasses.replace(V3_FP8, compute="float32")
SMALL = dataclasses.replace(
    MODEL, num_layers=1, num_dense_layers=1, attention=dataclasses.replace(MODEL.attention, v_head_dim=12)
)
"""A dense layer and an MTP module with its MoE layer, whose weights are told apart by their shapes."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The experiment of a run in FP8, its trainer, the state before its first step, and a batch."""
    folder = tmp_path_factory.mktemp("texts")
    one = dataclasses.replace(experiment(write_texts(folder)), precision=FP8, model=SMALL)
    trainer = quickly(make_trainer(one))
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH + 1)).astype(np.int32)
    ones, positions = np.ones_like(tokens), np.broadcast_to(np.arange(LENGTH + 1, dtype=np.int32), tokens.shape)
    return one, trainer, initial_state(trainer), Microbatch(tokens, ones, positions, ones)


def entries_of(trainer, state) -> dict:
    return {**trainer.params_layout.unstack(state.params), **trainer.bias_layout.unstack(state.router_bias)}


@pytest.fixture(scope="module")
def walker(run):
    one, trainer, state, _ = run
    made = tool.LayerByLayer(one, trainer, entries_of(trainer, state))
    for name, function in (("_prepare", made._prepared), ("_forward", made._layer), ("_backward", made._pull)):
        setattr(made, name, jax.jit(function, static_argnums=0, compiler_options=QUICK))
    return made


SCALES = LossScales(*(jnp.float32(scale) for scale in (1.0, 0.0, 0.0)))


def test_layer_by_layer_is_the_model_that_trains(run, walker):
    """The sum of the main losses is what the trainer's own program finds, and every quantised tensor has a reading."""
    _, trainer, state, batch = run
    study = walker.run(batch, SCALES)
    expected, _ = trainer.evaluate(state, jax.tree.map(jnp.asarray, batch))
    assert study.loss == pytest.approx(float(expected), rel=1e-5)
    assert study.first_not_finite is None
    products = {"x for Fprop", "x for Wgrad", "dy for Dgrad", "dy for Wgrad", "weight"}
    extra = {"attention.o.weight": "attention's output, kept"}
    extra |= dict.fromkeys(("ffn.down.weight", "ffn.shared.down.weight", "ffn.experts.down"), "SwiGLU's input, kept")
    attention = [f"attention.{name}.weight" for name in ("q_a", "q_b", "kv_a", "kv_b", "o")]
    moe = [*attention, "ffn.experts.gate_up", "ffn.experts.down", "ffn.shared.gate_up.weight", "ffn.shared.down.weight"]
    wanted = {
        "layers.0": [*attention, "ffn.gate_up.weight", "ffn.down.weight"],
        "mtp.0": [f"block.{name}" for name in moe],
    }
    for layer, names in wanted.items():
        for name in names:
            found = {t.reading.role for t in study.tensors if t.layer == layer and name in t.name.split(", ")}
            kept = extra.get(name.removeprefix("block."))
            assert found == products | ({kept} if kept else set()), (layer, name)
    assert all(t.record()["clipped"] == 0 and t.record()["relative_error"] < 0.05 for t in study.tensors)


def test_the_first_tensor_that_is_not_finite_is_named(run, walker, monkeypatch):
    """Finite weights so large that keys and values overflow: the first to show it is what the output projection reads;
    a NaN in a weight is found before any of that."""
    batch, name = run[-1], "layers.0.attention.kv_b.weight"
    weight = walker.entries[name]
    huge = walker.entries | {name: jnp.full_like(weight, 1e38)}
    monkeypatch.setattr(walker, "entries", huge)
    assert walker.run(batch, SCALES).first_not_finite == "layers.0: x for Fprop, attention.o.weight"
    monkeypatch.setattr(walker, "entries", huge | {name: weight.at[0, 0].set(jnp.nan)})
    assert walker.run(batch, SCALES).first_not_finite == name
    infinite = SCALES._replace(main=jnp.float32(np.inf))
    monkeypatch.setattr(walker, "entries", huge | {name: weight})
    assert walker.run(batch, infinite).first_not_finite == "the loss"


@pytest.fixture
def saved(run, tmp_path):
    """A run's folder with a checkpoint, and a batch that it saved."""
    one, trainer, state, batch = run
    save_config(one, tmp_path / "config.json")
    with CheckpointStore(tmp_path / "checkpoints") as store:
        documents = {"meta": {"tokens": 0, "step": 3}, "data": {}}
        store.save(3, entries_of(trainer, state), documents, wait=True)
    np.savez_compressed(tmp_path / "nonfinite_step_4.npz", **batch._asdict())
    return tmp_path


def test_the_command_prints_a_table_and_the_report_draws_it(saved, run, walker, monkeypatch, capsys):
    def same_walker(one, trainer, entries):  # which is compiled already
        assert sorted(entries) == sorted(walker.entries)
        for name, array in entries.items():
            np.testing.assert_array_equal(array, walker.entries[name])
        return walker

    monkeypatch.setattr(tool, "LayerByLayer", same_walker)
    monkeypatch.setattr(tool, "_next_batch", lambda *arguments: run[-1])
    tool.flags.FLAGS.mark_as_parsed()
    assert tool.main(["quantization_stats", str(saved)]) == 0
    printed = capsys.readouterr().out
    assert "| mtp.0 | block.ffn.experts.down | dy for Wgrad | 128×1 | E4M3 | " in printed
    assert printed.endswith("step 3, 2 rows, its own FP8\nevery tensor is finite\n")
    document = json.loads((saved / QUANTIZATION_NAME).read_text())
    assert (document["step"], document["own_fp8"]) == (3, True)
    page = write_report(saved).read_text()
    assert "<h2>Quantisation</h2>" in page
    (saved / QUANTIZATION_NAME).unlink()
    assert "<h2>Quantisation</h2>" not in write_report(saved).read_text()
    with flagsaver.flagsaver(batch=str(saved / "nonfinite_step_4.npz")):
        assert tool.main(["quantization_stats", str(saved)]) == 0
    assert not (saved / QUANTIZATION_NAME).exists()


def test_what_cannot_be_read_is_one_line(saved, tmp_path, capsys):
    tool.flags.FLAGS.mark_as_parsed()
    (tmp_path / "text.npz").write_text("no batch")
    for changes, folder, message in (
        ({"batch": str(tmp_path / "text.npz")}, saved, f"error: --batch: {tmp_path}/text.npz is no batch that a run"),
        ({"step": 7}, saved, "error: "),
        ({}, tmp_path / "nowhere", "error: "),
    ):
        with flagsaver.flagsaver(**changes):
            assert tool.main(["quantization_stats", str(folder)]) == 1
        err = capsys.readouterr().err
        assert err.startswith(message)
        assert err.count("\n") == 1
    assert tool.main(["quantization_stats"]) == 2
