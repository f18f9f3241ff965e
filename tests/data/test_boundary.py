"""Random splitting of combined tokens where it is used: in the training rows, and in no held-out row."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest
from tiny_run import experiment

from deepseek_jax.data import DataConfig, Tokenizer, heldout_documents, train_documents
from deepseek_jax.data.boundary import CombinedTokens
from deepseek_jax.model.targets import targets
from deepseek_jax.parallel.mesh import ParallelConfig, make_mesh
from deepseek_jax.training.finish import HeldoutEvaluator
from tests.data.test_rows import all_documents


@pytest.fixture(scope="module")
def combined(tokenizer) -> CombinedTokens:
    return CombinedTokens(tokenizer)


def trained_on(config: DataConfig, tokenizer: Tokenizer, **changes) -> list[np.ndarray]:
    """Tokens of every document of a run, put together again from its rows."""
    return all_documents(dataclasses.replace(config, **{"epochs": 1, "fim_rate": 0.0} | changes), tokenizer)


def split_places(whole: np.ndarray, tokens: np.ndarray, combined: CombinedTokens) -> list[bool]:
    """For each combined token of `whole`, whether `tokens` has one of the ways to split it in its place.

    All other tokens must be the same.
    """
    places, at = [], 0
    for token in whole.tolist():
        ways = [way for way in combined.splits.get(token, ()) if np.array_equal(tokens[at : at + len(way)], way)]
        if combined.is_combined[token]:
            places.append(bool(ways))
        if not ways:
            assert tokens[at] == token
        at += len(ways[0]) if ways else 1
    assert at == len(tokens)
    return places


def test_at_rate_zero_training_rows_hold_the_tokens_of_the_text(config, tokenizer, combined):
    documents = trained_on(config, tokenizer, split_combined_rate=0.0)
    for tokens in documents:
        np.testing.assert_array_equal(tokens, tokenizer.encode(tokenizer.decode(tokens)))
    assert sum(combined.is_combined[tokens].sum() for tokens in documents) > 100


def test_at_rate_one_every_combined_token_of_a_training_row_is_split(config, tokenizer, combined):
    documents = trained_on(config, tokenizer, split_combined_rate=1.0)
    texts = [tokenizer.decode(tokens) for tokens in documents]
    assert sorted(texts) == sorted(document.text for document in train_documents(config))
    places = [split_places(tokenizer.encode(t), d, combined) for t, d in zip(texts, documents, strict=True)]
    assert all(all(part) for part in places)
    assert sum(map(len, places)) > 100


def test_training_splits_the_share_that_the_config_asks_for(config, tokenizer, combined):
    documents = trained_on(config, tokenizer, split_combined_rate=0.3, epochs=4)
    places = [p for d in documents for p in split_places(tokenizer.encode(tokenizer.decode(d)), d, combined)]
    assert len(places) > 1000
    assert np.mean(places) == pytest.approx(0.3, abs=0.05)


def test_where_a_document_is_split_changes_from_epoch_to_epoch(config, tokenizer):
    documents = trained_on(config, tokenizer, split_combined_rate=1.0, epochs=2)
    versions: dict[str, set[bytes]] = {}
    for tokens in documents:
        versions.setdefault(tokenizer.decode(tokens), set()).add(tokens.tobytes())
    assert sum(len(version) == 2 for version in versions.values()) > len(versions) / 4


def test_the_parts_of_a_rearranged_document_are_split_too(config, tokenizer, combined):
    marks = [tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id]
    documents = trained_on(config, tokenizer, split_combined_rate=1.0, fim_rate=1.0)
    places = []
    for tokens in documents:
        at = np.flatnonzero(np.isin(tokens, marks))
        assert tokens[at].tolist() == marks
        for part in np.split(tokens, at)[1:]:
            places += split_places(tokenizer.encode(tokenizer.decode(part[1:])), part[1:], combined)
    assert all(places)
    assert len(places) > 100


def test_held_out_rows_are_never_split(config, tokenizer, combined):
    """As a run evaluates them, with a trainer that counts labels and keeps the rows."""
    data = dataclasses.replace(config, split_combined_rate=1.0, fim_rate=1.0)
    rows: list[np.ndarray] = []

    def evaluate(_, batch) -> tuple[float, float]:
        real = np.asarray(batch.loss_mask, bool)
        rows.extend(tokens[mask][1:] for tokens, mask in zip(np.asarray(batch.tokens), real, strict=True))
        return 0.0, targets(batch).weights.sum()

    trainer = types.SimpleNamespace(mesh=make_mesh(ParallelConfig()), evaluate=evaluate, padded_rows=lambda rows: rows)
    assert HeldoutEvaluator(experiment(config.sources[0].path, data=data), trainer, tokenizer)(None, complete=True)
    framed = [
        np.array([tokenizer.bos_id, *tokenizer.encode(document.text), tokenizer.eos_id])
        for document in heldout_documents(data)
    ]
    np.testing.assert_array_equal(np.concatenate(rows), np.concatenate(framed)[1:])
    assert combined.is_combined[np.concatenate(rows)].sum() > 5
