"""What a resumed run notices of its data: files that were edited, and epochs that are over."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from deepseek_jax.data import DataConfig, DataError, Jsonl, TextFiles, load_corpus, train_rows
from deepseek_jax.data.corpus import forget_corpora


def state_after(config: DataConfig, tokenizer, rows: int) -> dict:
    iterator = train_rows(config, tokenizer, seed=0)
    iterator.next_batch(rows)
    iterator.close()
    return json.loads(json.dumps(iterator.get_state()))


def write_texts(folder: Path) -> DataConfig:
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"document {i}\n" * 9)
    return DataConfig(sources=(TextFiles(path=folder),), sequence_length=15, heldout_min_documents=1, virtual_shards=2)


def test_a_file_that_was_edited_is_noticed(tokenizer, tmp_path):
    config = write_texts(tmp_path)
    state = state_after(config, tokenizer, 4)
    (tmp_path / "3.txt").write_text("document 3, another edition\n" * 9)
    forget_corpora()
    with pytest.raises(DataError, match=r"the bytes of data\.sources was \[\d+\] and is now \[\d+\]; set it back, or"):
        train_rows(config, tokenizer, seed=0).set_state(state)


def test_a_state_that_tells_no_sizes_is_taken(tokenizer, tmp_path):
    """Those of older versions do not; of what they do tell, nothing may differ."""
    config = write_texts(tmp_path)
    state = state_after(config, tokenizer, 4)
    expected = train_rows(config, tokenizer, seed=0)
    expected.set_state(state)
    del state["identity"]["the bytes of data.sources"]
    iterator = train_rows(config, tokenizer, seed=0)
    iterator.set_state(state)
    np.testing.assert_array_equal(iterator.next_batch(4)["tokens"], expected.next_batch(4)["tokens"])
    with pytest.raises(DataError, match="seed was 0 and is now 1"):
        train_rows(config, tokenizer, seed=1).set_state(state)


def test_a_process_sees_new_files_once_it_forgets(tmp_path):
    config = write_texts(tmp_path)
    (tmp_path / "more.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    config = dataclasses.replace(config, sources=(Jsonl(path=tmp_path),))
    first = load_corpus(config)
    (tmp_path / "new.jsonl").write_text('{"text": "c"}\n')
    assert load_corpus(config) is first
    forget_corpora()
    assert len(load_corpus(config)[0].documents) == 3


def test_fewer_epochs_than_are_read_is_told(config, tokenizer):
    """Grain finds the end in two ways: before the rest of the document at hand, and before the place itself."""
    endless = dataclasses.replace(config, virtual_shards=1, sequence_length=7)
    once = train_rows(dataclasses.replace(endless, epochs=1), tokenizer, seed=0)
    end = 0
    while not once.exhausted:
        once.next_batch(1)
        end += 1
    iterator = train_rows(endless, tokenizer, seed=0)
    iterator.next_batch(end)
    causes = set()
    for row in range(end + 1, end + 20):
        iterator.next_batch(1)
        message = rf"^the run has read beyond data\.epochs=1 already, by row {row}; set data\.epochs higher, or none$"
        with pytest.raises(DataError, match=message) as told:
            once.set_state(iterator.get_state())
        causes.add(type(told.value.__cause__))
    iterator.close()
    assert causes == {IndexError, ValueError}


def test_other_epochs_that_are_not_over_change_nothing(config, tokenizer):
    state = state_after(config, tokenizer, 32)
    batches = []
    for epochs in (None, 1, 5):
        iterator = train_rows(dataclasses.replace(config, epochs=epochs), tokenizer, seed=0)
        iterator.set_state(state)
        batches.append(iterator.next_batch(8)["tokens"])
        iterator.close()
    np.testing.assert_array_equal(batches[1], batches[0])
    np.testing.assert_array_equal(batches[2], batches[0])
