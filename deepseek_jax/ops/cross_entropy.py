"""Cross entropy in chunks of tokens: logits of the whole batch never exist, forward or backward.

Shape letters: T tokens, D model, V vocabulary (of this shard).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.ops.implementation import accumulator, choose

_CHUNK = 1024


def cross_entropy(hidden, head, labels, *, vocab_size=None, chunk=None, implementation=None):
    """Negative log likelihood of each label, `[T]`, float32 or wider."""
    name = choose("cross_entropy", implementation, {"chunked": None, "reference": None})
    if name == "reference":
        acc = accumulator(hidden, head)
        logits = hidden.astype(acc) @ head[:, :vocab_size].astype(acc)
        return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]
    top, total, label = vocab_partials(hidden, head, labels, 0, vocab_size=vocab_size, chunk=chunk)
    return jnp.log(total) + top - label


def vocab_partials(hidden, head, labels, vocab_offset=0, *, vocab_size=None, chunk=None):
    """Maximum, sum of exponentials relative to it, and label logit of one vocabulary shard, each `[T]`."""
    return _partials(hidden, head, labels, jnp.asarray(vocab_offset, jnp.int32), vocab_size, chunk or _CHUNK)


def _chunks(x, chunk):
    tokens = x.shape[0]
    chunk = min(chunk, tokens)
    pad = -tokens % chunk
    return jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1)).reshape(-1, chunk, *x.shape[1:])


def _logits(hidden, head, offset, vocab_size):
    logits = jnp.dot(hidden, head, preferred_element_type=accumulator(hidden, head))
    if vocab_size is not None:
        logits = jnp.where(offset + jnp.arange(head.shape[1]) < vocab_size, logits, -jnp.inf)
    return logits


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _partials(hidden, head, labels, offset, vocab_size, chunk):
    return _forward(hidden, head, labels, offset, vocab_size, chunk)[0]


def _forward(hidden, head, labels, offset, vocab_size, chunk):
    def one(_, inputs):
        hidden, labels = inputs
        logits = _logits(hidden, head, offset, vocab_size)
        top = jnp.maximum(logits.max(-1), -1e30)
        total = jnp.exp(logits - top[:, None]).sum(-1)
        local = labels - offset
        inside = (local >= 0) & (local < head.shape[1])
        label = jnp.take_along_axis(logits, jnp.where(inside, local, 0)[:, None], -1)[:, 0]
        return None, (top, total, jnp.where(inside, label, 0))

    _, parts = lax.scan(one, None, (_chunks(hidden, chunk), _chunks(labels, chunk)))
    top, total, label = (x.reshape(-1)[: hidden.shape[0]] for x in parts)
    return (top, total, label), (hidden, head, labels, offset, top)


def _backward(vocab_size, chunk, residuals, cotangents):
    hidden, head, labels, offset, top = residuals
    _, dtotal, dlabel = cotangents

    def one(dhead, inputs):
        hidden, labels, top, dtotal, dlabel = inputs
        logits = _logits(hidden, head, offset, vocab_size)
        onehot = (labels - offset)[:, None] == jnp.arange(head.shape[1])
        dlogits = dtotal[:, None] * jnp.exp(logits - top[:, None]) + jnp.where(onehot, dlabel[:, None], 0)
        dhidden = jnp.dot(dlogits, head.T, preferred_element_type=logits.dtype)
        return dhead + jnp.dot(hidden.T, dlogits, preferred_element_type=logits.dtype), dhidden.astype(hidden.dtype)

    zero = jnp.zeros_like(head, accumulator(hidden, head))
    inputs = tuple(_chunks(x, chunk) for x in (hidden, labels, top, dtotal, dlabel))
    dhead, dhidden = lax.scan(one, zero, inputs)
    return dhidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]], dhead.astype(head.dtype), None, None


_partials.defvjp(_forward, _backward)
