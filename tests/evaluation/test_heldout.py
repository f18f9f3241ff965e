import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax.evaluation.heldout import bits_per_byte, heldout_rows
from deepseek_jax.model.targets import targets


class Letters:
    """One token per character, so that bytes and tokens differ outside ASCII."""

    bos_id, eos_id = 0, 1

    def __init__(self):
        self.calls = 0

    def encode(self, text):
        self.calls += 1
        return np.array([2 + ord(c) % 500 for c in text], np.int32)


def uniform(vocab_size):
    """A model that finds every token equally likely; counts labels exactly as training does."""

    def evaluate(batch):
        weights = targets(batch).weights
        return weights.sum() * np.log(vocab_size), weights.sum()

    return evaluate


TEXTS = ["def f(x):\n", "größer als 日本語", "", "x"]


def test_a_uniform_model_needs_log2_of_the_vocabulary_per_token():
    tokens = sum(len(text) + 2 for text in TEXTS) - 1  # bos and eos each, but for the first bos
    size = sum(len(text.encode("utf-8")) for text in TEXTS)
    assert size > sum(map(len, TEXTS))
    result = bits_per_byte(uniform(512), Letters(), TEXTS, sequence_length=7, rows=2)
    assert (result.tokens, result.bytes) == (tokens, size)
    assert result.bits_per_byte == pytest.approx(tokens * 9 / size, rel=1e-6)
    assert result.loss == pytest.approx(math.log(512), rel=1e-6)


@given(
    texts=st.lists(st.text(max_size=12), min_size=1, max_size=6).filter(any),
    length=st.sampled_from((1, 3, 8)),
    rows=st.sampled_from((1, 3)),
    add_bos=st.booleans(),
)
def test_every_token_is_predicted_once_from_what_stands_before_it(texts, length, rows, add_bos):
    tokenizer = Letters()
    stream = [] if add_bos else [1]
    for text in texts:
        stream += ([0] if add_bos else []) + tokenizer.encode(text).tolist() + [1]
    prepared = heldout_rows(tokenizer, texts, sequence_length=length, rows=rows, add_bos=add_bos)
    seen = []
    for batch in prepared.batches:
        assert all(a.shape == (rows, length + 1) and a.dtype == np.int32 for a in batch)
        labels, weights = targets(batch)
        assert ((batch.segment_ids > 0).any(axis=1) == (np.asarray(weights) > 0).any(axis=1)).all()
        for row in range(rows):
            for i in range(length):
                assert weights[row, i] == 0 or (batch.segment_ids[row, : i + 2] == 1).all()
                if weights[row, i]:
                    seen.append((batch.tokens[row, i], labels[row, i]))
                    assert batch.positions[row, i] == i
    assert seen == list(itertools.pairwise(stream))
    assert prepared.tokens == len(stream) - 1


def test_rows_are_prepared_once_per_tokenizer_and_text():
    tokenizer = Letters()
    for _ in range(3):
        bits_per_byte(uniform(512), tokenizer, list(TEXTS), sequence_length=7, rows=2)
    assert tokenizer.calls == len(TEXTS)
    other = bits_per_byte(uniform(512), tokenizer, [*TEXTS, "more"], sequence_length=7, rows=2)
    assert tokenizer.calls == 2 * len(TEXTS) + 1
    assert other.bytes == sum(len(text.encode()) for text in TEXTS) + 4


def test_documents_may_be_objects_with_a_text():
    class Document:
        text = "abc"

    assert bits_per_byte(uniform(2), Letters(), [Document()], sequence_length=4, rows=1).bytes == 3


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"^the 2 held-out documents hold no text; hold out more"):
        bits_per_byte(uniform(2), Letters(), ["", ""], sequence_length=4, rows=1)
    with pytest.raises(ValueError, match=r"^sequence_length \(0\) and rows \(1\) must be at least 1$"):
        bits_per_byte(uniform(2), Letters(), ["a"], sequence_length=0, rows=1)
    tokenizer = Letters()
    tokenizer.bos_id = None
    with pytest.raises(ValueError, match=r"^the tokenizer has no bos token; evaluate with add_bos=False"):
        bits_per_byte(uniform(2), tokenizer, ["a"], sequence_length=4, rows=1)
    with pytest.raises(ValueError, match=r"^evaluate counted 3 labels, the held-out rows have 4$"):
        bits_per_byte(lambda batch: (1.0, 3.0), Letters(), ["abc"], sequence_length=4, rows=1)
