"""Fill-in-the-middle at document level, before packing (section 4.1 of the technical report).

A chosen document is cut at two places into prefix, middle and suffix and written as PSM:
begin, prefix, hole, suffix, end, middle, end of sentence. The cuts fall between characters, not tokens, so that the
model meets pieces that begin in the middle of a token, as an editor's cursor leaves them; each part is tokenized alone.
"""

from __future__ import annotations

import numpy as np

from deepseek_jax.data.tokenizer import FIM_NAMES, Tokenizer


def check_fim(tokenizer: Tokenizer) -> None:
    """Raises `DataError` if `tokenizer` lacks a fill-in-the-middle token."""
    tokenizer.require_specials(*FIM_NAMES, reason="add it, or set data.fim_rate=0")


def cut(text: str, rng: np.random.Generator) -> tuple[str, str, str]:
    """Prefix, middle and suffix of `text`: two places drawn evenly among its characters' borders. Any may be empty."""
    first, second = sorted(rng.integers(0, len(text) + 1, size=2).tolist())
    return text[:first], text[first:second], text[second:]


def rearrange(text: str, tokenizer: Tokenizer, rng: np.random.Generator) -> np.ndarray:
    """PSM tokens of `text`, int32 `[n]`, without beginning and end of sentence."""
    prefix, middle, suffix = tokenizer.encode_batch(cut(text, rng))
    begin, hole, end = ([getattr(tokenizer, f"{name}_id")] for name in FIM_NAMES)
    return np.concatenate([begin, prefix, hole, suffix, end, middle]).astype(np.int32)


def restore(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Undoes `rearrange`: tokens int32 `[n − 3]` in the order of the text. Others come back as they are."""
    if len(tokens) == 0 or tokens[0] != tokenizer.fim_begin_id:
        return tokens
    hole = int(np.flatnonzero(tokens == tokenizer.fim_hole_id)[0])
    end = int(np.flatnonzero(tokens == tokenizer.fim_end_id)[0])
    return np.concatenate([tokens[1:hole], tokens[end + 1 :], tokens[hole + 1 : end]])
