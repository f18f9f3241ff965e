"""A model together with its tokenizer: text in, text out."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import ModelConfig
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference.chat import ChatError, ChatTemplate, Message, check_text, conversation_tokens
from deepseek_jax.model.transformer import Transformer


class LanguageModel:
    """What `deepseek_jax.load` returns: call it on tokens for logits, give it to `generate` for text."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        chat_template: ChatTemplate | None = None,
        *,
        stop_ids: Collection[int] = (),
        add_bos: bool = False,
        name: str = "this model",
    ):
        """Puts together a bound model and what it speaks with.

        `stop_ids` are the tokens that end its answers; `add_bos` puts a beginning of sentence before a plain text.
        """
        self.model, self.chat_template, self.stop_ids, self.name = model, chat_template, tuple(stop_ids), name
        self._tokenizer, self._add_bos = tokenizer, add_bos

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return self.model.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises `ChatError` if there is none."""
        if self._tokenizer is None:
            raise ChatError(f"{self.name} came without a tokenizer.json: give prompts as lists of token ids")
        return self._tokenizer

    def __call__(self, tokens: Any, *, positions: Any = None, segment_ids: Any = None) -> jax.Array:
        """Logits `[B, S, V]` of tokens int32 `[B, S]`, float32 or wider; padding belongs on the right."""
        graphdef, state = nnx.split(self.model)
        return _logits(graphdef, state, jnp.asarray(tokens), positions, segment_ids)

    def encode(self, prompt: str | Sequence[Message]) -> list[int]:
        """A text, or a conversation, as the tokens that the model continues.

        A text gets what the folder says comes before it (DeepSeek's: `<｜begin▁of▁sentence｜>`), and the names of
        special tokens within it are plain text. A conversation goes through the chat template; only what its
        system and its assistant say may name special tokens. Raises `ChatError`.
        """
        if isinstance(prompt, str):
            tokens, bos = self.tokenizer.encode_prompt(check_text(prompt)), self.tokenizer.bos_id
            if self._add_bos and bos is not None and tokens[:1] != [bos]:
                tokens = [bos, *tokens]
            return tokens or [self.tokenizer.eos_id]
        if self.chat_template is None:
            raise ChatError(f"{self.name} came without a chat template: give prompts as text")
        return conversation_tokens(self.chat_template, self.tokenizer, prompt)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of an answer: no special token, but for `<think>` and `</think>`, which part it in two."""
        left_out = self.tokenizer.special_ids - {self.tokenizer.think_begin_id, self.tokenizer.think_end_id}
        return self.tokenizer.decode(token for token in tokens if token not in left_out)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, state, tokens, positions, segment_ids) -> jax.Array:
    return nnx.merge(graphdef, state)(tokens, positions=positions, segment_ids=segment_ids)
