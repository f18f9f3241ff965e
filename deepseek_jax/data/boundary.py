"""Random splitting of combined tokens, against the token boundary bias (section 4.1 of the technical report).

Tokens of punctuation with the newlines after it compress well, but a prompt that ends in the punctuation alone then
ends in a token that training hardly saw. So a share of them is split in two at random, in training only.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

import numpy as np

from deepseek_jax.data.tokenizer import Tokenizer


class CombinedTokens:
    """The combined tokens of a vocabulary, and the ways to split each."""

    def __init__(self, tokenizer: Tokenizer):
        self.splits: dict[int, list[np.ndarray]] = {}
        """By token: each way to split it between two characters, as the tokens int32 of both halves."""
        for token, piece in enumerate(tokenizer.token_bytes):
            if token not in tokenizer.special_ids and (text := _combined(piece)) is not None:
                self.splits[token] = list(_ways(text, tokenizer))
        self.is_combined = np.zeros(tokenizer.vocab_size, bool)
        """bool `[vocab_size]`"""
        self.is_combined[[token for token, ways in self.splits.items() if ways]] = True

    def split(self, tokens: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
        """`tokens` int32 `[n]` with each combined token split with probability `rate`; the text stays the same."""
        places = np.flatnonzero(self.is_combined[tokens])
        places = places[rng.random(len(places)) < rate]
        if len(places) == 0:
            return tokens
        pieces, start = [], 0
        for place in places.tolist():
            ways = self.splits[int(tokens[place])]
            pieces += [tokens[start:place], ways[rng.integers(len(ways))]]
            start = place + 1
        return np.concatenate([*pieces, tokens[start:]])


def _combined(piece: bytes) -> str | None:
    """The text of a token that is punctuation and then newlines, or None."""
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return None
    marks = text.rstrip("\r\n").removeprefix(" ")
    is_combined = marks and text[-1] in "\r\n" and all(unicodedata.category(mark)[0] in "PS" for mark in marks)
    return text if is_combined else None


def _ways(text: str, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    for place in range(1, len(text)):
        halves = np.concatenate(tokenizer.encode_batch([text[:place], text[place:]]))
        if b"".join(tokenizer.token_bytes[i] for i in halves) == text.encode():  # some vocabularies change a text
            yield halves
