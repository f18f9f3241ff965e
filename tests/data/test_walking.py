"""Which files of a folder are read: links to folders, names that are no UTF-8, folders that cannot be read."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from deepseek_jax.data import ArrayRecord, DataConfig, DataError, TextFiles, load_corpus
from deepseek_jax.data.array_record import CorpusWriter, pack_record, unpack_record
from deepseek_jax.data.documents import SkipCounter, digest, list_files
from deepseek_jax.data.sources import open_documents, stream_documents

NO_UTF8 = os.fsdecode(b"caf\xe9.txt")


def write(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"the text of {name}".encode("utf-8", "replace"))


def names(folder: Path, pattern: str = "**/*") -> list[str]:
    found = list_files(str(folder), (pattern,), SkipCounter("raise"))
    assert all(path.read_bytes() for _, path in found)
    return [name for name, _ in found]


def test_links_to_folders_are_followed(tmp_path):
    write(tmp_path / "elsewhere", "x.txt", "deep/y.txt", ".git/z.txt")
    write(tmp_path / "corpus", "a.txt", "sub/b.txt")
    (tmp_path / "corpus" / "sub" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / ".hidden").symlink_to(tmp_path / "elsewhere")
    expected = ["a.txt", "sub/b.txt", "sub/link/deep/y.txt", "sub/link/x.txt"]
    assert names(tmp_path / "corpus") == expected
    (tmp_path / "to_all").symlink_to("corpus")
    assert names(tmp_path / "to_all") == expected
    assert names(tmp_path / "corpus", "sub/link/*") == ["sub/link/x.txt"]


def test_a_folder_with_several_names_is_read_once_and_keeps_its_own(tmp_path):
    """Its texts twice would be held out under one name and trained on under the other."""
    write(tmp_path, "real/x.txt", "z/real/y.txt")
    for link, target in {"a": "real", "real/up": "..", "real/self": ".", "b/c": "../z/real"}.items():
        (tmp_path / link).parent.mkdir(exist_ok=True)
        (tmp_path / link).symlink_to(target)
    assert names(tmp_path) == ["real/x.txt", "z/real/y.txt"]


def test_a_link_to_nothing_is_told(tmp_path):
    write(tmp_path, "a.txt")
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"gone: cannot be read \(No such file or directory\); on_error=skip"):
        open_documents(TextFiles(path=tmp_path))


def test_a_folder_that_cannot_be_read_is_named_or_counted(tmp_path, monkeypatch, caplog):
    write(tmp_path, "a.txt", "closed/b.txt")
    scandir = os.scandir

    def guarded(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", path)  # root may read everything
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(DataError, match=rf"^{tmp_path}/closed: cannot be read \(Permission denied\); on_error=skip"):
        open_documents(TextFiles(path=tmp_path))
    skipping = TextFiles(path=tmp_path, on_error="skip")
    assert [document.id for document in stream_documents(skipping)] == ["a.txt"]
    assert "left out 1 broken documents, the first: " in caplog.text


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such names")
def test_names_that_are_no_utf8_name_documents_too(tmp_path, tokenizer):
    """Of all names the bytes decide, so that a UTF-8 name keeps the digest that it had."""
    write(tmp_path / "corpus", *(f"{i}.txt" for i in range(5)), NO_UTF8)
    source = TextFiles(path=tmp_path / "corpus")
    corpus = load_corpus(DataConfig(sources=(source,), heldout_min_documents=5))
    assert len(corpus[0].heldout) == 5
    documents = list(stream_documents(source))
    assert [d.id for d in documents][-1] == NO_UTF8
    with CorpusWriter(str(tmp_path / "tokens"), tokenizer) as writer:
        writer.write(documents)
    tokenized = open_documents(ArrayRecord(path=tmp_path / "tokens"))
    assert [tokenized[i] for i in range(len(tokenized))] == documents
    np.testing.assert_array_equal(tokenized.digests, open_documents(source).digests)
    assert digest("größe/a.py") == 0x523B7E049215BFE7
    assert unpack_record(pack_record(NO_UTF8, np.array([1])))[0] == NO_UTF8


def test_an_empty_list_of_digests_is_a_damaged_corpus(tmp_path, tokenizer):
    write(tmp_path / "corpus", "a.txt", "b.txt")
    with CorpusWriter(str(tmp_path / "tokens"), tokenizer) as writer:
        writer.write(stream_documents(TextFiles(path=tmp_path / "corpus")))
    (tmp_path / "tokens" / "digests.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"tokens: the tokenized corpus is damaged or cut short \(.*\); make it again$"):
        open_documents(ArrayRecord(path=tmp_path / "tokens"))
