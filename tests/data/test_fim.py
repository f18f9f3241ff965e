from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from deepseek_jax.data.fim import cut, rearrange, restore

any_text = st.text(alphabet=st.characters(codec="utf-8"), max_size=100)


@given(text=any_text, seed=st.integers(0, 1000))
def test_cut_keeps_every_character(text, seed):
    assert "".join(cut(text, np.random.default_rng(seed))) == text


@given(text=any_text, seed=st.integers(0, 1000))
def test_psm_order_restores_to_the_text(tokenizer, text, seed):
    tokens = rearrange(text, tokenizer, np.random.default_rng(seed))
    prefix, middle, suffix = cut(text, np.random.default_rng(seed))
    hole, end = tokens.tolist().index(tokenizer.fim_hole_id), tokens.tolist().index(tokenizer.fim_end_id)
    assert tokens[0] == tokenizer.fim_begin_id
    assert tokenizer.decode(tokens[1:hole]) == prefix
    assert tokenizer.decode(tokens[hole + 1 : end]) == suffix
    assert tokenizer.decode(tokens[end + 1 :]) == middle
    assert tokenizer.decode(restore(tokens, tokenizer)) == text
    assert tokens.dtype == np.int32


def test_plain_tokens_restore_to_themselves(tokenizer):
    tokens = tokenizer.encode("as it was")
    np.testing.assert_array_equal(restore(tokens, tokenizer), tokens)


def test_cuts_reach_both_ends():
    rng = np.random.default_rng(0)
    cuts = [cut("abc", rng) for _ in range(300)]
    assert {("", "abc", ""), ("abc", "", ""), ("", "", "abc"), ("a", "b", "c")} <= set(cuts)
