"""Cross entropy in chunks of tokens: the logits of a whole batch never exist, forward or backward.

Shape letters: T tokens, D model width, V vocabulary (of this shard).

A vocabulary may be split over devices. Each then computes the partials of its own shard (`vocab_partials`), and they
join as the largest maximum, the sums rescaled to it and added, the label logits added (all but one are zero). Nothing
here knows of devices: `cross_entropy_sum` is given the function that joins.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.implementation import accumulator, choose

_CHUNK_LOGITS = 2**22  # logits in flight: 16 MiB of float32, up to V = 8192
_MIN_CHUNK = 512  # every chunk adds once to the whole gradient of the head; at V = 129,280 its logits are 252 MiB
_LOWEST = -1e30  # stands in for the maximum of a shard that is all padding

Join = Callable[[Array, Array, Array], tuple[Array, Array, Array]]
"""Maximum, sum and label logit of one shard's tokens, each `[chunk]`, to those of the whole vocabulary."""


def cross_entropy(
    hidden: Array,
    head: Array,
    labels: Array,
    *,
    vocab_size: int | None = None,
    chunk: int | None = None,
    implementation: str | None = None,
) -> Array:
    """Negative log-likelihood of each label under `softmax(hidden @ head)`.

    Args:
      hidden: `[T, D]`, any float dtype.
      head: `[D, V]`.
      labels: `[T]` int32 in `[0, V)`. Elsewhere the result is meaningless: give those tokens the weight zero.
      vocab_size: Real size of the vocabulary; columns of the head from there on are padding, without probability.
      chunk: Tokens whose logits exist at a time; None chooses.
      implementation: "reference" (all logits: an oracle), "chunked" (portable), or None for the best here.

    Returns:
      `[T]`, float32 or wider.

    Raises:
      ValueError: if shapes disagree, or the implementation is unknown or not supported here.
    """
    name = choose("cross_entropy", implementation, {"chunked": None, "reference": None})
    if name == "reference":
        _check(hidden, head, labels, chunk)
        acc = accumulator(hidden, head)
        logits = hidden.astype(acc) @ head[:, :vocab_size].astype(acc)
        return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]
    top, total, label = vocab_partials(hidden, head, labels, 0, vocab_size=vocab_size, chunk=chunk)
    return jnp.log(total) + top - label


def cross_entropy_sum(
    hidden: Array,
    head: Array,
    labels: Array,
    weights: Array,
    vocab_offset: int | Array = 0,
    *,
    join: Join | None = None,
    vocab_size: int | None = None,
    chunk: int | None = None,
) -> Array:
    """`Σ_t weights_t cross_entropy_t`, for training: gradients are made in the forward pass, so logits are made once.

    Of a sum the gradients are known as soon as the logits are, up to the factor that its own cotangent brings; the
    backward pass multiplies by that. Without differentiation only the sum is computed.

    With `join` the head is one shard of a larger one. The sum is then of the whole vocabulary, the gradient of the head
    is the shard's own, and that of hidden is the shard's *part*: the gradient is the sum of the parts over shards.

    Args:
      hidden: `[T, D]`, any float dtype.
      head: `[D, V]`; with `join`, columns `[vocab_offset, vocab_offset + V)` of the whole head.
      labels: `[T]` int32, numbered over the whole vocabulary; a label outside it must have the weight zero.
      weights: `[T]`, float32 or wider; constants, which get no gradient.
      vocab_offset: Scalar, may be traced.
      join: Makes the whole vocabulary's partials of this shard's. Hashable; called once per chunk; not differentiated.
      vocab_size: Real size of the whole vocabulary; columns of the head from there on are padding, without probability.
      chunk: Tokens whose logits exist at a time; None chooses.

    Returns:
      Scalar, float32 or wider.

    Raises:
      ValueError: if shapes disagree or chunk is not positive.
    """
    _check(hidden, head, labels, chunk)
    if weights.shape != labels.shape:
        raise ValueError(f"cross_entropy_sum needs a weight per label, not {weights.shape} for {labels.shape}")
    offset = jnp.asarray(vocab_offset, jnp.int32)
    return _weighted_sum(
        hidden, head, labels - vocab_offset, weights, offset, join, vocab_size, _chunk_size(hidden, head, chunk)
    )


