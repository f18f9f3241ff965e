"""One loader that opens the sources and decides the held-out split, once, for everyone.

Tokenizer training, training rows and evaluation all come here, so they cannot disagree, and no held-out text reaches
the first two. The split is made per source: adding a source to a mixture moves no document of the others.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator

import numpy as np

from deepseek_jax.data.config import DataConfig, Source, TokenizerConfig
from deepseek_jax.data.documents import Document, Documents
from deepseek_jax.data.sources import open_documents
from deepseek_jax.data.split import heldout_mask
from deepseek_jax.data.tokenizer import Tokenizer, train_tokenizer


@dataclasses.dataclass(frozen=True)
class SplitSource:
    """A source's documents, and which of them are for what."""

    weight: float
    documents: Documents
    train: np.ndarray
    """int64 `[N]`: indices of the training documents, ordered by digest: the same for any order of files."""
    heldout: np.ndarray
    """int64 `[M]`: indices of the held-out documents."""

    def identity(self) -> str:
        """A hash of which documents are trained on."""
        return hashlib.blake2b(self.documents.digests[self.train].tobytes(), digest_size=8).hexdigest()


def load_corpus(config: DataConfig) -> tuple[SplitSource, ...]:
    """Opens and splits every source of `config`; the second call with the same sources costs nothing, and sees no
    change of their files before `forget_corpora`.

    Raises `DataError` if a source is missing, empty or broken, or too small for the held-out split.
    """
    return _load(config.sources, config.heldout_fraction, config.heldout_min_documents)


def forget_corpora() -> None:
    """Makes the next `load_corpus` look at the files anew: for another run in a process that lives on, a notebook's."""
    _load.cache_clear()


def heldout_documents(config: DataConfig) -> list[Document]:
    """All held-out documents of all sources, sorted by id. Their text is never trained on, tokenizer included."""
    documents = [source.documents[int(i)] for source in load_corpus(config) for i in source.heldout]
    return sorted(documents, key=lambda document: document.id)


def train_documents(config: DataConfig) -> Iterator[Document]:
    """The training documents, source by source, in the order of their digests."""
    for source in load_corpus(config):
        yield from (source.documents[int(i)] for i in source.train)


def make_tokenizer(config: TokenizerConfig, data: DataConfig) -> Tokenizer:
    """The tokenizer that `config` names, or one trained on the training documents of `data`."""
    if config.path is not None:
        return Tokenizer.load(config.path)
    return train_tokenizer(_tokenizer_texts(config, data), vocab_size=config.vocab_size)


def _tokenizer_texts(config: TokenizerConfig, data: DataConfig) -> Iterator[str]:
    """Training texts up to the cap, each source with its share of it."""
    sources = load_corpus(data)
    total_weight = sum(source.weight for source in sources)
    for source in sources:
        left = config.train_bytes * source.weight / total_weight
        for i in source.train:
            text = source.documents[int(i)].text
            yield text
            left -= len(text.encode())
            if left <= 0:
                break


@functools.lru_cache(maxsize=8)
def _load(sources: tuple[Source, ...], fraction: float, minimum: int) -> tuple[SplitSource, ...]:
    return tuple(_split(source, fraction, minimum) for source in sources)


def _split(source: Source, fraction: float, minimum: int) -> SplitSource:
    documents = open_documents(source)
    digests = documents.digests
    heldout = heldout_mask(digests, fraction, minimum, documents.name)
    order = np.argsort(digests, kind="stable")
    return SplitSource(source.weight, documents, order[~heldout[order]], order[heldout[order]])
