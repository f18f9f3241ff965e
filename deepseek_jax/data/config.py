"""What a run reads: sources, held-out split, packing and tokenizer, as frozen dataclasses that validate themselves."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, ClassVar, Literal

from deepseek_jax.config import ConfigError, require

OnError = Literal["raise", "skip"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A corpus of documents. Not used itself: see the subclasses."""

    weight: float = 1.0
    """Share of the training text (bytes, not documents) that comes from this source, relative to the other weights."""

    has_path: ClassVar[bool] = True

    def __post_init__(self):
        name = type(self).__name__
        require(self.weight > 0, f"data.sources: the weight of a {name} must be positive, not {self.weight}")
        if self.has_path:
            source: Any = self  # the subclass declares the path
            path = os.fspath(source.path)  # an epath.Path is welcome; the string hashes, prints and compares
            require(bool(path), f"data.sources: a {name} needs a path")
            object.__setattr__(self, "path", path)

    def _check_on_error(self, on_error: OnError) -> None:
        require(
            on_error in ("raise", "skip"),
            f"data.sources: on_error of a {type(self).__name__} must be raise or skip, not {on_error!r}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFiles(Source):
    """A folder of text or code files, one document per file. Documents are identified by their relative path.

    Every file is read once when the source is opened, so that invalid UTF-8 is found before training. That takes time
    in proportion to the folder's size: tokenize a very large one once, with `tools/tokenize_corpus.py`.
    """

    path: str
    glob: str = "**/*"
    """Which files of the folder to read. Hidden files and folders are passed over, and so are empty files."""
    on_error: OnError = "raise"
    """What to do with a file that is not valid UTF-8: stop, or leave it out and say how many."""

    def __post_init__(self):
        super().__post_init__()
        self._check_on_error(self.on_error)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Jsonl(Source):
    """JSON Lines, one document per line: a file, a folder or a glob of `.jsonl`, `.jsonl.gz`, `.jsonl.zst` files.

    Plain files are indexed by line offset; the texts of compressed ones are held in memory, since they cannot be read
    from the middle. Tokenize a large compressed corpus once, with `tools/tokenize_corpus.py`.
    """

    path: str
    field: str = "text"
    on_error: OnError = "raise"
    """What to do with a line that is not JSON or has no text in `field`: stop, or leave it out and say how many."""

    def __post_init__(self):
        super().__post_init__()
        self._check_on_error(self.on_error)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parquet(Source):
    """Parquet files, one document per row: a file, a folder or a glob. The text column is held in memory."""

    path: str
    column: str = "text"
    on_error: OnError = "raise"
    """What to do with a null row: stop, or leave it out and say how many."""

    def __post_init__(self):
        super().__post_init__()
        self._check_on_error(self.on_error)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayRecord(Source):
    """A folder written by `tools/tokenize_corpus.py`: tokens, read in any order without loading the corpus."""

    path: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandardLibrary(Source):
    """The running interpreter's own `.py` files, without tests and installed packages: about 12 MB, no download."""

    has_path: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Documents in, rows of tokens out (section 4.1 of the technical report)."""

    sources: tuple[Source, ...] = (StandardLibrary(),)
    sequence_length: int = 4096
    """Tokens the model sees at once, S. A row holds S + 1, because labels are the tokens shifted by one."""
    fim_rate: float = 0.1
    """Share of documents rearranged for fill-in-the-middle, before packing."""
    split_combined_rate: float = 0.1
    """Share of the tokens "punctuation with newlines" that training splits at random, against the token boundary bias.

    The report says "a certain proportion" and not which.
    """
    add_bos: bool = True
    """Start each document with the beginning-of-sentence token, so that its first real token has a context too."""
    heldout_fraction: float = 0.05
    """Share of each source's documents that is kept for evaluation, chosen by a hash of their identity."""
    heldout_min_documents: int = 40
    """At least so many held-out documents of each source. With `heldout_fraction=0` too, 0 holds out nothing."""
    epochs: int | None = None
    """Passes over the training documents of a single source; None repeats for as long as the trainer asks."""
    virtual_shards: int = 8
    """Streams that rows are dealt from, fixed for a run and saved with it; the number of hosts must divide it.

    Each stream packs its own share of every epoch's documents, so few documents want few shards.
    """
    cache_mb: int = 512
    """Memory for documents that are tokenized already, in MB per process. 0 tokenizes again in each epoch."""
    read_threads: int = 0
    """Threads that read and tokenize ahead, per virtual shard; for sources that answer slowly, like cloud storage."""

    def __post_init__(self):
        require(len(self.sources) > 0, "data.sources is empty: name at least one source")
        for source in self.sources:
            require(
                isinstance(source, Source) and type(source) is not Source,
                f"data.sources holds {source!r}; use TextFiles, Jsonl, Parquet, ArrayRecord or StandardLibrary",
            )
        for name in ("sequence_length", "virtual_shards"):
            value = getattr(self, name)
            require(value > 0, f"data.{name} must be positive, not {value}")
        for name in ("heldout_min_documents", "cache_mb", "read_threads"):
            value = getattr(self, name)
            require(value >= 0, f"data.{name} cannot be negative: {value}")
        for name in ("fim_rate", "split_combined_rate"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"data.{name} is a share and must lie between 0 and 1, not {value}")
        require(
            0 <= self.heldout_fraction < 1,
            f"data.heldout_fraction must be at least 0 and below 1, not {self.heldout_fraction}",
        )
        require(self.epochs is None or self.epochs > 0, f"data.epochs must be positive or none, not {self.epochs}")
        require(
            self.epochs is None or len(self.sources) == 1,
            f"data.epochs={self.epochs} has no meaning for a weighted mixture of {len(self.sources)} sources, "
            "which pass at different speeds; set data.epochs=none and end the run by tokens",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Where the tokenizer comes from: a Hugging Face `tokenizer.json`, or trained on the run's training documents."""

    path: str | None = None
    """A `tokenizer.json` to use; None trains a byte-level BPE."""
    vocab_size: int = 4096
    """Tokens of a trained one, special tokens included. DeepSeek-V3's has 128K."""
    train_bytes: int = 100_000_000
    """Text to train on, at most: documents in the order of their hash until it is reached."""

    def __post_init__(self):
        if self.path is not None:
            object.__setattr__(self, "path", os.fspath(self.path))
        smallest = 256 + NUM_SPECIAL_TOKENS
        require(
            self.path is not None or self.vocab_size >= smallest,
            f"tokenizer.vocab_size must be at least {smallest} (256 bytes and {NUM_SPECIAL_TOKENS} special tokens), "
            f"not {self.vocab_size}",
        )
        require(self.train_bytes > 0, f"tokenizer.train_bytes must be positive, not {self.train_bytes}")


NUM_SPECIAL_TOKENS = 16
"""Ids that a trained tokenizer sets aside: the named special tokens and a few placeholders for later stages."""

__all__ = [
    "ArrayRecord",
    "ConfigError",
    "DataConfig",
    "Jsonl",
    "Parquet",
    "Source",
    "StandardLibrary",
    "TextFiles",
    "TokenizerConfig",
]