def vocab_partials(
    hidden: Array,
    head: Array,
    labels: Array,
    vocab_offset: int | Array = 0,
    *,
    vocab_size: int | None = None,
    chunk: int | None = None,
) -> tuple[Array, Array, Array]:
    """What one shard of the vocabulary contributes to the cross entropy of each token.

    The maximum is a constant for differentiation: its cotangent is ignored. That is exact wherever the result does not
    depend on it, as in `log(sum_exp) + max - label_logit`, whichever way shards are joined.

    Args:
      hidden: `[T, D]`, any float dtype.
      head: Columns `[vocab_offset, vocab_offset + V)` of the head, `[D, V]`.
      labels: `[T]` int32, numbered over the whole vocabulary.
      vocab_offset: Scalar, may be traced.
      vocab_size: Real size of the whole vocabulary; None means that no column is padding.
      chunk: Tokens whose logits exist at a time; None chooses.

    Returns:
      Maximum logit, sum of `exp(logit - maximum)`, and logit of the label or 0 where another shard has it: each `[T]`,
      float32 or wider.

    Raises:
      ValueError: if shapes disagree or chunk is not positive.
    """
    _check(hidden, head, labels, chunk)
    offset = jnp.asarray(vocab_offset, jnp.int32)
    return _partials(hidden, head, labels - vocab_offset, offset, vocab_size, _chunk_size(hidden, head, chunk))


