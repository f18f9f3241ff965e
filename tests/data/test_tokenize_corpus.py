from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.data import (
    ArrayRecord,
    DataError,
    TextFiles,
    TokenizerConfig,
    heldout_documents,
    train_rows,
    train_tokenizer,
)
from deepseek_jax.data.array_record import CorpusWriter, pack_record, unpack_record
from deepseek_jax.data.documents import Document
from tools.tokenize_corpus import tokenize_corpus


@pytest.fixture(scope="module")
def corpus(folder, tokenizer, tmp_path_factory):
    """The test folder, tokenized into 3 shards, and its metadata."""
    root = tmp_path_factory.mktemp("tokenized")
    tokenizer.save(root / "tokenizer.json")
    output = root / "tokens"
    config = TokenizerConfig(path=root / "tokenizer.json")
    return output, tokenize_corpus(TextFiles(path=folder), config, str(output), shards=3)


@pytest.mark.parametrize("top", [0, 65_535, 65_536, 200_000])
def test_record_round_trip(top):
    tokens = np.array([0, 7, top], np.int32)
    name, back = unpack_record(pack_record("größe/a.py", tokens))
    assert name == "größe/a.py"
    np.testing.assert_array_equal(back, tokens)
    assert back.dtype == np.int32


def test_training_rows_and_heldout_text_are_those_of_the_text(corpus, config, tokenizer):
    tokenized = dataclasses.replace(config, sources=(ArrayRecord(path=corpus[0]),))
    assert heldout_documents(tokenized) == heldout_documents(config)
    from_text, from_tokens = (train_rows(c, tokenizer, seed=0) for c in (config, tokenized))
    for _ in range(10):
        one, other = from_text.next_batch(8), from_tokens.next_batch(8)
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_metadata_counts(corpus, folder, tokenizer):
    output, metadata = corpus
    files = list(folder.rglob("*.txt"))
    assert metadata["documents"] == 60 == sum(shard["documents"] for shard in metadata["shards"])
    assert metadata["bytes"] == sum(file.stat().st_size for file in files)
    assert metadata["tokens"] == sum(len(tokenizer.encode(file.read_bytes().decode())) for file in files)
    assert metadata["tokenizer_fingerprint"] == tokenizer.fingerprint()
    assert {path.name for path in output.parent.iterdir()} == {"tokenizer.json", "tokens"}


def test_another_tokenizer_is_refused(corpus, config):
    other = train_tokenizer(["def other(): pass\n" * 5], vocab_size=290)
    tokenized = dataclasses.replace(config, sources=(ArrayRecord(path=corpus[0]),))
    with pytest.raises(DataError, match=r"was tokenized with tokenizer \w{12}, and the run uses \w{12}; set tokenizer"):
        train_rows(tokenized, other, seed=0)


def test_nothing_is_overwritten_or_left_half_done(corpus, tokenizer, tmp_path):
    with pytest.raises(DataError, match="exists already, and a corpus is never overwritten"):
        CorpusWriter(str(corpus[0]), tokenizer)

    def interrupted():
        yield Document("a", "text")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), CorpusWriter(str(tmp_path / "new"), tokenizer) as writer:
        writer.write(interrupted())
    with (
        pytest.raises(DataError, match="there is no document to write"),
        CorpusWriter(str(tmp_path / "new"), tokenizer),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="on a local or mounted disk, which"):
        CorpusWriter("gs://bucket/corpus", tokenizer)


def copy(corpus, tmp_path) -> Path:
    target = tmp_path / "copy"
    target.mkdir()
    for file in corpus[0].iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize("damage", ["missing", "cut", "metadata", "digests", "format", "other shard"])
def test_a_damaged_corpus_is_an_error(corpus, config, tmp_path, damage):
    target = copy(corpus, tmp_path)
    shard = next(iter(sorted(target.glob("*.array_record"))))
    message = "the tokenized corpus is damaged or cut short"
    match damage:
        case "missing":
            (target / "metadata.json").unlink()
            message = r"no tokenized corpus there \(metadata\.json is missing\)"
        case "cut":
            shard.write_bytes(shard.read_bytes()[:-100])
        case "metadata":
            (target / "metadata.json").write_text("{")
        case "digests":
            np.save(target / "digests.npy", np.zeros(3, np.uint64))
        case "format":
            (target / "metadata.json").write_text('{"format": 9}')
            message = "format 9, and this version reads format 1"
        case _:
            shard.unlink()
    with pytest.raises(DataError, match=message):
        heldout_documents(dataclasses.replace(config, sources=(ArrayRecord(path=target),)))


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.tokenize_corpus", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_command_line(folder, tmp_path):
    done = run(f"--path={folder}", "--vocab_size=300", f"--output={tmp_path / 'out'}", "--shards=2")
    assert done.returncode == 0, done.stderr
    assert "60 documents" in done.stdout
    assert len(list((tmp_path / "out").glob("*.array_record"))) == 2
    failed = run(f"--path={folder / 'nowhere'}", f"--output={tmp_path / 'out2'}")
    assert failed.returncode == 1
    assert failed.stderr.strip() == f"tokenize_corpus: {folder / 'nowhere'}: no such file or folder"


def test_the_command_line_leaves_broken_text_files_out_if_asked(tmp_path):
    texts, output = tmp_path / "texts", tmp_path / "out"
    texts.mkdir()
    for number in range(60):
        (texts / f"{number}.txt").write_text(f"document {number}\n" * 9)
    (texts / "7.txt").write_bytes(b"caf\xe9")
    arguments = (f"--path={texts}", "--vocab_size=300", f"--output={output}")
    failed = run(*arguments)
    assert failed.returncode == 1
    assert failed.stderr.strip() == (
        f"tokenize_corpus: {texts}/7.txt: invalid UTF-8 at byte offset 3 (0xe9); convert the file to UTF-8; "
        "on_error=skip leaves such documents out"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]
    done = run(*arguments, "--on_error=skip")
    assert done.returncode == 0, done.stderr
    assert "59 documents" in done.stdout
    assert f"{texts}: left out 1 broken documents, the first: {texts}/7.txt: invalid UTF-8" in done.stderr
