from __future__ import annotations

import itertools
import json

import grain
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from deepseek_jax.data.packing import pack, packer_state, padding_row, to_row

lengths = st.lists(st.integers(1, 25), min_size=1, max_size=12)


def packed_rows(sizes: list[int], row_length: int) -> tuple[list[dict], grain.IterDataset]:
    """Documents of consecutive numbers from 1, packed."""
    starts = np.cumsum([1, *sizes])
    documents = [{"tokens": np.arange(a, b, dtype=np.int32)} for a, b in itertools.pairwise(starts)]
    dataset = pack(grain.MapDataset.source(documents).to_iter_dataset(grain.ReadOptions(num_threads=0)), row_length)
    return [to_row(row, pad_id=-7) for row in dataset], dataset


@given(sizes=lengths, row_length=st.integers(2, 12))
def test_no_token_is_lost_and_none_comes_twice(sizes, row_length):
    rows, _ = packed_rows(sizes, row_length)
    tokens = np.concatenate([row["tokens"] for row in rows])
    mask = np.concatenate([row["loss_mask"] for row in rows])
    np.testing.assert_array_equal(tokens[mask == 1], np.arange(1, sum(sizes) + 1))
    assert (tokens[mask == 0] == -7).all()
    assert len(rows) == -(-sum(sizes) // row_length)  # padding only in the last row
    assert all(row["loss_mask"].all() for row in rows[:-1])


@given(sizes=lengths, row_length=st.integers(2, 12))
def test_segments_are_documents_and_positions_restart_with_them(sizes, row_length):
    owner = np.repeat(np.arange(len(sizes)), sizes)
    for row in packed_rows(sizes, row_length)[0]:
        segments, mask = row["segment_ids"], row["loss_mask"]
        np.testing.assert_array_equal(mask, segments > 0)
        owners = owner[row["tokens"][mask == 1] - 1]
        np.testing.assert_array_equal(segments[mask == 1], owners - owners[0] + 1)
        for segment in range(1, segments.max() + 1):
            np.testing.assert_array_equal(row["positions"][segments == segment], np.arange((segments == segment).sum()))
        assert all(value.dtype == np.int32 and value.shape == (row_length,) for value in row.values())


@given(sizes=lengths, row_length=st.integers(2, 12), data=st.data())
def test_state_survives_json(sizes, row_length, data):
    rows, dataset = packed_rows(sizes, row_length)
    iterator = iter(dataset)
    done = data.draw(st.integers(0, len(rows)))
    for _ in range(done):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    fresh = iter(dataset)
    fresh.set_state(packer_state(state))
    rest = [to_row(row, pad_id=-7) for row in fresh]
    assert len(rest) == len(rows) - done
    for row, expected in zip(rest, rows[done:], strict=True):
        np.testing.assert_array_equal(row["tokens"], expected["tokens"])


def test_grain_needs_the_tuples_back():
    """The reason for `packer_state`: if this stops failing, it can go."""
    _, dataset = packed_rows([4, 4], 4)
    iterator = iter(dataset)
    state = json.loads(json.dumps(iterator.get_state()))
    fresh = iter(dataset)
    fresh.set_state(state)
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(next(fresh)["tokens"], next(iterator)["tokens"])


def test_padding_row_has_no_label():
    row = padding_row(5, pad_id=2)
    assert row["tokens"].tolist() == [2] * 5
    assert not row["loss_mask"].any()
    assert not row["segment_ids"].any()
