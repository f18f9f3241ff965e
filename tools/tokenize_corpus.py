"""Tokenizes a corpus once, into ArrayRecord shards that training reads in any order.

    python -m tools.tokenize_corpus --source=jsonl --path=corpus/ --tokenizer=tokenizer.json --output=tokens/

The folder appears under its name only when it is whole, and an existing one is never overwritten. Train on it with
`ArrayRecord(path="tokens/")` and `tokenizer.path=tokens/tokenizer.json`; the held-out split, fill-in-the-middle and all
else come out as if the text were read itself.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterable, Iterator

from absl import app, flags

from deepseek_jax.config import ConfigError, require
from deepseek_jax.data import DataConfig, DataError, Jsonl, Parquet, Source, StandardLibrary, TextFiles, TokenizerConfig
from deepseek_jax.data.array_record import CorpusWriter
from deepseek_jax.data.corpus import make_tokenizer
from deepseek_jax.data.documents import Document
from deepseek_jax.data.sources import stream_documents

_SOURCE = flags.DEFINE_enum("source", "text", ["text", "jsonl", "parquet", "stdlib"], "What kind of corpus it is.")
_PATH = flags.DEFINE_string("path", "", "The corpus: a folder; for jsonl and parquet also a file or a glob.")
_GLOB = flags.DEFINE_string("glob", "**/*", "text: which files of the folder.")
_FIELD = flags.DEFINE_string("field", "text", "jsonl, parquet: the field or column that holds the text.")
_ON_ERROR = flags.DEFINE_enum("on_error", "raise", ["raise", "skip"], "What to do with broken records or text files.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "A tokenizer.json; without it one is trained on the corpus.")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 4096, "Size of a tokenizer that is trained.")
_OUTPUT = flags.DEFINE_string("output", None, "The folder to write; it must not exist.", required=True)
_SHARDS = flags.DEFINE_integer("shards", 1, "Files to deal the documents out to.")

_USED = {
    "text": ("path", "glob", "on_error"),
    "jsonl": ("path", "field", "on_error"),
    "parquet": ("path", "field", "on_error"),
    "stdlib": (),
}
"""By kind of source: the flags that say what is read."""

_BATCH = 256  # documents tokenized at once, on all cores


def tokenize_corpus(source: Source, tokenizer_config: TokenizerConfig, output: str, *, shards: int = 1) -> dict:
    """Writes the tokens of `source` to the folder `output` and returns its metadata.

    A tokenizer that is trained sees the training documents of the default split only. Raises `DataError` if the source
    or the tokenizer cannot be used, or `output` exists.
    """
    tokenizer = make_tokenizer(tokenizer_config, DataConfig(sources=(source,)))
    with CorpusWriter(output, tokenizer, shards=shards) as writer:
        for batch in _batches(stream_documents(source), _BATCH):
            writer.write(batch)
    return writer.metadata


def _batches(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    documents = iter(documents)
    while batch := list(itertools.islice(documents, size)):
        yield batch


def _source() -> Source:
    for flag in (_PATH, _GLOB, _FIELD, _ON_ERROR):
        require(
            flag.name in _USED[_SOURCE.value] or not flag.present,
            f"--{flag.name} has no use with --source={_SOURCE.value}; leave it out, or name another --source",
        )
    match _SOURCE.value:
        case "text":
            return TextFiles(path=_PATH.value, glob=_GLOB.value, on_error=_ON_ERROR.value)
        case "jsonl":
            return Jsonl(path=_PATH.value, field=_FIELD.value, on_error=_ON_ERROR.value)
        case "parquet":
            return Parquet(path=_PATH.value, column=_FIELD.value, on_error=_ON_ERROR.value)
        case _:
            return StandardLibrary()


def main(argv: list[str]) -> None:
    """Runs the tool; a corpus that cannot be used ends it with one line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    start = time.monotonic()
    try:
        config = TokenizerConfig(path=_TOKENIZER.value, vocab_size=_VOCAB_SIZE.value)
        metadata = tokenize_corpus(_source(), config, _OUTPUT.value, shards=_SHARDS.value)
    except (DataError, ConfigError) as error:
        sys.exit(f"tokenize_corpus: {error}")
    seconds = time.monotonic() - start
    print(
        f"{_OUTPUT.value}: {metadata['documents']:,} documents, {metadata['tokens']:,} tokens, "
        f"{metadata['bytes']:,} bytes in {seconds:.1f} s; tokenizer {metadata['tokenizer_fingerprint'][:12]}"
    )


if __name__ == "__main__":
    app.run(main)
