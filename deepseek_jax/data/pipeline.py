"""Training rows: documents → shuffled epochs → mixture → tokens → fill-in-the-middle → virtual shards → packed rows.

Everything random is decided by (seed, epoch, document), never by who computes it. Row r of the run comes from virtual
shard `r mod V`, and host h of H serves the shards with `shard mod H = h`: so the rows of a step are the same on any
number of hosts, and the state of a run is a row number and the state of each shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import grain
import numpy as np

from deepseek_jax.config import require
from deepseek_jax.data.boundary import CombinedTokens
from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.corpus import SplitSource, load_corpus
from deepseek_jax.data.errors import DataError
from deepseek_jax.data.fim import check_fim, rearrange
from deepseek_jax.data.packing import pack
from deepseek_jax.data.rows import RowIterator
from deepseek_jax.data.tokenizer import Tokenizer


def train_rows(
    config: DataConfig, tokenizer: Tokenizer, *, seed: int, host_index: int = 0, host_count: int = 1
) -> RowIterator:
    """The training rows of this host; `RowIterator` says how they are asked for.

    Args:
        config: the sources and how to pack them.
        tokenizer: the run's tokenizer.
        seed: decides the order of documents, fill-in-the-middle and the splitting of combined tokens.
        host_index: this process, from 0.
        host_count: processes that share the run; it must divide `config.virtual_shards`.

    Raises:
        ConfigError: hosts and virtual shards do not fit.
        DataError: a source or the tokenizer cannot be used.
    """
    require(0 <= host_index < host_count, f"host_index must be from 0 to {host_count - 1}, not {host_index}")
    require(
        config.virtual_shards % host_count == 0,
        f"data.virtual_shards ({config.virtual_shards}) must be a multiple of the number of hosts ({host_count})",
    )
    corpus = load_corpus(config)
    if config.fim_rate:
        check_fim(tokenizer)
    if config.add_bos:
        tokenizer.require_specials("bos", reason="set data.add_bos=false to go without")
    for source in corpus:
        source.documents.check_tokenizer(tokenizer)
    row_length = config.sequence_length + 1
    stream = _token_stream(config, corpus, tokenizer, seed)
    reading = grain.ReadOptions(num_threads=config.read_threads, prefetch_buffer_size=8 * config.read_threads)
    shards = {
        shard: iter(pack(_deal(stream, shard, config.virtual_shards, seed).to_iter_dataset(reading), row_length))
        for shard in range(host_index, config.virtual_shards, host_count)
    }
    return _CheckedRows(
        shards,
        epochs=config.epochs,
        row_length=row_length,
        virtual_shards=config.virtual_shards,
        pad_id=tokenizer.pad_id,
        host_index=host_index,
        host_count=host_count,
        identity=_identity(config, corpus, tokenizer, seed),
    )


class _CheckedRows(RowIterator):
    """Refuses a state that lies beyond the last epoch, and takes those of older versions, which tell no sizes."""

    def __init__(self, shards: Mapping[int, grain.DatasetIterator], *, epochs: int | None, **settings: Any):
        super().__init__(shards, **settings)
        self._epochs = epochs

    def set_state(self, state: Mapping[str, Any]) -> None:
        if "identity" in state:
            state = {**state, "identity": {_SIZES: self._identity[_SIZES], **state["identity"]}}
        try:
            super().set_state(state)
        except DataError:
            raise
        except (IndexError, ValueError, StopIteration) as error:  # which of them depends on where Grain finds the end
            if self._epochs is None:
                raise
            raise DataError(
                f"the run has read beyond data.epochs={self._epochs} already, by row {state['row']}; "
                "set data.epochs higher, or none"
            ) from error


def _token_stream(
    config: DataConfig, corpus: tuple[SplitSource, ...], tokenizer: Tokenizer, seed: int
) -> grain.MapDataset:
    """All documents of the run in order, as `{"tokens": int32 [n]}`; computed when asked for, in any order."""
    combined = CombinedTokens(tokenizer) if config.split_combined_rate else None
    cache_share = config.cache_mb * 2**20 // len(corpus)
    streams, shares = [], []
    for number, source in enumerate(corpus):
        encode = DocumentEncoder(config, source, tokenizer, combined, seed=seed, cache_bytes=cache_share)
        order = grain.MapDataset.source(source.train).shuffle(seed=_hash_int(seed, number, bits=32))
        streams.append(order.repeat(config.epochs).map_with_index(encode))
        # The mixture picks documents, and weights speak of text: long documents are picked less often.
        shares.append(source.weight * len(source.documents) / source.documents.total_bytes)
    if len(streams) == 1:
        return streams[0]
    return grain.MapDataset.mix(streams, weights=[share / sum(shares) for share in shares])


def _deal(stream: grain.MapDataset, shard: int, shards: int, seed: int) -> grain.MapDataset:
    """One virtual shard's part of the stream: one document of every `shards` in a row, in a place that varies.

    A fixed place would resonate with the regular pattern of a mixture: with two sources of equal weight and an even
    number of shards, each shard would see one source only.
    """

    def pick(turn: int) -> dict[str, np.ndarray] | None:
        place = (shard + _hash_int(seed, turn, bits=32)) % shards
        position = turn * shards + place
        return stream[position] if position < len(stream) else None  # Grain passes over None

    return grain.MapDataset.range(-(-len(stream) // shards)).map(pick)


class DocumentEncoder:
    """Tokens of one training document in one epoch, with its special tokens: `(position, document) -> {"tokens"}`."""

    def __init__(
        self,
        config: DataConfig,
        source: SplitSource,
        tokenizer: Tokenizer,
        combined: CombinedTokens | None,
        *,
        seed: int,
        cache_bytes: int,
    ):
        self._config = config
        self._source = source
        self._tokenizer = tokenizer
        self._combined = combined
        self._seed = seed
        self._tokens = _Cache(lambda index: source.documents.tokens(index, tokenizer), cache_bytes)
        self._begin = np.array([tokenizer.bos_id] if config.add_bos else [], np.int32)
        self._end = np.array([tokenizer.eos_id], np.int32)

    def __call__(self, position: int, index: np.integer) -> dict[str, np.ndarray]:
        """`position` in the run's endless order tells the epoch; `index` is the document's in its source."""
        number = int(index)
        epoch = position // len(self._source.train)
        identity = int(self._source.documents.digests[number])
        rng = np.random.Generator(np.random.PCG64(_hash_int(self._seed, epoch, identity, bits=128)))
        if rng.random() < self._config.fim_rate:
            tokens = rearrange(self._source.documents[number].text, self._tokenizer, rng)
        else:
            tokens = self._tokens(number)
        if self._combined is not None:
            tokens = self._combined.split(tokens, self._config.split_combined_rate, rng)
        return {"tokens": np.concatenate([self._begin, tokens, self._end])}


class _Cache:
    """Keeps what `compute` returned until `limit` bytes are full; then computes the others each time."""

    def __init__(self, compute: Callable[[int], np.ndarray], limit: int):
        self._compute = compute
        self._left = limit
        self._kept: dict[int, np.ndarray] = {}

    def __call__(self, key: int) -> np.ndarray:
        found = self._kept.get(key)
        if found is None:
            found = self._compute(key)
            if found.nbytes <= self._left:
                self._kept[key] = found
                self._left -= found.nbytes
        return found


def _hash_int(*parts: int, bits: int) -> int:
    """Mixes seeds: nearby ones must not share epochs, and Grain's epoch seeds are consecutive numbers."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=bits // 8).digest(), "big")


_SIZES = "the bytes of data.sources"
"""In `_identity`: an edited file keeps its name."""


def _identity(config: DataConfig, corpus: tuple[SplitSource, ...], tokenizer: Tokenizer, seed: int) -> dict:
    """What must not change between saving a run's place in its data and going on from there."""
    fields = ("sequence_length", "fim_rate", "split_combined_rate", "add_bos", "virtual_shards")
    return {
        **{f"data.{name}": getattr(config, name) for name in fields},
        "seed": seed,
        "tokenizer": tokenizer.fingerprint(),
        "the training documents": [source.identity() for source in corpus],
        _SIZES: [source.documents.total_bytes for source in corpus],
        "the weights of data.sources": [source.weight for source in corpus],
    }
