from __future__ import annotations

import hashlib

import numpy as np
import pytest

from deepseek_jax.data import DataConfig, DataError, TextFiles, TokenizerConfig, heldout_documents, train_documents
from deepseek_jax.data.corpus import _tokenizer_texts
from deepseek_jax.data.documents import digest
from deepseek_jax.data.split import heldout_mask


def digests(count: int) -> np.ndarray:
    return np.array([digest(f"file{i}.py") for i in range(count)], np.uint64)


def test_digest_is_a_fixed_hash_of_the_identity():
    expected = int.from_bytes(hashlib.blake2b(b"asyncio/base_events.py", digest_size=8).digest(), "big")
    assert digest("asyncio/base_events.py") == expected


@pytest.mark.parametrize(
    ("total", "fraction", "minimum", "count"),
    [(1000, 0.05, 40, 50), (734, 0.05, 40, 40), (30, 0.1, 0, 3), (41, 0.05, 1, 3), (10, 0.0, 0, 0), (10, 0.0, 2, 2)],
)
def test_count_is_the_larger_of_minimum_and_fraction_rounded_up(total, fraction, minimum, count):
    assert heldout_mask(digests(total), fraction, minimum, "x").sum() == count


def test_split_does_not_depend_on_order():
    values = digests(300)
    order = np.random.default_rng(0).permutation(300)
    mask = heldout_mask(values, 0.1, 5, "x")
    np.testing.assert_array_equal(heldout_mask(values[order], 0.1, 5, "x"), mask[order])
    assert values[mask].max() < values[~mask].min()


def test_training_and_heldout_documents_are_disjoint_and_complete(config):
    heldout, train = heldout_documents(config), list(train_documents(config))
    assert len(heldout) == 6
    assert [d.id for d in heldout] == sorted(d.id for d in heldout)
    assert len({d.id for d in heldout} | {d.id for d in train}) == 60 == len(heldout) + len(train)
    assert heldout[0].id.startswith("part")


def test_tokenizer_never_sees_heldout_text(config):
    seen = set(_tokenizer_texts(TokenizerConfig(), config))
    assert seen == {d.text for d in train_documents(config)}
    assert not seen & {d.text for d in heldout_documents(config)}


def test_tokenizer_texts_stop_at_the_cap(config):
    sizes = [len(text.encode()) for text in _tokenizer_texts(TokenizerConfig(train_bytes=3000), config)]
    assert sum(sizes[:-1]) < 3000 <= sum(sizes)


def test_a_second_source_moves_no_document_of_the_first(config, folder, tmp_path):
    for i in range(50):
        (tmp_path / f"other{i}.md").write_text("x")
    both = DataConfig(sources=(*config.sources, TextFiles(path=tmp_path)), heldout_min_documents=6)
    assert {d.id for d in heldout_documents(config)} <= {d.id for d in heldout_documents(both)}
    assert len(heldout_documents(both)) == 12


def test_default_source_is_the_standard_library():
    heldout, train = heldout_documents(DataConfig()), [d.id for d in train_documents(DataConfig())]
    assert len(heldout) >= 40
    assert len(train) > 300
    assert {"dataclasses.py", "asyncio/base_events.py"} <= {*train, *(d.id for d in heldout)}
    forbidden = {"test", "tests", "site-packages", "idle_test", "__pycache__"}
    assert not [name for name in train if forbidden & set(name.split("/"))]


def test_too_few_documents_is_an_error():
    with pytest.raises(DataError, match=r"has 30 documents, and holding out 40 leaves none for training; lower data\."):
        heldout_mask(digests(30), 0.05, 40, "corpus/")
