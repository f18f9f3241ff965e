"""What a run leaves when it ends: result, samples and report, which agree with each other and with the checkpoint."""

from __future__ import annotations

import dataclasses
import gzip
import html
import json
import lzma
import os
import shutil
import signal
import types
from typing import Any

import jax
import numpy as np
import pytest
from tiny_run import (
    STEPS,
    TOKENS,
    after_step,
    checkpoint,
    experiment,
    judge,
    quick_runs,
    records,
    train,
    write_texts,
)

from deepseek_jax.data import Tokenizer, heldout_documents
from deepseek_jax.inference.generate import Generator, bind_canonical
from deepseek_jax.training import finish, loop
from deepseek_jax.training.experiment import EvaluationConfig
from deepseek_jax.training.finish import HeldoutEvaluator

PROMPTS = ("def area(", 'The <rain> & "')


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory):
    texts = write_texts(tmp_path_factory.mktemp("texts"))
    evaluation = EvaluationConfig(batch_rows=4, every_steps=10, samples=PROMPTS, sample_tokens=8)
    with quick_runs():
        yield types.SimpleNamespace(base=experiment(texts, evaluation=evaluation))


@pytest.fixture(scope="module")
def ended(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ended")
    result, printed = train(runs.base, folder)
    return types.SimpleNamespace(
        folder=folder,
        result=result,
        printed=printed,
        saved=json.loads((folder / "result.json").read_text()),
        samples=[json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()],
        report=(folder / "report.html").read_bytes().decode(),
    )


def test_the_result_is_what_was_measured(ended):
    assert ended.result.status == "done"
    last = records(ended.folder, "eval")[-1]
    assert ended.saved["heldout_bits_per_byte"] == last["heldout_bits_per_byte"] == ended.result.heldout_bits_per_byte
    assert (ended.saved["step"], ended.saved["tokens"]) == (last["step"], last["tokens"]) == (STEPS, TOKENS)
    arrays, documents = checkpoint(ended.folder, STEPS)
    weights = {name: array for name, array in arrays.items() if not name.startswith("optimizer.")}
    assert ended.saved["parameters"] == sum(a.size for n, a in weights.items() if not n.endswith("router.bias"))
    assert ended.saved["wall_seconds"] >= documents["meta"]["seconds"] > 0
    assert ended.saved["versions"]["jax"] == jax.__version__
    assert ended.saved["machine"]["device"] == f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def test_gzip_and_xz_compress_the_very_held_out_files(ended, runs):
    """`gzip -9` and `xz -9e`, in path order and file by file."""
    texts = [document.text.encode() for document in heldout_documents(runs.base.data)]
    assert len(texts) == 3
    joined = b"".join(texts)

    def packed(compress):
        sizes = len(compress(joined)), sum(len(compress(text)) for text in texts)
        return dict(zip(("concatenated", "per_file"), (8 * size / len(joined) for size in sizes), strict=True))

    assert ended.saved["gzip"] == packed(lambda data: gzip.compress(data, 9, mtime=0))
    assert ended.saved["xz"] == packed(lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def test_the_samples_continue_every_prompt_with_the_trained_weights(ended, runs):
    methods = [finish_method for finish_method in ("greedy", "temperature 0.8, top-p 0.95") for _ in PROMPTS]
    assert [(s["step"], s["prompt"], s["method"]) for s in ended.samples] == [
        (STEPS, prompt, method) for prompt, method in zip(PROMPTS * 2, methods, strict=True)
    ]
    arrays, _ = checkpoint(ended.folder, STEPS)
    tokenizer = Tokenizer.load(ended.folder / "tokenizer.json")
    generator = Generator(bind_canonical(runs.base.model, {n: jax.numpy.asarray(a) for n, a in arrays.items()}))
    prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt).tolist()] for prompt in PROMPTS]
    outputs = generator.generate(prompts, max_new_tokens=8, sampling=finish.GREEDY, stop_ids=(tokenizer.eos_id,))
    assert [s["text"] for s in ended.samples[:2]] == [tokenizer.decode(o, skip_specials=True) for o in outputs]
    assert any(s["text"] for s in ended.samples)


def test_the_report_shows_the_same(ended):
    assert ended.report.startswith("<!doctype html>")
    assert f"<b>{ended.saved['heldout_bits_per_byte']:.3f}</b><span>held-out bits per byte" in ended.report
    for name in ("gzip", "xz"):
        assert f"{name}&#x27;s {ended.saved[name]['concatenated']:.3f}" in ended.report.replace("'", "&#x27;")
    for sample in ended.samples:
        assert html.escape(sample["prompt"]) in ended.report
        assert html.escape(sample["text"]) in ended.report
    assert ended.report.count("data:image/") == 6, "bits per byte, losses, learning rate, loads, MaxVio, evenness"


def test_the_last_words_name_the_numbers_and_the_report(ended):
    lines = ended.printed.splitlines()
    shown = {line[:22].strip(): line[22:].split() for line in lines[-4:]}
    assert shown["held-out bits per byte"][0] == f"{ended.saved['heldout_bits_per_byte']:.4f}"
    for name in ("gzip", "xz"):
        sizes = ended.saved[name]
        assert shown[name] == [f"{sizes['concatenated']:.4f}", f"({sizes['per_file']:.4f}", "file", "by", "file)"]
    assert shown["report"] == [str(ended.folder / "report.html")]
    assert f"{PROMPTS[0]}⟩{ended.samples[0]['text']}" in ended.printed


