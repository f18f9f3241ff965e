from __future__ import annotations

import dataclasses
import itertools
import json
import threading

import numpy as np
import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.data import (
    DataConfig,
    DataError,
    TextFiles,
    Tokenizer,
    heldout_documents,
    merge_states,
    train_documents,
    train_rows,
)
from deepseek_jax.data.fim import restore
from deepseek_jax.data.prefetch import Prefetcher
from tests.data.test_tokenizer import word_tokenizer

RAMP = (4, 4, 8, 12, 4, 16, 8, 8)


def batches(iterator, sizes) -> list[dict[str, np.ndarray]]:
    return [iterator.next_batch(size) for size in sizes]


def assert_equal(got, expected):
    for one, other in zip(got, expected, strict=True):
        assert one.keys() == other.keys() == {"tokens", "segment_ids", "positions", "loss_mask"}
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def over_the_wire(state):
    return json.loads(json.dumps(state))


def all_documents(config, tokenizer, **options) -> list[np.ndarray]:
    """Every document of a finite run, put together again from its shard's rows, without bos and eos."""
    iterator = train_rows(config, tokenizer, seed=0, **options)
    streams = [[] for _ in range(config.virtual_shards)]
    for number in range(10_000):
        try:
            row = iterator.next_batch(1)
        except StopIteration:
            break
        streams[number % config.virtual_shards].append(row["tokens"][row["loss_mask"] == 1])
    documents = []
    for stream in streams:
        tokens = np.concatenate(stream)
        assert tokens[-1] == tokenizer.eos_id
        ends = np.flatnonzero(tokens == tokenizer.eos_id) + 1
        documents += np.split(tokens, ends[:-1])
    assert all(document[0] == tokenizer.bos_id for document in documents)
    return [document[1:-1] for document in documents]


def test_shapes_and_dtypes(config, tokenizer):
    batch = train_rows(config, tokenizer, seed=0).next_batch(8)
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == dict.fromkeys(
        ("tokens", "segment_ids", "positions", "loss_mask"), ((8, 64), np.dtype("int32"))
    )
    assert batch["tokens"].max() < tokenizer.vocab_size


@pytest.mark.parametrize("epochs", [1, 3])
def test_every_document_comes_once_in_each_epoch(config, tokenizer, epochs):
    finite = dataclasses.replace(config, epochs=epochs, fim_rate=0.3, split_combined_rate=0.3)
    found = [tokenizer.decode(restore(tokens, tokenizer)) for tokens in all_documents(finite, tokenizer)]
    assert sorted(found) == sorted(epochs * [d.text for d in train_documents(config)])
    assert not set(found) & {d.text for d in heldout_documents(config)}


def test_epochs_differ_in_order_and_in_what_is_rearranged(config, tokenizer):
    one_shard = dataclasses.replace(config, epochs=2, fim_rate=0.3, virtual_shards=1)
    documents = all_documents(one_shard, tokenizer)
    half = len(documents) // 2
    texts = [tokenizer.decode(restore(tokens, tokenizer)) for tokens in documents]
    chosen = [{t for t, d in zip(texts[part], documents[part], strict=True) if d[0] == tokenizer.fim_begin_id}
              for part in (slice(half), slice(half, None))]  # fmt: skip
    assert texts[:half] != texts[half:]
    assert sorted(texts[:half]) == sorted(texts[half:])
    assert chosen[0] != chosen[1]
    assert all(4 <= len(c) <= 30 for c in chosen)


def test_seed_decides_everything(config, tokenizer):
    first, again, other = (batches(train_rows(config, tokenizer, seed=s), RAMP) for s in (0, 0, 1))
    assert_equal(first, again)
    assert not np.array_equal(first[0]["tokens"], other[0]["tokens"])


def test_cache_and_read_threads_change_nothing(config, tokenizer):
    expected = batches(train_rows(config, tokenizer, seed=0), RAMP)
    for change in ({"cache_mb": 0}, {"read_threads": 2}):
        assert_equal(batches(train_rows(dataclasses.replace(config, **change), tokenizer, seed=0), RAMP), expected)


