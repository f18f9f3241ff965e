"""Byte-level BPE: trained here, or any Hugging Face `tokenizer.json`.

Text is cut into pieces before merges are learned, as DeepSeek-V3's tokenizer cuts it: digits in groups of at most
three; East Asian script apart from the rest; a word with the one blank or punctuation mark before it; a run of
punctuation with the newlines after it. No merge crosses a piece. Bytes are the alphabet, so every text has tokens and
comes back from them byte for byte.

A file from elsewhere is used as it is, but for two things. Tokens with the names below are special, also where it marks
them as words. And the blank that Llama's kind puts before a text is left out: a text's tokens are those of the text as
it stands, as are those of each part into which fill-in-the-middle cuts it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers
from absl import logging
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, trainers

from deepseek_jax.config import ConfigError
from deepseek_jax.data.config import NUM_SPECIAL_TOKENS
from deepseek_jax.data.errors import DataError
from deepseek_jax.paths import user_path, write_aside

# Spellings by which a special token is found, the official one first. Later ones are those of other model families.
SPECIAL_NAMES = {
    "bos": ("<｜begin▁of▁sentence｜>", "<|begin_of_sentence|>", "<s>", "<bos>", "<|begin_of_text|>", "[BOS]"),
    "eos": (
        "<｜end▁of▁sentence｜>",
        *("<|end_of_sentence|>", "</s>", "<eos>", "<|end_of_text|>", "[EOS]", "<|endoftext|>"),
    ),
    "pad": ("<｜▁pad▁｜>", "<|_pad_|>", "<pad>", "<|pad|>", "[PAD]"),
    "fim_begin": ("<｜fim▁begin｜>", "<|fim_begin|>", "<|fim_prefix|>", "<fim_prefix>"),
    "fim_hole": ("<｜fim▁hole｜>", "<|fim_hole|>", "<|fim_suffix|>", "<fim_suffix>"),
    "fim_end": ("<｜fim▁end｜>", "<|fim_end|>", "<|fim_middle|>", "<fim_middle>"),
    "user": ("<｜User｜>", "<|User|>"),
    "assistant": ("<｜Assistant｜>", "<|Assistant|>"),
    "think_begin": ("<think>",),
    "think_end": ("</think>",),
}
FIM_NAMES = ("fim_begin", "fim_hole", "fim_end")

_MARKUP = re.compile(r"<[|｜].+[|｜]>", re.DOTALL)
"""What marks a part of a text for the model, and is written by nobody else."""

_DIGITS = r"\p{N}{1,3}"
_EAST_ASIAN = r"[\p{Han}\p{Hiragana}\p{Katakana}]+"
_PIECES = "|".join(
    (
        r"[!-/:-@\[-`{-~][A-Za-z]+",  # one ASCII mark and the word after it: .append
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",  # a word and the blank before it
        r" ?[\p{P}\p{S}]+[\r\n]*",  # punctuation and the newlines after it: the combined tokens
        r"\s*[\r\n]+",
        r"\s+(?!\S)",  # blanks, but for the one that belongs to the next word
        r"\s+",
    )
)


class Tokenizer:
    """Text to tokens and back. Text never turns into a special token: whoever wants one places its id.

    Ids of special tokens are None where the vocabulary lacks the token.
    """

    vocab_size: int
    """One more than the largest id."""
    eos_id: int
    pad_id: int
    """The end of sentence's where there is no token for padding."""
    bos_id: int | None
    fim_begin_id: int | None
    fim_hole_id: int | None
    fim_end_id: int | None
    user_id: int | None
    assistant_id: int | None
    think_begin_id: int | None
    think_end_id: int | None

    def __init__(self, backend: tokenizers.Tokenizer, name: str = "tokenizer"):
        """Raises `DataError` if `backend` has no end-of-sentence token."""
        self.name = name
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend = _without_added_blank(backend)
        self._content = backend.to_str(pretty=True)  # before names become special: what a run saved stays the same file
        backend.encode_special_tokens = True  # "<|…|>" written in a document is text like any other
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        for role, spellings in SPECIAL_NAMES.items():
            found = next((s for s in spellings if backend.token_to_id(s) is not None), None)
            setattr(self, f"{role}_id", None if found is None else backend.token_to_id(found))
            if found is not None:  # many files mark User, <think> and others as words, which text would turn into
                backend.add_special_tokens([found])
        # Markup that the file calls words, as DeepSeek's calls its tools': no text may turn into it either.
        words = [t.content for t in backend.get_added_tokens_decoder().values() if not t.special]
        backend.add_special_tokens([word for word in words if _MARKUP.fullmatch(word)])
        self.require_specials("eos", reason="every document ends with it")
        if self.pad_id is None:
            self.pad_id = self.eos_id  # padding is masked from the loss, so any id will do

    @classmethod
    def load(cls, path: epath.PathLike) -> Tokenizer:
        """Reads a `tokenizer.json`, or the one in a folder. Raises `DataError` if it cannot be used."""
        path = user_path(path, "the tokenizer")
        if path.is_dir():
            path = path / "tokenizer.json"
        if not path.exists():
            raise DataError(f"{path}: no such tokenizer file")
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises a plain Exception
            raise DataError(f"{path}: is not a Hugging Face tokenizer.json ({error})") from None
        return cls(backend, str(path))

    def save(self, path: epath.PathLike) -> None:
        """Writes a `tokenizer.json` that `load` and Hugging Face's tools read."""
        write_aside(user_path(path, "the tokenizer"), self._content)

    def require_specials(self, *roles: str, reason: str) -> None:
        """Raises `DataError` that names which of the special tokens `roles` the vocabulary lacks."""
        missing = [role for role in roles if getattr(self, f"{role}_id") is None]
        if missing:
            spellings = ", ".join(f"{role} ({' or '.join(SPECIAL_NAMES[role][:2])})" for role in missing)
            raise DataError(f"{self.name}: the vocabulary lacks the special token {spellings}; {reason}")

    def encode(self, text: str) -> np.ndarray:
        """Tokens of `text`, int32 `[n]`, no special token among them."""
        # A batch of one lets go of Python's lock while it works and skips the offsets: faster than `encode`.
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Tokens of each text, int32 `[n]`, on all cores."""
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in encoded]

    def encode_prompt(self, text: str) -> list[int]:
        """Tokens of a text to be continued: with what the file puts around a text, often a beginning of sentence."""
        return list(self._backend.encode(text, add_special_tokens=True).ids)

    def encode_markup(self, text: str) -> list[int]:
        """Tokens of a text that was written for the model, such as a chat template's: names of special tokens stand for
        them. Never for documents.
        """
        return list(self._with_markup.encode(text, add_special_tokens=False).ids)

    @functools.cached_property
    def _with_markup(self) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = False
        return backend

    def decode(self, tokens: Iterable[int], *, skip_specials: bool = False) -> str:
        """Text of `tokens`; bytes that are no UTF-8 (a character cut in two) become U+FFFD."""
        table, special = self.token_bytes, self.special_ids
        ids = (int(token) for token in tokens)
        pieces = [table[i] for i in ids if 0 <= i < self.vocab_size and not (skip_specials and i in special)]
        return b"".join(pieces).decode("utf-8", errors="replace")

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of all special tokens: those that the file marks, and those of `SPECIAL_NAMES`."""
        return frozenset(i for i, token in self._backend.get_added_tokens_decoder().items() if token.special)

    @functools.cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """The bytes of each token by id; a special token's are its name."""
        spec = json.loads(self._content)
        added = self._backend.get_added_tokens_decoder()
        to_bytes = _byte_level_bytes if "ByteLevel" in json.dumps(spec.get("decoder")) else _sentencepiece_bytes
        table = [b""] * self.vocab_size
        for token, i in self._backend.get_vocab(with_added_tokens=True).items():
            table[i] = added[i].content.encode() if i in added else to_bytes(token)
        return tuple(table)

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """int32 `[vocab_size]`: bytes of text that a token stands for; 0 for special tokens."""
        lengths = [0 if i in self.special_ids else len(piece) for i, piece in enumerate(self.token_bytes)]
        return np.array(lengths, np.int32)

    def fingerprint(self) -> str:
        """A hash of all that decides how text becomes tokens: equal fingerprints, equal tokens."""
        content = json.dumps(json.loads(self._content), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE of `vocab_size` tokens, special ones included; the same texts give the same tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_DIGITS), "isolated"),
            pre_tokenizers.Split(tokenizers.Regex(_EAST_ASIAN), "isolated"),
            pre_tokenizers.Split(tokenizers.Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_special_tokens(),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = Tokenizer(backend, "the trained tokenizer")
    if tokenizer.vocab_size < vocab_size:
        logging.warning("the text has only %d different pieces for %d tokens", tokenizer.vocab_size, vocab_size)
    return tokenizer


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises `ConfigError` unless a model with `vocab_size` rows of embedding has one for every token."""
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"{tokenizer.name} has {tokenizer.vocab_size} tokens, and model.vocab_size is {vocab_size}; "
            f"raise model.vocab_size to at least {tokenizer.vocab_size}, or use a smaller vocabulary"
        )


def _special_tokens() -> list[str]:
    names = [spellings[0] for spellings in SPECIAL_NAMES.values()]
    return names + [f"<｜place▁holder▁no▁{i}｜>" for i in range(NUM_SPECIAL_TOKENS - len(names))]


def _without_added_blank(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """`backend`, or a copy that puts no blank before a text; its decoder, which other tools use, then strips none."""
    spec = json.loads(backend.to_str())
    plain = {**spec, "normalizer": _plain(spec["normalizer"]), "pre_tokenizer": _plain(spec["pre_tokenizer"])}
    if plain == spec:
        return backend
    plain["decoder"] = _plain(spec["decoder"])
    return tokenizers.Tokenizer.from_str(json.dumps(plain))


def _plain(part: Any) -> Any:
    """A step of a tokenizer.json without what adds a blank before the text, or strips it from there."""
    match part:
        case {"type": "Sequence"}:
            (key,) = part.keys() - {"type"}
            return {**part, key: [step for step in map(_plain, part[key]) if step is not None]}
        case {"type": "Prepend", "prepend": "▁" | " "}:
            return None
        case {"type": "Metaspace"}:
            return {**part, "prepend_scheme": "never"}
        case {"type": "ByteLevel", "add_prefix_space": True}:
            return {**part, "add_prefix_space": False}
        case {"type": "Strip", "content": " "}:
            return {**part, "start": 0}
    return part


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    """Byte-level BPE writes bytes as letters: printable ones as themselves, the others from U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _byte_level_bytes(token: str) -> bytes:
    table = _byte_of_letter()
    return bytes(table[letter] for letter in token) if all(c in table for c in token) else token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()
