"""Held-out bits per byte: what a compressor driven by the model would need for text it was not trained on.

Documents are framed as in training, `bos text eos`, and laid end to end. The stream is cut into rows that overlap by
one token, the last label of a row being the first input of the next, so every token but the very first is predicted
exactly once. That includes eos, because a compressor must also say where a file ends, and bos, which is next to free.
Bits are divided by the UTF-8 bytes of the text alone: the same bytes that gzip and xz are measured on.
"""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from deepseek_jax.model.targets import Microbatch

Evaluate = Callable[[Microbatch], tuple[Any, Any]]
"""`evaluate(batch) -> (sum of the labels' losses in nats, number of labels)`, as `Trainer.evaluate` of a state."""


class TextTokenizer(Protocol):
    """What is needed of a tokenizer; see `data.Tokenizer`."""

    eos_id: int
    bos_id: int | None

    def encode(self, text: str) -> Sequence[int] | np.ndarray: ...


class Document(Protocol):
    """Anything with a text; see `data.documents.Document`."""

    @property
    def text(self) -> str: ...


class HeldoutResult(NamedTuple):
    """How well a model predicts held-out text."""

    bits_per_byte: float
    loss: float
    """Mean over tokens, in nats."""
    tokens: int
    """Predicted tokens."""
    bytes: int
    """Bytes of the text in UTF-8."""


class HeldoutRows(NamedTuple):
    """Held-out text made ready once, to be evaluated as often as wanted."""

    batches: tuple[Microbatch, ...]
    """NumPy arrays int32 `[rows, S + 1]`; the last batch ends with empty rows, so that all have one shape."""
    tokens: int
    bytes: int

    def evaluate(self, evaluate: Evaluate) -> HeldoutResult:
        """Runs the model over all batches.

        Raises:
          ValueError: `evaluate` did not count every token as a label.
        """
        # All batches are handed to the device before the first result is waited for.
        parts = [evaluate(batch) for batch in self.batches]
        nats = math.fsum(float(nll) for nll, _ in parts)
        labels = round(math.fsum(float(count) for _, count in parts))
        if labels != self.tokens:
            raise ValueError(f"evaluate counted {labels} labels, the held-out rows have {self.tokens}")
        return HeldoutResult(nats / math.log(2) / self.bytes, nats / self.tokens, self.tokens, self.bytes)


def bits_per_byte(
    evaluate: Evaluate,
    tokenizer: TextTokenizer,
    documents: Iterable[str | Document],
    *,
    sequence_length: int,
    rows: int,
    add_bos: bool = True,
) -> HeldoutResult:
    """The model's bits per byte of `documents`.

    Args:
      evaluate: the model: a batch of rows `[rows, S + 1]` to the sum of its labels' losses and their number.
      tokenizer: the one that the model was trained with. The rows it gives are kept as long as it lives.
      documents: texts, or objects with a `text`, in the order in which they are to be read.
      sequence_length: S, tokens of context at most.
      rows: rows per batch.
      add_bos: begin each document with the bos token, as `data.add_bos` does in training. Without, documents are
        `text eos`, and an eos that is not predicted begins the stream.

    Raises:
      ValueError: there is no text, or the tokenizer has no bos token.
    """
    texts = [document if isinstance(document, str) else document.text for document in documents]
    prepared = _ROWS.setdefault(tokenizer, {})
    key = (_digest(texts), sequence_length, rows, add_bos)
    if key not in prepared:
        prepared[key] = heldout_rows(tokenizer, texts, sequence_length=sequence_length, rows=rows, add_bos=add_bos)
    return prepared[key].evaluate(evaluate)


def heldout_rows(
    tokenizer: TextTokenizer, texts: Sequence[str], *, sequence_length: int, rows: int, add_bos: bool = True
) -> HeldoutRows:
    """Tokenizes texts and cuts them into batches of rows; arguments and errors as of `bits_per_byte`."""
    size = sum(len(text.encode()) for text in texts)
    if not size:
        raise ValueError(f"the {len(texts)} held-out documents hold no text; hold out more, data.heldout_fraction")
    if sequence_length < 1 or rows < 1:
        raise ValueError(f"sequence_length ({sequence_length}) and rows ({rows}) must be at least 1")
    stream = _stream(tokenizer, texts, add_bos)
    labels = len(stream) - 1
    count = -(-labels // sequence_length)
    padded = -(-count // rows) * rows
    # Row i is tokens i·S … i·S + S: the last of a row, a label only, comes first in the next, an input only.
    index = np.arange(padded)[:, None] * sequence_length + np.arange(sequence_length + 1)
    real = index <= labels
    real[count:] = False
    tokens = np.where(real, stream[np.minimum(index, labels)], stream[0]).astype(np.int32)
    mask = real.astype(np.int32)
    positions = np.where(real, np.arange(sequence_length + 1), 0).astype(np.int32)
    # One segment per row: what came before a document is context, as in pre-training.
    table = Microbatch(tokens=tokens, segment_ids=mask, positions=positions, loss_mask=mask)
    batches = (Microbatch(*(array[start : start + rows] for array in table)) for start in range(0, padded, rows))
    return HeldoutRows(tuple(batches), labels, size)


def _stream(tokenizer: TextTokenizer, texts: Sequence[str], add_bos: bool) -> np.ndarray:
    """All documents as one row of tokens, int32 `[n]`; the first token is given, not predicted."""
    if add_bos and tokenizer.bos_id is None:
        raise ValueError("the tokenizer has no bos token; evaluate with add_bos=False, as it was trained")
    begin = [tokenizer.bos_id] if add_bos and tokenizer.bos_id is not None else []
    pieces: list[Sequence[int] | np.ndarray] = [] if add_bos else [[tokenizer.eos_id]]
    for text in texts:
        pieces += [begin, tokenizer.encode(text), [tokenizer.eos_id]]
    return np.concatenate([np.asarray(piece, np.int32) for piece in pieces])


def _digest(texts: Sequence[str]) -> bytes:
    state = hashlib.blake2b(digest_size=16)
    for text in texts:
        data = text.encode()
        state.update(len(data).to_bytes(8, "little") + data)
    return state.digest()


_ROWS: weakref.WeakKeyDictionary[TextTokenizer, dict[tuple, HeldoutRows]] = weakref.WeakKeyDictionary()
"""What `bits_per_byte` has tokenized, so that a training loop may call it again and again."""
