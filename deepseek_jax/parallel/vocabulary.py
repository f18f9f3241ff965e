"""The embedding, the head and the cross entropy of a vocabulary that one device holds, or that `pipe` is split over.

Split, a rank of the axis holds V/P rows of the embedding and V/P columns of the head (V vocabulary, P ranks) and works
with those alone: no device ever has the logits of all V, or a whole gradient of the embedding or of the head. Both ends
of the model are the same work on every rank, which balances them under any schedule.

**The contract.** The ranks of the axis run one program on the same tokens and the same hidden states: arrays that
*vary* over the axis (in the sense of `check_vma`) and *are equal* along it; only the weights differ. Results are equal
along the axis too, and their cotangents must be. A gradient is that of **one** copy of the loss, not of the sum of P:

- of hidden: whole, and equal on every rank; the backward pass sums the parts of all ranks, here;
- of a rank's share of the embedding or the head: the whole gradient of that share; nobody sums it over the axis.

So a caller takes the loss of any one rank, and sums neither loss nor gradients over the axis. Where only one rank has
the hidden states (a pipeline's last stage), the caller first copies them to all, and likewise the cotangent of what
`lookup` gave. Casts to varying come before what is differentiated, since the gradient of a cast is a sum over the axis:
P times this one. Along other axes anything may differ; hidden and weights vary over the same ones.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax import ops
from deepseek_jax.compat import to_varying, varying_axes
from deepseek_jax.config import require


class Vocabulary(Protocol):
    """What a model's two ends need. T tokens, D model width, V what this device holds of the vocabulary."""

    def lookup(self, weight: jax.Array, tokens: jax.Array) -> jax.Array:
        """Embeddings `[..., D]` of tokens int32 `[...]`, from this device's weight `[V, D]`, in its dtype."""
        ...

    def cross_entropy_sum(
        self, hidden: jax.Array, head: jax.Array, labels: jax.Array, weights: jax.Array, *, chunk: int | None = None
    ) -> jax.Array:
        """`Σ_t weights_t cross_entropy_t` in nats, a scalar of float32 or wider.

        Args:
          hidden: `[T, D]`.
          head: this device's `[D, V]`.
          labels: `[T]` int32, numbered over the whole vocabulary; a label outside it must have the weight zero.
          weights: `[T]`, float32 or wider; constants, which get no gradient.
          chunk: tokens whose logits exist at a time; None chooses.
        """
        ...


@dataclasses.dataclass(frozen=True)
class WholeVocabulary:
    """All of it on this device: the oracle."""

    def lookup(self, weight: jax.Array, tokens: jax.Array) -> jax.Array:
        """See `Vocabulary`."""
        return ops.lookup(weight, tokens)

    def cross_entropy_sum(
        self, hidden: jax.Array, head: jax.Array, labels: jax.Array, weights: jax.Array, *, chunk: int | None = None
    ) -> jax.Array:
        """See `Vocabulary`."""
        return ops.cross_entropy_sum(hidden, head, labels, weights, chunk=chunk)


@dataclasses.dataclass(frozen=True)
class ShardedVocabulary:
    """An equal share on each rank of a mesh axis, in the order of the ranks; only inside `shard_map`."""

    axis: str = "pipe"

    @jax.named_scope("lookup")
    def lookup(self, weight: jax.Array, tokens: jax.Array) -> jax.Array:
        """See `Vocabulary`.

        Raises:
          ValueError: the weight does not vary over the axis.
        """
        self._check_varying(embedding=weight)
        return _sum_parts(ops.lookup(weight, tokens, self._offset(weight.shape[0])), self.axis)

    @jax.named_scope("cross_entropy")
    def cross_entropy_sum(
        self, hidden: jax.Array, head: jax.Array, labels: jax.Array, weights: jax.Array, *, chunk: int | None = None
    ) -> jax.Array:
        """See `Vocabulary`.

        Raises:
          ValueError: hidden or head does not vary over the axis, or shapes disagree.
        """
        self._check_varying(hidden=hidden, head=head)
        hidden = _sum_gradient_parts(hidden, self.axis)
        offset = self._offset(head.shape[1])
        return ops.cross_entropy_sum(hidden, head, labels, weights, offset, join=_JoinOver(self.axis), chunk=chunk)

    def _offset(self, size: int) -> jax.Array:
        return lax.axis_index(self.axis).astype(jnp.int32) * size

    def _check_varying(self, **arrays: jax.Array) -> None:
        for name, array in arrays.items():
            if self.axis not in varying_axes(array):
                raise ValueError(
                    f"{name} must vary over {self.axis!r}: cast it with to_varying, outside what is differentiated"
                )


def check_vocabulary(vocab_size: int, pipe: int) -> None:
    """Refuses a vocabulary that the ranks of `pipe` cannot share equally.

    Raises:
      ConfigError: if so.
    """
    require(
        vocab_size % pipe == 0,
        f"model.vocab_size={vocab_size} does not split evenly over parallel.pipe={pipe}, as embedding and head must: "
        f"change one of them (model.vocab_size={vocab_size + -vocab_size % pipe} would do)",
    )


@dataclasses.dataclass(frozen=True)
class _JoinOver:
    """Joins the partial results of the ranks of an axis; see `ops.vocab_partials`."""

    axis: str

    def __call__(self, top: jax.Array, total: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        highest = lax.pmax(top, self.axis)
        total, label = lax.psum((total * jnp.exp(top - highest), label), self.axis)
        return to_varying((highest, total, label), self.axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sum_parts(x: jax.Array, axis: str) -> jax.Array:
    """The sum over the ranks, equal on all; the cotangent of any copy of it is that of every part."""
    return to_varying(lax.psum(x, axis), axis)


_sum_parts.defvjp(lambda x, axis: (_sum_parts(x, axis), None), lambda axis, _, gradient: (gradient,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sum_gradient_parts(x: jax.Array, axis: str) -> jax.Array:
    """The identity, whose gradient is summed over the ranks."""
    return x


def _summed_gradient(axis: str, _, gradient: jax.Array) -> tuple[jax.Array]:
    # In bfloat16 every one of the sum's P - 1 additions would round.
    wide = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
    return (to_varying(lax.psum(wide, axis), axis).astype(gradient.dtype),)


_sum_gradient_parts.defvjp(lambda x, axis: (x, None), _summed_gradient)