def _chunk_size(hidden, head, chunk):
    return min(chunk or max(_MIN_CHUNK, _CHUNK_LOGITS // head.shape[1]), hidden.shape[0])


def _check(hidden, head, labels, chunk):
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[0] or labels.shape != hidden.shape[:1]:
        raise ValueError(
            "cross entropy needs hidden [T, D], head [D, V] and labels [T], "
            f"not {hidden.shape}, {head.shape} and {labels.shape}"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"cross entropy: chunk must be at least 1 token, not {chunk}")


def _to_chunks(x, chunk):
    """`[T, ...]` to `[T / chunk, chunk, ...]`, padded with zeros."""
    x = jnp.pad(x, ((0, -x.shape[0] % chunk),) + ((0, 0),) * (x.ndim - 1))
    return x.reshape(-1, chunk, *x.shape[1:])


def _from_chunks(x, tokens):
    return x.reshape(-1, *x.shape[2:])[:tokens]


def _logits(hidden, head, offset, vocab_size):
    """Logits of one chunk, `[chunk, V]`, padding columns at -inf."""
    # The barrier keeps reductions out of the matmul: fused, XLA's CPU backend runs them several times slower.
    logits = lax.optimization_barrier(jnp.dot(hidden, head, preferred_element_type=accumulator(hidden, head)))
    if vocab_size is not None:
        logits = jnp.where(offset + jnp.arange(head.shape[1]) < vocab_size, logits, -jnp.inf)
    return logits


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _partials(hidden, head, labels, offset, vocab_size, chunk):
    """`vocab_partials` with labels numbered within the shard."""
    return _forward(hidden, head, labels, offset, vocab_size, chunk)[0]


def _forward(hidden, head, labels, offset, vocab_size, chunk):
    def of_chunk(_, inputs):
        hidden, labels = inputs
        return None, _of_logits(_logits(hidden, head, offset, vocab_size), labels)

    _, parts = lax.scan(of_chunk, None, (_to_chunks(hidden, chunk), _to_chunks(labels, chunk)))
    top, total, label = (_from_chunks(x, hidden.shape[0]) for x in parts)
    # Named, so that a loss that is computed again for its backward pass need not make the logits a third time.
    top, total, label = (checkpoint_name(part, "cross_entropy_partials") for part in (top, total, label))
    return (top, total, label), (hidden, head, labels, offset, top)


def _backward(vocab_size, chunk, residuals, cotangents):
    hidden, head, labels, offset, top = residuals
    _, dtotal, dlabel = cotangents

    def of_chunk(dhead, inputs):
        hidden, *rest = inputs
        dlogits = _dlogits(_logits(hidden, head, offset, vocab_size), *rest).astype(hidden.dtype)
        return dhead + _dhead(hidden, dlogits, dhead.dtype), _dhidden(dlogits, head)

    inputs = tuple(_to_chunks(x, chunk) for x in (hidden, labels, top, dtotal, dlabel))
    dhead, dhidden = lax.scan(of_chunk, jnp.zeros_like(head, accumulator(hidden, head)), inputs)
    return _from_chunks(dhidden, hidden.shape[0]), dhead.astype(head.dtype), None, None


_partials.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _weighted_sum(hidden, head, labels, weights, offset, join, vocab_size, chunk):
    """`cross_entropy_sum` with labels numbered within the shard."""
    top, total, label = _joined(join, _partials(hidden, head, labels, offset, vocab_size, chunk))
    return _weighted(jnp.log(total) + top - label, weights)


def _joined(join, partials):
    return partials if join is None else join(*partials)


def _weighted(nll, weights):
    """The sum, in which a token of weight zero counts nothing whatever its label."""
    return jnp.sum(jnp.where(weights == 0, 0, nll * weights))


def _sum_and_gradients(hidden, head, labels, weights, offset, join, vocab_size, chunk):
    def of_chunk(dhead, inputs):
        hidden, labels, weights = inputs
        logits = _logits(hidden, head, offset, vocab_size)
        top, total, label = _joined(join, _of_logits(logits, labels))
        dlogits = _dlogits(logits, labels, top, weights / total, -weights).astype(hidden.dtype)
        nll = jnp.log(total) + top - label
        return dhead + _dhead(hidden, dlogits, dhead.dtype), (nll, _dhidden(dlogits, head))

    inputs = tuple(_to_chunks(x, chunk) for x in (hidden, labels, weights))
    dhead, parts = lax.scan(of_chunk, jnp.zeros_like(head, accumulator(hidden, head)), inputs)
    nll, dhidden = (_from_chunks(x, hidden.shape[0]) for x in parts)
    # Named, so that a loss that is computed again for its backward pass need not make the logits again.
    gradients = tuple(checkpoint_name(x, "cross_entropy_gradients") for x in (dhidden, dhead.astype(head.dtype)))
    return _weighted(nll, weights), gradients


def _scaled_gradients(join, vocab_size, chunk, gradients, cotangent):
    # The product is made in the cotangent's dtype: rounded to bfloat16, it would put one error into every gradient.
    dhidden, dhead = ((g * cotangent).astype(g.dtype) for g in gradients)
    return dhidden, dhead, None, None, None


_weighted_sum.defvjp(_sum_and_gradients, _scaled_gradients)


def _of_logits(logits, labels):
    """Maximum, sum of exponentials and label's logit of one chunk, each `[chunk]`."""
    top = jnp.maximum(logits.max(-1), _LOWEST)
    total = jnp.exp(logits - top[:, None]).sum(-1)
    inside = (labels >= 0) & (labels < logits.shape[1])
    label = jnp.take_along_axis(logits, jnp.where(inside, labels, 0)[:, None], -1)[:, 0]
    return top, total, jnp.where(inside, label, 0)


def _dlogits(logits, labels, top, dtotal, dlabel):
    """Gradient of one chunk's logits, `[chunk, V]`."""
    onehot = labels[:, None] == jnp.arange(logits.shape[1])
    return dtotal[:, None] * jnp.exp(logits - top[:, None]) + jnp.where(onehot, dlabel[:, None], 0)


def _dhidden(dlogits, head):
    """Gradient of one chunk's hidden states, `[chunk, D]`."""
    acc = accumulator(dlogits, head)
    return lax.dot_general(dlogits, head, (((1,), (1,)), ((), ())), preferred_element_type=acc).astype(dlogits.dtype)


def _dhead(hidden, dlogits, dtype):
    """What one chunk adds to the gradient of the head, `[D, V]`."""
    # XLA's CPU backend is slow where the first operand is transposed; the barrier makes it a plain product.
    return jnp.dot(lax.optimization_barrier(hidden.T), dlogits, preferred_element_type=dtype)
