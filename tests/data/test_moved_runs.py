"""What stays as it was in another folder and on another number of hosts; and the shares of a mixture in a long run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from deepseek_jax.data import (
    DataConfig,
    Jsonl,
    RowIterator,
    Source,
    TextFiles,
    Tokenizer,
    heldout_documents,
    load_corpus,
    merge_states,
    train_documents,
    train_rows,
)
from tests.data.conftest import document_text


def write_text_files(root: Path) -> Source:
    for i in range(40):
        path = root / f"part{i % 3}" / f"{i:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(document_text(i).encode())
    return TextFiles(path=root)


def write_jsonl(root: Path) -> Source:
    for part in ("a", "b"):
        (root / part).mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"text": part + document_text(i)}) for i in range(20)]
        (root / part / "texts.jsonl").write_text("\n".join(lines) + "\n")
    return Jsonl(path=root)


@pytest.mark.parametrize("write", [write_text_files, write_jsonl])
@pytest.mark.parametrize("target", ["renamed", "elsewhere/deep/er"])
def test_a_renamed_root_keeps_the_split_and_goes_on(write, target, config, tokenizer, tmp_path):
    """The same held-out documents, and a run that was begun in the old place takes the same rows in the new one."""
    source = write(tmp_path / "corpus")
    before = dataclasses.replace(config, sources=(source,))
    heldout, train = heldout_documents(before), list(train_documents(before))
    whole = train_rows(before, tokenizer, seed=0)
    whole.next_batch(8)
    state = json.loads(json.dumps(whole.get_state()))
    expected = whole.next_batch(40)
    whole.close()

    (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "corpus").rename(tmp_path / target)
    after = dataclasses.replace(config, sources=(dataclasses.replace(source, path=tmp_path / target),))
    assert heldout_documents(after) == heldout
    assert list(train_documents(after)) == train
    moved = train_rows(after, tokenizer, seed=0)
    moved.set_state(state)
    batch = moved.next_batch(40)
    for name, value in expected.items():
        np.testing.assert_array_equal(batch[name], value, err_msg=name)


SHARES = {"x": 5.0, "y": 3.0, "z": 2.0}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> DataConfig:
    """Three sources of one letter each, with documents of very different lengths and numbers."""
    root = tmp_path_factory.mktemp("mixture")
    lengths = {"x": [120] * 60, "y": [60, 900, 150, 90] * 15, "z": [2000] * 12}
    for letter, sizes in lengths.items():
        (root / letter).mkdir()
        for i, size in enumerate(sizes):
            (root / letter / f"{i}.txt").write_text(letter * size)
    sources = tuple(TextFiles(path=root / letter, weight=weight) for letter, weight in SHARES.items())
    return DataConfig(
        sources=sources, sequence_length=127, heldout_fraction=0, heldout_min_documents=0, fim_rate=0, virtual_shards=4
    )


def letters(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text of each source."""
    lengths = np.array([[piece.count(letter.encode()) for letter in SHARES] for piece in tokenizer.token_bytes])
    lengths[list(tokenizer.special_ids)] = 0
    return lengths[tokens].sum(axis=(0, 1))


def test_a_mixture_holds_its_weights_over_many_rows(mixture, tokenizer):
    """To two hundredths of the text over all rows, and not far from it in any stretch."""
    iterator = train_rows(mixture, tokenizer, seed=0)
    parts = np.array([letters(iterator.next_batch(512)["tokens"], tokenizer) for _ in range(4)])
    iterator.close()
    total, expected = parts.sum(axis=0), np.array(list(SHARES.values())) / sum(SHARES.values())
    assert total.sum() > 200_000
    np.testing.assert_allclose(total / total.sum(), expected, atol=0.02)
    np.testing.assert_allclose(parts / parts.sum(axis=1, keepdims=True), np.tile(expected, (4, 1)), atol=0.08)


# --- hosts ---

Rows = dict[int, list[dict[str, np.ndarray]]]
"""By virtual shard: its rows in order."""


class Run:
    """A run on hosts that come and go: each leg takes batches on some hosts, and leaves the state of all of them."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer):
        self.config, self.tokenizer = config, tokenizer
        self.rows: Rows = {shard: [] for shard in range(config.virtual_shards)}
        self.state: dict | None = None
        self.taken = 0

    def leg(self, hosts: int, sizes: list[int]) -> None:
        iterators = [
            train_rows(self.config, self.tokenizer, seed=0, host_index=h, host_count=hosts) for h in range(hosts)
        ]
        for iterator in iterators:
            if self.state is not None:
                iterator.set_state(self.state)
        for size in sizes:
            self._take(iterators, size)
            if all(iterator.exhausted for iterator in iterators):
                break
        self.state = json.loads(json.dumps(merge_states([iterator.get_state() for iterator in iterators])))
        for iterator in iterators:
            iterator.close()

    def _take(self, iterators: list[RowIterator], size: int) -> None:
        for host, iterator in enumerate(iterators):
            batch = iterator.next_batch(size)
            for place in range(size // len(iterators)):
                row = {name: value[place] for name, value in batch.items()}
                if row["loss_mask"].any():
                    number = self.taken + host + place * len(iterators)
                    self.rows[number % self.config.virtual_shards].append(row)
        self.taken += size


def assert_same_rows(got: Rows, expected: Rows) -> None:
    assert got.keys() == expected.keys()
    for shard, rows in expected.items():
        assert len(got[shard]) == len(rows)
        for one, other in zip(got[shard], rows, strict=True):
            for name, value in other.items():
                np.testing.assert_array_equal(one[name], value, err_msg=f"{name} of shard {shard}")


@pytest.mark.parametrize(
    ("hosts", "sizes"),
    [((2, 1, 4), ([4, 6], [5, 5, 12])), ((1, 4, 2), ([3, 5], [12, 4])), ((4, 2, 1), ([12], [4, 6]))],
)
def test_every_document_comes_once_however_the_hosts_change(hosts, sizes, config, tokenizer):
    """Each virtual shard gives the rows that it gives to a single host, from the first to the last."""
    finite = dataclasses.replace(config, epochs=2, fim_rate=0.0)
    whole, moved = Run(finite, tokenizer), Run(finite, tokenizer)
    whole.leg(1, [4] * 1000)
    for count, batches in zip(hosts, (*sizes, [4] * 1000), strict=True):
        moved.leg(count, batches)
    assert_same_rows(moved.rows, whole.rows)
    texts = []
    for rows in moved.rows.values():
        stream = np.concatenate([row["tokens"][row["loss_mask"] == 1] for row in rows])
        assert stream[-1] == tokenizer.eos_id
        texts += [
            tokenizer.decode(part[1:-1])
            for part in np.split(stream, np.flatnonzero(stream == tokenizer.eos_id) + 1)[:-1]
        ]
    assert sorted(texts) == sorted(2 * [document.text for document in train_documents(finite)])


@pytest.mark.parametrize("hosts", [(2, 1), (1, 4)])
def test_a_mixture_goes_on_with_the_same_rows_on_other_hosts(hosts, mixture, tokenizer):
    assert len(load_corpus(mixture)) == 3
    whole, moved = Run(mixture, tokenizer), Run(mixture, tokenizer)
    whole.leg(1, [4, 8, 8, 4, 24])
    moved.leg(hosts[0], [4, 8])
    moved.leg(hosts[1], [8, 4, 24])
    assert_same_rows(moved.rows, whole.rows)
    assert moved.state == whole.state