def test_a_run_without_held_out_documents_ends_too(runs, tmp_path):
    data = dataclasses.replace(runs.base.data, heldout_fraction=0.0, heldout_min_documents=0)
    evaluation = dataclasses.replace(runs.base.evaluation, samples=())
    result, printed = train(dataclasses.replace(runs.base, data=data, evaluation=evaluation), tmp_path)
    assert (result.status, result.heldout_bits_per_byte) == ("done", None)
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["heldout_bits_per_byte"] is saved["gzip"] is saved["xz"] is None
    assert (tmp_path / "samples.jsonl").read_text() == ""
    assert records(tmp_path, "eval") == []
    assert "not recorded" in (tmp_path / "report.html").read_text()
    assert "bits per byte" not in printed
    assert printed.splitlines()[-1].split() == ["report", str(tmp_path / "report.html")]


def test_an_empty_prompt_begins_after_the_end_of_a_document(runs, ended):
    """Without bos there is nothing else to begin with."""
    tokenizer = Tokenizer.load(ended.folder / "tokenizer.json")
    arrays, _ = checkpoint(ended.folder, STEPS)
    data = dataclasses.replace(runs.base.data, add_bos=False)
    evaluation = dataclasses.replace(runs.base.evaluation, samples=("", "def"))
    given = dataclasses.replace(runs.base, data=data, evaluation=evaluation)
    weights = {n: jax.numpy.asarray(a) for n, a in arrays.items()}
    generator = Generator(bind_canonical(runs.base.model, weights))
    prompts = [[tokenizer.eos_id], tokenizer.encode("def").tolist()]
    outputs = generator.generate(prompts, max_new_tokens=8, sampling=finish.GREEDY, stop_ids=(tokenizer.eos_id,))
    samples = finish._samples(given, weights, tokenizer, STEPS)
    assert [s["text"] for s in samples[:2]] == [tokenizer.decode(o, skip_specials=True) for o in outputs]


def test_the_result_is_kept_where_sampling_fails(runs, ended, tmp_path, monkeypatch):
    shutil.copytree(ended.folder, tmp_path / "run")
    for name in ("result.json", "samples.jsonl", "report.html"):
        (tmp_path / "run" / name).unlink()
    monkeypatch.setattr(finish, "_samples", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(runs.base, tmp_path / "run", resume=True)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["gzip"] == ended.saved["gzip"]
    assert not (tmp_path / "run" / "samples.jsonl").exists()


def test_resuming_a_finished_run_writes_what_is_missing(runs, ended, monkeypatch):
    before = dict(ended.saved)
    for name in ("result.json", "samples.jsonl", "report.html"):
        (ended.folder / name).unlink()
    result, _ = train(runs.base, ended.folder, resume=True)
    again = json.loads((ended.folder / "result.json").read_text())
    assert result.heldout_bits_per_byte == again["heldout_bits_per_byte"] == before["heldout_bits_per_byte"]
    for name in ("step", "tokens", "gzip", "xz", "parameters"):
        assert again[name] == before[name], name
    samples = [json.loads(line) for line in (ended.folder / "samples.jsonl").read_text().splitlines()]
    assert samples == ended.samples
    assert (ended.folder / "report.html").exists()


# --- the evaluator --------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluator(runs, tmp_path):
    """`evaluator(max_bytes)`, on documents of 10 to 60 bytes, and the documents that it reads."""

    def make(max_bytes, documents):
        evaluation = dataclasses.replace(runs.base.evaluation, max_bytes=max_bytes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(finish, "heldout_documents", lambda config: documents)
            nothing: Any = None
            return HeldoutEvaluator(dataclasses.replace(runs.base, evaluation=evaluation), nothing, nothing)

    return make


def test_part_of_the_text_is_spread_over_all_of_it(evaluator):
    documents = [types.SimpleNamespace(id=str(i), text="é" * 50) for i in range(40)]  # 4,000 bytes
    assert evaluator(1000, documents)._some_documents == documents[::4]
    assert evaluator(None, documents)._some_documents == documents
    assert evaluator(10**6, documents)._some_documents == documents
    assert evaluator(1, documents)._some_documents == documents[:1]


def test_nothing_held_out_is_no_result(evaluator):
    assert evaluator(100, [])(None, complete=True) is None
    assert evaluator(None, [])(None, complete=False) is None


def test_rows_are_padded_to_the_mesh_and_change_nothing(runs, ended):
    """Three rows at once are four in microbatches of two; the result is that of any other number of rows."""
    trainer = loop.make_trainer(runs.base)
    tokenizer = Tokenizer.load(ended.folder / "tokenizer.json")
    state = trainer.initial_state(0)
    results = []
    for rows in (3, 4, 6):
        evaluation = dataclasses.replace(runs.base.evaluation, batch_rows=rows)
        measure = HeldoutEvaluator(dataclasses.replace(runs.base, evaluation=evaluation), trainer, tokenizer)
        results.append(judge(measure, state))
    assert results[0] == results[1], "both are batches of four rows"
    np.testing.assert_allclose(results[2].bits_per_byte, results[1].bits_per_byte, rtol=1e-6)
    assert results[2][2:] == results[1][2:]
    assert 4 < results[0].bits_per_byte < 9


def test_an_interrupted_run_has_no_last_words(runs, tmp_path):
    with after_step(2, lambda state: os.kill(os.getpid(), signal.SIGTERM)):
        result, _ = train(runs.base, tmp_path)
    assert result.status == "interrupted"
    assert not {"result.json", "samples.jsonl", "report.html"} & {path.name for path in tmp_path.iterdir()}
