"""Generation: prompts in, tokens out, one compiled prefill and one compiled loop per batch.

The host waits once per batch, for the finished tokens. Shapes are rounded up to buckets, and compiled programs are
shared by all models of one architecture, so a training loop that samples now and then compiles once.
"""

from __future__ import annotations

import collections
import functools
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from deepseek_jax.inference.binding import bind, bind_canonical
from deepseek_jax.inference.cache import LatentCache
from deepseek_jax.inference.chat import ChatError, Message
from deepseek_jax.inference.forward import decode_step, extend, prefill
from deepseek_jax.inference.language_model import LanguageModel
from deepseek_jax.inference.sampling import Sampling, draw, greedy
from deepseek_jax.model.transformer import Transformer

__all__ = ["Generator", "Sampling", "bind", "bind_canonical", "decode_step", "extend", "generate", "prefill"]

_TOKEN_STEP = 64
"""Prompt and cache lengths are multiples of at least this, so that few shapes are compiled."""


class Generator:
    """A model made ready to generate: checks prompts, batches them, runs the compiled functions."""

    def __init__(self, model: Transformer, *, capacity: int | None = None, max_batch: int = 64):
        """Takes a bound model.

        Args:
          model: with arrays for weights; they are used as they are, and the cache has the embedding's dtype.
          capacity: the most tokens a prompt and its continuation may have together; None sets no limit.
          max_batch: prompts that run at once; more are taken in turn.
        """
        self.config, self.capacity, self.max_batch = model.config, capacity, max_batch
        self._graphdef, state = nnx.split(model)
        self._weights = nnx.to_pure_dict(state)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop_ids: Collection[int] = (),
    ) -> list[list[int]]:
        """Continues each prompt; see the function `generate`."""
        prompts = [[int(token) for token in prompt] for prompt in prompts]
        self._check(prompts, max_new_tokens, stop_ids)
        identities = _identities(prompts)
        outputs: list[list[int]] = []
        for start in range(0, len(prompts), self.max_batch):
            part = slice(start, start + self.max_batch)
            outputs += self._batch(prompts[part], identities[part], max_new_tokens, sampling or Sampling(), stop_ids)
        return outputs

    def _batch(self, prompts, identities, max_new_tokens, sampling, stop_ids) -> list[list[int]]:
        longest = max(map(len, prompts))
        rows = 1 << (len(prompts) - 1).bit_length()
        tokens = np.zeros((rows, bucket(longest)), np.int32)
        lengths = np.ones(rows, np.int32)
        identity = np.zeros((rows, 2), np.uint32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
            lengths[row] = len(prompt)
            identity[row] = identities[row]
        stops = np.full(-(-len(stop_ids) // 4) * 4, -1, np.int32)
        stops[: len(stop_ids)] = sorted(stop_ids)
        capacity = max(bucket(longest + max_new_tokens), tokens.shape[1])
        logits, cache = _prefill(self._graphdef, self._weights, tokens, lengths, capacity=capacity)
        request = _Request(
            identity=identity,
            active=np.arange(rows) < len(prompts),
            stops=stops,
            max_new_tokens=np.int32(max_new_tokens),
            temperature=np.float32(sampling.temperature),
            top_p=np.float32(sampling.top_p),
            seed=np.uint32(sampling.seed),
        )
        new, counts, _ = _decode(self._graphdef, self._weights, logits, cache, request, greedily=sampling.greedy)
        new, counts = jax.device_get((new, counts))
        return [new[row, lengths[row] :][: counts[row]].tolist() for row in range(len(prompts))]

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Collection[int]) -> None:
        vocab_size = self.config.vocab_size
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        for token in stop_ids:
            if not 0 <= token < vocab_size:
                raise ValueError(f"stop id {token} is outside the model's vocabulary of {vocab_size}")
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {i} is empty; begin it with a token, for example the tokenizer's eos_id")
            for token in prompt:
                if not 0 <= token < vocab_size:
                    raise ValueError(f"prompt {i} holds token {token}, outside the model's vocabulary of {vocab_size}")
            needed = len(prompt) + max_new_tokens
            if self.capacity is not None and needed > self.capacity:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens and needs {needed} with max_new_tokens={max_new_tokens}; "
                    f"the capacity is {self.capacity}"
                )


def generate(
    model: Transformer | LanguageModel,
    prompts: str | Sequence[str] | Sequence[Sequence[int]] | Sequence[Message] | Sequence[Sequence[Message]],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] | None = None,
) -> Any:
    """Continues each prompt by at most `max_new_tokens` tokens.

    What a prompt gets does not depend on its batch mates. The draws of a prompt follow from the seed, the prompt
    and, where the same prompt is given several times, from which of them it is: so these differ from each other.

    Args:
      model: from `load`, or a bound one from `create`, which knows no text.
      prompts: a text, a conversation (`[{"role": "user", "content": "…"}]`), or several texts, conversations or lists
        of token ids, none empty; lengths may differ.
      max_new_tokens: at least 1.
      sampling: default: greedy.
      stop_ids: a continuation ends with the first of these, which is its last token, and a text before it; None takes
        the model's own.

    Returns:
      What is new, without the prompt: a text for a text or a conversation, token ids for token ids; a list of them
      where several prompts were given.

    Raises:
      ValueError: an empty prompt, a token outside the vocabulary, no token to generate.
      ChatError: text for a model without a tokenizer, a conversation for one without a chat template or that its
        template cannot render.
    """
    if isinstance(prompts, Mapping):
        raise ChatError("a conversation is a list of messages, and this is one message: put it into a list")
    if not isinstance(prompts, str) and len(prompts) > 0 and isinstance(prompts[0], int | np.integer):
        raise ValueError("prompts are several, and this is one of token ids: put it into a list, [[1, 2, 3]]")
    single = isinstance(prompts, str) or _is_conversation(prompts)
    batch: list[Any] = [prompts] if single else list(prompts)
    of_text = [isinstance(prompt, str) or _is_conversation(prompt) for prompt in batch]
    speaker = model if isinstance(model, LanguageModel) else LanguageModel(model)
    tokens = [speaker.encode(one) if text else one for one, text in zip(batch, of_text, strict=True)]
    stop_ids = speaker.stop_ids if stop_ids is None else stop_ids
    outputs = Generator(speaker.model).generate(
        tokens, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=stop_ids
    )
    answers = [
        speaker.decode(output[:-1] if output[-1] in stop_ids else output) if text else output
        for output, text in zip(outputs, of_text, strict=True)
    ]
    return answers[0] if single else answers


