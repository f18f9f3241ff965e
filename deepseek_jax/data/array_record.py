"""Tokenized corpora: ArrayRecord shards with their tokenizer and counts beside them.

A folder holds `metadata.json`, `tokenizer.json`, `digests.npy` (uint64, one per document, in shard order) and the
shards. A record is the document's id and its tokens, without special tokens: fill-in-the-middle, the held-out split and
the splitting of combined tokens stay decisions of the run.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterable

import numpy as np
from etils import epath

from deepseek_jax.data.config import ArrayRecord
from deepseek_jax.data.documents import Document, Documents, digest, id_bytes
from deepseek_jax.data.errors import DataError
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.paths import local_path, new_folder

_HEADER = struct.Struct("<IB")  # bytes of the id, bytes per token
_FORMAT = 1


def pack_record(document_id: str, tokens: np.ndarray) -> bytes:
    """One record: header, id in UTF-8, tokens in 2 or 4 bytes each, little-endian."""
    name = id_bytes(document_id)
    width = 2 if tokens.size == 0 or tokens.max() < 1 << 16 else 4
    return _HEADER.pack(len(name), width) + name + tokens.astype(f"<u{width}").tobytes()


def unpack_record(record: bytes) -> tuple[str, np.ndarray]:
    """`(document id, tokens int32 [n])` of a record."""
    length, width = _HEADER.unpack_from(record)
    start = _HEADER.size + length
    name = record[_HEADER.size : start].decode("utf-8", "surrogateescape")
    return name, np.frombuffer(record, f"<u{width}", offset=start).astype(np.int32)


class CorpusWriter:
    """Writes a tokenized corpus into a folder that appears under its name only when it is whole.

    Use as a context manager; leaving it with an error leaves nothing behind under the final name.
    """

    def __init__(self, path: str, tokenizer: Tokenizer, *, shards: int = 1):
        self._path = local_path(path, "a tokenized corpus")
        if self._path.exists():
            raise DataError(f"{path}: exists already, and a corpus is never overwritten; choose another folder")
        if shards < 1:
            raise DataError(f"a corpus needs at least one shard, not {shards}")
        self._tokenizer = tokenizer
        self._names = [f"tokens-{i:05d}-of-{shards:05d}.array_record" for i in range(shards)]
        self._digests: list[list[int]] = [[] for _ in range(shards)]
        self._count = self._tokens = self._bytes = 0

    def __enter__(self) -> CorpusWriter:
        from array_record.python import array_record_module

        with contextlib.ExitStack() as stack:
            self._work = stack.enter_context(new_folder(self._path, "the tokenized corpus"))
            self._writers = [
                array_record_module.ArrayRecordWriter(str(self._work / name), "group_size:1") for name in self._names
            ]
            stack.push(self._finish)
            self._exit = stack.pop_all()
        return self

    def write(self, documents: Iterable[Document]) -> None:
        """Tokenizes a batch of documents and deals them out to the shards."""
        documents = list(documents)
        encoded = self._tokenizer.encode_batch([document.text for document in documents])
        for document, tokens in zip(documents, encoded, strict=True):
            shard = self._count % len(self._writers)
            self._writers[shard].write(pack_record(document.id, tokens))
            self._digests[shard].append(digest(document.id))
            self._count += 1
            self._tokens += len(tokens)
            self._bytes += len(document.text.encode())

    @property
    def metadata(self) -> dict:
        """What `metadata.json` says."""
        return {
            "format": _FORMAT,
            "documents": self._count,
            "tokens": self._tokens,
            "bytes": self._bytes,
            "tokenizer_fingerprint": self._tokenizer.fingerprint(),
            "shards": [
                {"file": name, "documents": len(digests)}
                for name, digests in zip(self._names, self._digests, strict=True)
            ],
        }

    def __exit__(self, kind, error, traceback) -> None:
        self._exit.__exit__(kind, error, traceback)

    def _finish(self, kind, error, traceback) -> None:
        """Completes the folder before it is moved to its place; what is raised here removes it."""
        for writer in self._writers:
            writer.close()
        if kind is not None:
            return
        if self._count == 0:
            raise DataError("there is no document to write")
        np.save(self._work / "digests.npy", np.array([d for part in self._digests for d in part], np.uint64))
        self._tokenizer.save(self._work / "tokenizer.json")
        (self._work / "metadata.json").write_text(json.dumps(self.metadata, indent=2) + "\n")


def open_array_record(source: ArrayRecord) -> Documents:
    """The corpus in `source.path`. Raises `DataError` if it is missing, incomplete or damaged."""
    return _TokenizedDocuments(source)


class _TokenizedDocuments(Documents):
    def __init__(self, source: ArrayRecord):
        from array_record.python import array_record_data_source

        self.name = source.path
        folder = local_path(source.path, "a tokenized corpus")
        self._metadata = _read_metadata(folder)
        self.total_bytes = self._metadata["bytes"]
        self._tokenizer_path = folder / "tokenizer.json"
        self._tokenizer: Tokenizer | None = None
        shards = [shard for shard in self._metadata["shards"] if shard["documents"]]
        try:
            self.digests = np.load(folder / "digests.npy")
            self._records = array_record_data_source.ArrayRecordDataSource([str(folder / s["file"]) for s in shards])
            count = len(self._records)
        except (OSError, EOFError, ValueError, RuntimeError) as error:  # an EOFError is of an empty digests.npy
            raise _damaged(source.path, error) from None
        if not count == len(self.digests) == self._metadata["documents"]:
            raise _damaged(source.path, f"{count} records where metadata.json says {self._metadata['documents']}")

    def _record(self, index: int) -> tuple[str, np.ndarray]:
        try:
            return unpack_record(self._records[index])
        except (RuntimeError, ValueError, struct.error) as error:
            raise _damaged(self.name, error) from None

    def __getitem__(self, index: int) -> Document:
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.load(self._tokenizer_path)
        name, tokens = self._record(index)
        return Document(name, self._tokenizer.decode(tokens))

    def tokens(self, index: int, tokenizer: Tokenizer) -> np.ndarray:
        return self._record(index)[1]

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        written, used = self._metadata["tokenizer_fingerprint"], tokenizer.fingerprint()
        if written != used:
            raise DataError(
                f"{self.name}: was tokenized with tokenizer {written[:12]}, and the run uses {used[:12]}; "
                f"set tokenizer.path={self._tokenizer_path}, or tokenize the corpus again"
            )


def _read_metadata(folder: epath.Path) -> dict:
    path = folder / "metadata.json"
    if not path.exists():
        raise DataError(f"{folder}: no tokenized corpus there (metadata.json is missing); see tools/tokenize_corpus.py")
    try:
        metadata = json.loads(path.read_text())
    except ValueError as error:
        raise _damaged(folder, error) from None
    if metadata.get("format") != _FORMAT:
        raise DataError(f"{path}: format {metadata.get('format')}, and this version reads format {_FORMAT}")
    return metadata


def _damaged(path, reason) -> DataError:
    return DataError(f"{path}: the tokenized corpus is damaged or cut short ({str(reason).strip()}); make it again")
