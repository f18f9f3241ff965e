from __future__ import annotations

import json

import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers
from hypothesis import example, given

from deepseek_jax.config import ConfigError
from deepseek_jax.data import DataError, Tokenizer, check_vocab, train_tokenizer
from deepseek_jax.data.boundary import CombinedTokens
from tests.data.conftest import document_text

any_text = st.text(alphabet=st.characters(codec="utf-8"), max_size=200)


@given(text=any_text)
@example(text="a\r\n\r\n\t b\u2028\x00 \u200d 👩‍👩‍👧 e\u0301\ufeff ﷽ 1234567 ...\n\n\n  x")
@example(text="<｜end▁of▁sentence｜><think>")
def test_round_trip_is_lossless_and_text_makes_no_special_token(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.int32
    assert tokenizer.decode(tokens) == text
    assert not set(tokens.tolist()) & tokenizer.special_ids
    assert tokenizer.byte_lengths[tokens].sum() == len(text.encode())


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    letters = tokenizer._backend.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in letters]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12345678", ["123", "456", "78"]),
        ("x = y1234", ["x", " =", " y", "123", "4"]),
        ("if a:\n\n    b", ["if", " a", ":\n\n", "   ", " b"]),
        ("self.append(item)", ["self", ".append", "(item", ")"]),
        ("f(); // no\n", ["f", "();", " //", " no", "\n"]),
        ("say 你好world", ["say", " ", "你好", "world"]),
    ],
)
def test_text_is_cut_as_deepseek_v3_cuts_it(tokenizer, text, expected):
    assert pieces(tokenizer, text) == expected


def test_training_is_deterministic_and_keeps_to_the_size(tokenizer):
    again = train_tokenizer((document_text(i) for i in range(60)), vocab_size=400)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert again.vocab_size == 400
    assert train_tokenizer(["other text " * 9], vocab_size=300).fingerprint() != tokenizer.fingerprint()


def test_specials_come_first_with_the_official_names(tokenizer):
    ids = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.fim_begin_id]
    assert ids == [0, 1, 2, 3]
    assert tokenizer.decode([0, 1], skip_specials=False) == "<｜begin▁of▁sentence｜><｜end▁of▁sentence｜>"
    assert tokenizer.decode([0, *tokenizer.encode("hi").tolist(), 1], skip_specials=True) == "hi"
    assert len(tokenizer.special_ids) == 16


def test_save_and_load_give_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    for path in (tmp_path / "tokenizer.json", str(tmp_path)):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint() == tokenizer.fingerprint()
        np.testing.assert_array_equal(loaded.encode("x = 12345:\n\n"), tokenizer.encode("x = 12345:\n\n"))


def word_tokenizer(*specials: str) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    backend.add_special_tokens(list(specials))
    return backend


def test_specials_are_found_under_the_names_of_other_families(tmp_path):
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>")
    word_tokenizer(*names).save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    ids = (loaded.bos_id, loaded.eos_id, loaded.fim_begin_id, loaded.fim_hole_id, loaded.fim_end_id)
    assert ids == (0, 1, 2, 3, 4)
    assert loaded.pad_id == loaded.eos_id


def test_sentencepiece_style_vocabulary_has_its_bytes():
    vocab = {"▁a": 0, "<0xC3>": 1, "</s>": 2}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.add_special_tokens(["</s>"])
    assert Tokenizer(backend).token_bytes == (b" a", b"\xc3", b"</s>")


def test_missing_specials_are_named(tmp_path):
    with pytest.raises(DataError, match=r"lacks the special token eos \(<｜end▁of▁sentence｜> or .*\); every document"):
        Tokenizer(word_tokenizer("<s>"))
    only_eos = Tokenizer(word_tokenizer("</s>"), "mine.json")
    with pytest.raises(DataError, match=r"^mine\.json: .* fim_begin .*, fim_end .*; turn it off$"):
        only_eos.require_specials("fim_begin", "fim_end", reason="turn it off")


@pytest.mark.parametrize("content", ["{not json", json.dumps({"model": {"type": "??"}}), ""])
def test_unreadable_tokenizer_is_an_error(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json: is not a Hugging Face tokenizer\.json \("):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_missing_tokenizer_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.json: no such tokenizer file"):
        Tokenizer.load(tmp_path / "nowhere.json")


def test_vocabulary_must_fit_the_model(tokenizer):
    check_vocab(tokenizer, 400)
    with pytest.raises(ConfigError, match=r"has 400 tokens, and model\.vocab_size is 399; raise model\.vocab_size"):
        check_vocab(tokenizer, 399)


def test_combined_tokens_are_punctuation_then_newlines(tokenizer):
    combined = CombinedTokens(tokenizer)
    texts = {tokenizer.token_bytes[i].decode() for i in np.flatnonzero(combined.is_combined)}
    assert ":\n" in texts
    assert ".\n\n" in texts
    assert not [t for t in texts if t.strip("\r\n ").isalnum() or not t.endswith("\n")]


@given(number=st.integers(0, 59), rate=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 9))
def test_splitting_combined_tokens_keeps_the_text(tokenizer, number, rate, seed):
    combined = CombinedTokens(tokenizer)
    tokens = tokenizer.encode(document_text(number))
    split = combined.split(tokens, rate, np.random.default_rng(seed))
    assert tokenizer.decode(split) == document_text(number)
    before = combined.is_combined[tokens].sum()
    assert len(split) >= len(tokens) + (before if rate == 1 else 0)
    if rate == 0:
        np.testing.assert_array_equal(split, tokens)


def test_about_the_asked_share_is_split(tokenizer):
    combined = CombinedTokens(tokenizer)
    token = int(np.flatnonzero(combined.is_combined)[0])
    split = combined.split(np.full(10_000, token, np.int32), 0.1, np.random.default_rng(0))
    assert (split == token).sum() == pytest.approx(9000, abs=150)