def _is_conversation(prompt: Any) -> bool:
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def bucket(length: int, step: int = _TOKEN_STEP) -> int:
    """`length` rounded up to a multiple of `step`, from 8 steps on so that there are 4 to 8 sizes per doubling."""
    step = max(step, 1 << max((length - 1).bit_length() - 3, 0))
    return -(-length // step) * step


class _Request(NamedTuple):
    """What the decode loop is told, all of it as arrays: none of it makes a new program, but for shapes."""

    identity: Any
    """uint32 `[B, 2]`: a hash of the prompt, and how many equal ones stand before it."""
    active: Any
    """bool `[B]`: False for rows that fill up the batch."""
    stops: Any
    """int32 `[n]`, filled up with −1."""
    max_new_tokens: Any
    temperature: Any
    top_p: Any
    seed: Any


def _identities(prompts: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    seen: collections.Counter[tuple[int, ...]] = collections.Counter()
    identities = []
    for prompt in prompts:
        identities.append((zlib.crc32(np.asarray(prompt, np.int32).tobytes()), seen[tuple(prompt)]))
        seen[tuple(prompt)] += 1
    return identities


@functools.partial(jax.jit, static_argnames=("graphdef", "capacity"))
def _prefill(graphdef, weights, tokens, lengths, *, capacity: int):
    model = nnx.merge(graphdef, weights)
    cache = LatentCache.empty(model.config, tokens.shape[0], capacity, model.embedding.weight[...].dtype)
    return prefill(model, tokens, lengths, cache)


@functools.partial(jax.jit, static_argnames=("graphdef", "greedily"), donate_argnames=("cache",))
def _decode(graphdef, weights, logits, cache: LatentCache, request: _Request, *, greedily: bool):
    """Goes on from the logits after the prompts, until every row has stopped.

    Returns tokens int32 `[B, T]`, each row's new ones from its prompt's length on, their number int32 `[B]`, and the
    cache, which takes the place of the one given.
    """
    model = nnx.merge(graphdef, weights)
    rows = jnp.arange(logits.shape[0])

    def row_key(identity):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(request.seed), identity[0]), identity[1])

    keys = jax.vmap(row_key)(request.identity)

    def choose(step, logits, cache, tokens, counts, done):
        """Draws a token for every row; finished rows draw too, and what they draw is not counted."""
        if greedily:
            token = greedy(logits)
        else:
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
            token = draw(logits, step_keys, request.temperature.astype(logits.dtype), request.top_p)
        tokens = tokens.at[rows, cache.lengths].set(token)
        counts = counts + ~done
        return step + 1, token, cache, tokens, counts, done | jnp.isin(token, request.stops)

    def unfinished(carry):
        step, *_, done = carry
        return (step < request.max_new_tokens) & ~done.all()

    def advance(carry):
        step, token, cache, tokens, counts, done = carry
        logits, cache = decode_step(model, cache, token)
        return choose(step, logits, cache, tokens, counts, done)

    tokens = jnp.zeros((logits.shape[0], cache.capacity), jnp.int32)
    carry = choose(jnp.int32(0), logits, cache, tokens, jnp.zeros_like(cache.lengths), ~request.active)
    _, _, cache, tokens, counts, _ = lax.while_loop(unfinished, advance, carry)
    return tokens, counts, cache