@pytest.mark.parametrize("steps", [0, 1, 3, 7])
def test_resume_is_exact(config, tokenizer, steps):
    whole = train_rows(config, tokenizer, seed=0)
    expected = batches(whole, RAMP)
    first = train_rows(config, tokenizer, seed=0)
    batches(first, RAMP[:steps])
    state = over_the_wire(first.get_state())
    second = train_rows(config, tokenizer, seed=0)
    second.next_batch(12)  # a used iterator can be set too
    second.set_state(state)
    assert second.rows_seen == sum(RAMP[:steps])
    assert_equal(batches(second, RAMP[steps:]), expected[steps:])
    assert second.get_state() == whole.get_state()
    assert_equal(batches(first, RAMP[steps:]), expected[steps:])  # saving does not disturb


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 2), (4, 4)])
def test_resume_on_another_number_of_hosts_gives_the_same_rows(config, tokenizer, before, after):
    expected = batches(train_rows(config, tokenizer, seed=0), RAMP)

    def hosts(count):
        return [train_rows(config, tokenizer, seed=0, host_index=i, host_count=count) for i in range(count)]

    def global_batches(iterators, sizes):
        """Host h has the rows h, h + H, … of each batch."""
        parts = [batches(iterator, sizes) for iterator in iterators]
        return [{name: np.stack([p[name] for p in step], axis=1).reshape(-1, 64) for name in step[0]}
                for step in zip(*parts, strict=True)]  # fmt: skip

    old = hosts(before)
    assert_equal(global_batches(old, RAMP[:4]), expected[:4])
    state = over_the_wire(merge_states([iterator.get_state() for iterator in old]))
    new = hosts(after)
    for iterator in new:
        iterator.set_state(state)
    assert_equal(global_batches(new, RAMP[4:]), expected[4:])


def test_closing_loses_nothing(config, tokenizer):
    expected = batches(train_rows(config, tokenizer, seed=0), RAMP)
    iterator = train_rows(config, tokenizer, seed=0)
    got = []
    for size in RAMP:
        got.append(iterator.next_batch(size))
        iterator.close()
    assert_equal(got, expected)


def test_the_end_on_one_host(config, tokenizer):
    finite = dataclasses.replace(config, epochs=1)
    iterator, labels, steps = train_rows(finite, tokenizer, seed=0), 0, 0
    while not iterator.exhausted:
        assert steps < 1000, "the last epoch does not end"
        state = iterator.get_state()
        batch = iterator.next_batch(8)
        labels, steps = labels + batch["loss_mask"].sum(), steps + 1
    assert batch["loss_mask"].any()
    for _ in range(2):
        with pytest.raises(StopIteration):
            iterator.next_batch(8)
    assert labels == sum(len(tokens) + 2 for tokens in all_documents(finite, tokenizer))
    again = train_rows(finite, tokenizer, seed=0)
    again.set_state(over_the_wire(state))
    assert_equal([again.next_batch(8)], [batch])
    with pytest.raises(StopIteration):
        again.next_batch(8)
    after_the_end = train_rows(finite, tokenizer, seed=0)
    after_the_end.set_state(over_the_wire(again.get_state()))
    with pytest.raises(StopIteration):
        after_the_end.next_batch(8)


def test_the_end_on_several_hosts_is_padding(config, tokenizer):
    finite = dataclasses.replace(config, epochs=1, sequence_length=31)
    iterator = train_rows(finite, tokenizer, seed=0, host_index=1, host_count=2)
    for _ in range(1000):
        assert iterator.next_batch(2)["tokens"].shape == (1, 32)
        if iterator.exhausted:
            break
    assert iterator.exhausted
    assert not iterator.next_batch(4)["loss_mask"].any()


@pytest.mark.parametrize(("weight", "repeats"), [(1, (30, 36)), (3, (20, 60))])  # 30 · 6 = 36 · 5 bytes
def test_mixture_follows_the_weights_in_text(tokenizer, tmp_path, weight, repeats):
    for name, repeat in zip(("short", "long"), repeats, strict=True):
        (tmp_path / name).mkdir()
        for i in range(60):
            (tmp_path / name / f"{i}.txt").write_text(f"{name} " * repeat)
    sources = (TextFiles(path=tmp_path / "short", weight=weight), TextFiles(path=tmp_path / "long"))
    config = DataConfig(sources=sources, sequence_length=127, heldout_min_documents=2, fim_rate=0, add_bos=False)
    iterator = train_rows(config, tokenizer, seed=0)
    tokens = iterator.next_batch(512)["tokens"]
    text = tokenizer.decode(tokens.ravel())
    ratio = text.count("short ") * len("short ") / (text.count("long ") * len("long "))
    for shard in range(8):  # the mixture's pattern must not resonate with the dealing
        text_of_shard = tokenizer.decode(tokens[shard::8].ravel())
        assert "short short" in text_of_shard
        assert "long long" in text_of_shard
    assert ratio == pytest.approx(weight, rel=0.15)
    again = train_rows(config, tokenizer, seed=0)
    again.set_state(over_the_wire(iterator.get_state()))
    assert_equal([again.next_batch(16)], [iterator.next_batch(16)])


