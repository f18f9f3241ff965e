"""tools.tokenize_corpus from the command line: every kind of source, and the documents that its folder gives back."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepseek_jax.data import (
    ArrayRecord,
    DataConfig,
    Jsonl,
    Parquet,
    StandardLibrary,
    Tokenizer,
    heldout_documents,
    train_documents,
    train_tokenizer,
)
from deepseek_jax.data.documents import Document
from deepseek_jax.data.sources import open_documents

TEXTS = [f"document {i}: größe 你好 👩‍👩‍👧;\r\n\n" * (1 + i * i % 7) + "\t<think>\x00" for i in range(60)]


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.tokenize_corpus", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def documents(source) -> list[Document]:
    found = open_documents(source)
    return [found[i] for i in range(len(found))]


def write_jsonl(path: Path, field: str, texts: list[str]) -> None:
    lines = "".join(json.dumps({field: text, "number": i}) + "\n" for i, text in enumerate(texts)).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


def write_parquet(path: Path, field: str, texts: list[str]) -> None:
    table = pa.table({"number": range(len(texts)), field: texts})
    pq.write_table(table, path, row_group_size=7)


@pytest.fixture(params=["jsonl", "parquet"])
def corpus(request, tmp_path):
    """The name of a kind of source, its config, and a folder that has two files of it."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    if request.param == "jsonl":
        write_jsonl(folder / "a.jsonl", "body", TEXTS[:50])
        write_jsonl(folder / "b.jsonl.gz", "body", TEXTS[50:])
        return "jsonl", Jsonl(path=folder, field="body")
    write_parquet(folder / "a.parquet", "body", TEXTS[:50])
    write_parquet(folder / "b.parquet", "body", TEXTS[50:])
    return "parquet", Parquet(path=folder, column="body")


def test_records_become_the_same_documents(corpus, tmp_path):
    """Same identities, same texts, same order; and so the same split, which the tokenizer that is trained keeps to."""
    kind, source = corpus
    output = tmp_path / "tokens"
    done = run(f"--source={kind}", f"--path={source.path}", "--field=body", "--vocab_size=300", f"--output={output}")
    assert done.returncode == 0, done.stderr
    size = sum(len(text.encode()) for text in TEXTS)
    assert re.fullmatch(
        rf"{output}: 60 documents, [\d,]+ tokens, {size:,} bytes in [\d.]+ s; tokenizer \w{{12}}\n", done.stdout
    )
    written = ArrayRecord(path=output)
    assert documents(written) == documents(source)
    assert [document.text for document in documents(written)] == TEXTS
    from_tokens, from_text = DataConfig(sources=(written,)), DataConfig(sources=(source,))
    assert heldout_documents(from_tokens) == heldout_documents(from_text)
    expected = train_tokenizer([document.text for document in train_documents(from_text)], vocab_size=300)
    assert Tokenizer.load(output).fingerprint() == expected.fingerprint()


def test_documents_in_several_shards_are_the_same(corpus, tmp_path):
    """With a tokenizer that is given, and broken records left out."""
    kind, source = corpus
    texts = [*TEXTS[:20], None, *TEXTS[20:40]]
    (write_jsonl if kind == "jsonl" else write_parquet)(Path(source.path) / f"c.{kind}", "body", texts)
    train_tokenizer(TEXTS, vocab_size=290).save(tmp_path / "tokenizer.json")
    common = (f"--source={kind}", f"--path={source.path}/c.{kind}", "--field=body", "--shards=3")
    arguments = (*common, f"--tokenizer={tmp_path / 'tokenizer.json'}", f"--output={tmp_path / 'tokens'}")
    failed = run(*arguments)
    assert failed.returncode == 1
    place = "c.jsonl:21: " if kind == "jsonl" else "c.parquet: row 20 "
    (line,) = failed.stderr.splitlines()
    assert line.startswith(f"tokenize_corpus: {source.path}/{place}")
    assert line.endswith("; on_error=skip leaves such documents out")
    assert not (tmp_path / "tokens").exists()
    done = run(*arguments, "--on_error=skip")
    assert done.returncode == 0, done.stderr
    found = documents(ArrayRecord(path=tmp_path / "tokens"))
    skipping = type(source)(path=f"{source.path}/c.{kind}", on_error="skip", **field(kind))
    key = lambda document: document.id  # noqa: E731
    assert sorted(found, key=key) == sorted(documents(skipping), key=key)
    assert sorted(document.text for document in found) == sorted(TEXTS[:40])
    shards = json.loads((tmp_path / "tokens" / "metadata.json").read_text())["shards"]
    assert [shard["documents"] for shard in shards] == [14, 13, 13]


def field(kind: str) -> dict[str, str]:
    return {"field": "body"} if kind == "jsonl" else {"column": "body"}


SMALL_LIBRARY = """
import runpy, sysconfig
get_paths = sysconfig.get_paths
sysconfig.get_paths = lambda *options: {**get_paths(*options), "stdlib": FOLDER}
runpy.run_module("tools.tokenize_corpus", run_name="__main__")
"""


def test_the_standard_library_becomes_the_same_documents(tmp_path, monkeypatch):
    """A small one in the place of the interpreter's, whose twelve megabytes would take long."""
    folder, output = tmp_path / "lib", tmp_path / "tokens"
    for i, text in enumerate(TEXTS):
        file = folder / f"package{i % 5}" / f"module{i}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode())
    for name in ("test/test_module.py", "site-packages/installed.py", "package0/notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("no part of the library")
    command = [sys.executable, "-c", SMALL_LIBRARY.replace("FOLDER", repr(str(folder)))]
    arguments = ("--source=stdlib", "--vocab_size=300", f"--output={output}")
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(folder)})
    found = documents(ArrayRecord(path=output))
    assert found == documents(StandardLibrary())
    assert {document.id: document.text for document in found} == {
        f"package{i % 5}/module{i}.py": text for i, text in enumerate(TEXTS)
    }


def test_a_source_without_its_path_is_one_line(tmp_path):
    done = run("--source=parquet", f"--output={tmp_path / 'tokens'}")
    assert done.returncode == 1
    assert done.stderr == "tokenize_corpus: data.sources: a Parquet needs a path\n"
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize(
    ("kind", "flag"),
    [
        ("stdlib", "path"),
        ("stdlib", "glob"),
        ("stdlib", "field"),
        ("jsonl", "glob"),
        ("parquet", "glob"),
        ("text", "field"),
    ],
)
def test_a_flag_that_the_source_does_not_read_is_refused_in_one_line(tmp_path, kind, flag):
    """Before anything is read or written; each flag is given a value that would do elsewhere."""
    values = {"path": tmp_path, "glob": "**/*.py", "field": "body"}
    done = run(f"--source={kind}", f"--{flag}={values[flag]}", f"--output={tmp_path / 'tokens'}")
    assert done.returncode == 1
    assert done.stderr == (
        f"tokenize_corpus: --{flag} has no use with --source={kind}; leave it out, or name another --source\n"
    )
    assert not (tmp_path / "tokens").exists()
