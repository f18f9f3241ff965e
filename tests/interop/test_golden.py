"""Folders that Hugging Face's code wrote, and what it computes from them, kept as files: no PyTorch is needed here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import deepseek_jax

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("v3", "v2")


def expected(family: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / family / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request) -> tuple[deepseek_jax.LanguageModel, dict[str, np.ndarray]]:
    model = deepseek_jax.load(GOLDEN / request.param, dtype=np.float32, progress=False)
    return model, expected(request.param)


def test_logits_are_those_of_transformers(case):
    model, wanted = case
    logits = np.asarray(model(wanted["tokens"]))
    for row, length in enumerate(wanted["lengths"]):
        theirs = wanted["logits"][row, :length]
        np.testing.assert_allclose(logits[row, :length], theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def test_greedy_tokens_are_those_of_transformers(case):
    model, wanted = case
    prompts = [row[:length].tolist() for row, length in zip(wanted["tokens"], wanted["lengths"], strict=True)]
    count = wanted["greedy"].shape[1]
    assert deepseek_jax.generate(model, prompts, max_new_tokens=count, stop_ids=()) == wanted["greedy"].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_small_and_is_what_the_test_above_assumes(family):
    files = {file.name: file.stat().st_size for file in (GOLDEN / family).iterdir()}
    assert files.keys() == {"config.json", "model.safetensors", "expected.npz"}
    assert sum(files.values()) < 150_000
    wanted = expected(family)
    assert len(set(wanted["lengths"].tolist())) == len(wanted["tokens"]) == 3
    assert min(len(set(row.tolist())) for row in wanted["greedy"]) >= 8