def test_state_of_another_run_is_refused(config, tokenizer):
    iterator = train_rows(config, tokenizer, seed=0)
    state = over_the_wire(iterator.get_state())
    other = train_rows(dataclasses.replace(config, virtual_shards=8), tokenizer, seed=0)
    with pytest.raises(DataError, match=r"virtual_shards was 4 and is now 8; set it back, or begin a new run"):
        other.set_state(state)
    with pytest.raises(DataError, match="seed was 0 and is now 1"):
        train_rows(config, tokenizer, seed=1).set_state(state)
    fewer = dataclasses.replace(config, heldout_min_documents=7)
    with pytest.raises(DataError, match="the training documents was"):
        train_rows(fewer, tokenizer, seed=0).set_state(state)
    with pytest.raises(DataError, match="data state has version None"):
        iterator.set_state({})
    half = train_rows(config, tokenizer, seed=0, host_index=0, host_count=2)
    with pytest.raises(DataError, match=r"lacks virtual shards \[1, 3\]; merge the states of all hosts"):
        iterator.set_state(half.get_state())
    half.next_batch(2)
    with pytest.raises(DataError, match=r"saved at different rows: \[0, 2\]"):
        merge_states([half.get_state(), state])


def test_hosts_must_fit(config, tokenizer):
    with pytest.raises(
        ConfigError, match=r"data\.virtual_shards \(4\) must be a multiple of the number of hosts \(3\)"
    ):
        train_rows(config, tokenizer, seed=0, host_count=3)
    with pytest.raises(ConfigError, match="host_index must be from 0 to 1, not 2"):
        train_rows(config, tokenizer, seed=0, host_index=2, host_count=2)
    with pytest.raises(ConfigError, match=r"batch size \(3\) must be a positive multiple of the number of hosts \(2\)"):
        train_rows(config, tokenizer, seed=0, host_count=2).next_batch(3)


def test_tokenizer_must_have_what_the_config_asks_for(config):
    bare = Tokenizer(word_tokenizer("</s>"), "bare.json")
    with pytest.raises(DataError, match=r"^bare\.json: .*fim_begin.*; add it, or set data\.fim_rate=0$"):
        train_rows(config, bare, seed=0)
    with pytest.raises(DataError, match=r"^bare\.json: .*bos.*; set data\.add_bos=false to go without$"):
        train_rows(dataclasses.replace(config, fim_rate=0), bare, seed=0)
    train_rows(dataclasses.replace(config, fim_rate=0, add_bos=False), bare, seed=0)


def test_a_broken_document_reaches_the_trainer(tokenizer, tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_bytes(b"fine " * 9)
    config = DataConfig(sources=(TextFiles(path=tmp_path),), sequence_length=15, heldout_min_documents=1, epochs=1)
    iterator = train_rows(config, tokenizer, seed=0)
    (tmp_path / "0.txt").write_bytes(b"broken \xff")
    for _ in range(2):
        with pytest.raises(DataError, match=r"0\.txt: the file is not what it was when the run began"):
            batches(iterator, itertools.repeat(8))


def test_prefetcher_works_ahead_but_not_far():
    made, enough = [], threading.Event()

    def items():
        for i in itertools.count():
            made.append(i)
            if len(made) == 16:
                enough.set()
            yield i

    prefetcher = Prefetcher(items(), depth=16)
    assert enough.wait(timeout=10)
    assert prefetcher.take(3) == [0, 1, 2]
    assert prefetcher.take(20) == list(range(3, 23))
    prefetcher.close()
    assert len(made) <= 23 + 40
    assert not prefetcher._thread.is_alive()
