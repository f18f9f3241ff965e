"""Causal attention whose memory is linear in the sequence length: `[S, S]` scores never exist whole.

Shape letters: B batch, S sequence, H heads, K width of a query or key head, V width of a value head. Inside, the
sequence is cut into N blocks of `block` tokens, and G is rows of the batch times heads, worked on together.

The blockwise implementation is FlashAttention's recurrence (arXiv 2205.14135, 2307.08691): forward keeps a running
maximum, sum and weighted value per query and saves only the output and the log-sum-exp; backward computes each block of
scores again. What is peculiar to it is shaped by XLA's CPU backend, where it has to be fast:

- A tile of scores (G x block x block) fits the second-level cache, or the elementwise passes over it cost more than the
  matmuls. So a few rows of the batch are worked on at a time, and the rest wait in an outer scan.
- Matmuls with the first operand transposed miss the fast kernels. The backward pass therefore works on transposed
  scores (keys x queries): then dk and dv are plain products, and dq comes out transposed from the transposed keys.
- A reduction fused into a matmul is several times slower than both apart: hence the barrier before the maximum.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.ops import attention_cudnn
from pallas_kernels.implementation import accumulator, choose

_MAX_BLOCK = 128
_TILE_SCORES = 2**18  # scores in flight on a CPU: 1 MiB of float32
_MASKED = -1e30  # finite, so that a row masked throughout one block stays free of NaN


def attention(
    q: Array, k: Array, v: Array, *, scale: float, segment_ids: Array | None = None, implementation: str | None = None
) -> Array:
    """Softmax attention in which token i sees the tokens j <= i of its own segment.

    Args:
      q: Queries, `[B, S, H, K]`, any float dtype.
      k: Keys, `[B, S, H, K]`.
      v: Values, `[B, S, H, V]`; V may differ from K.
      scale: Factor on the scores, positive (for DeepSeek-V3: K^-0.5 times YaRN's correction).
      segment_ids: `[B, S]` int32, or None when the whole row is one segment.
      implementation: "reference" (holds `[S, S]`: an oracle for small sizes), "blockwise" (portable), "cudnn" (Hopper,
        or newer for heads up to 128; bfloat16 or float16; no segments), or None for the best that is supported here.

    Returns:
      `[B, S, H, V]` of v's dtype. Softmax statistics are float32 or wider.

    Raises:
      ValueError: if shapes disagree, scale is not positive, or the implementation is unknown or not supported here.
    """
    name = _chosen(q, k, v, scale, segment_ids, implementation, reference=None)
    if name == "cudnn":
        return attention_cudnn.attention(q, k, v, scale=scale)
    if name == "reference":
        return _reference(q, k, v, segment_ids, scale)
    return _blockwise(q, k, v, segment_ids, float(scale))


def attention_forward(
    q: Array, k: Array, v: Array, *, scale: float, segment_ids: Array | None = None, implementation: str | None = None
) -> tuple[Array, Any]:
    """`attention`, and what `attention_backward` needs besides its output, for those who keep that in their own way.

    Neither has a derivative. "reference" is not among the implementations.
    """
    name = _chosen(q, k, v, scale, segment_ids, implementation, reference="it has no backward pass of its own")
    if name == "cudnn":
        return attention_cudnn.forward(q, k, v, scale=float(scale))
    heads, block = q.shape[2], block_size(q.shape[1])
    run = functools.partial(_forward_rows, block=block, scale=float(scale))
    out, lse = _by_rows(run, (q, k, v, segment_ids), heads, block)
    return out, _Saved(q, k, v, segment_ids, checkpoint_name(lse, "attention_lse"))


def attention_backward(saved: Any, out: Array, dout: Array, *, scale: float) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v from that of the output, `[B, S, H, V]`; `out` may have been rounded."""
    if not isinstance(saved, _Saved):
        return attention_cudnn.backward(saved, out, dout)
    q, k, v, segment_ids, lse = saved
    out, dout = out.reshape(v.shape), dout.reshape(v.shape)
    heads, block = q.shape[2], block_size(q.shape[1])
    delta = (dout.astype(lse.dtype) * out.astype(lse.dtype)).sum(-1)
    run = functools.partial(_backward_rows, block=block, scale=float(scale))
    return _by_rows(run, (q, k, v, segment_ids, dout, lse, delta), heads, block)


def _chosen(q, k, v, scale, segment_ids, implementation, *, reference: str | None) -> str:
    """The implementation to run; `reference` is why that one cannot."""
    if q.ndim != 4 or q.shape != k.shape or q.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"attention needs q and k [B, S, H, K] and v [B, S, H, V], not {q.shape}, {k.shape} and {v.shape}"
        )
    if scale <= 0:
        raise ValueError(f"attention needs a positive scale, not {scale}")
    if segment_ids is not None and segment_ids.shape != q.shape[:2]:
        raise ValueError(f"attention needs segment_ids [B, S] = {q.shape[:2]}, not {segment_ids.shape}")
    cudnn = attention_cudnn.obstacle(q, k, v, segment_ids)
    return choose("attention", implementation, {"cudnn": cudnn, "blockwise": None, "reference": reference})


class _Saved(NamedTuple):
    """What the blockwise backward pass needs besides the output."""

    q: Array
    k: Array
    v: Array
    segment_ids: Array | None
    lse: Array


def _reference(q, k, v, segment_ids, scale):
    """What attention means, all scores at once."""
    acc = accumulator(q, k, v)
    scores = jnp.einsum("bshk,bthk->bhst", q.astype(acc), k.astype(acc)) * scale
    visible = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    if segment_ids is not None:
        visible &= (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, _MASKED), axis=-1)
    return jnp.einsum("bhst,bthv->bshv", weights, v.astype(acc)).astype(v.dtype)


def block_size(length: int) -> int:
    """Tokens per block for a sequence of `length`: at most 128, a multiple of 8, and little padding."""
    blocks = math.ceil(length / _MAX_BLOCK)
    return math.ceil(length / blocks / 8) * 8


def _rows_at_once(batch, heads, block):
    """Rows of the batch worked on together: a divisor of `batch`; all of them where there is no cache to fit."""
    if jax.default_backend() != "cpu":
        return batch
    limit = max(1, _TILE_SCORES // (heads * block * block))
    return max(r for r in range(1, min(limit, batch) + 1) if batch % r == 0)


def _by_rows(f, arrays, heads, block):
    """Maps `f` over groups of batch rows: `[B, ...]` in, `[B, ...]` out."""
    batch = arrays[0].shape[0]
    rows = _rows_at_once(batch, heads, block)
    split = jax.tree.map(lambda x: x.reshape(batch // rows, rows, *x.shape[1:]), arrays)
    out = lax.map(lambda group: f(*group), split)
    return jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), out)


def _to_blocks(x, block, fill=0):
    """`[R, S, H, D]` to `[N, R * H, block, D]`, padded with `fill` at the end of the sequence."""
    rows, length, heads, width = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % block), (0, 0), (0, 0)), constant_values=fill)
    x = x.reshape(rows, -1, block, heads, width).transpose(1, 0, 3, 2, 4)
    return x.reshape(x.shape[0], rows * heads, block, width)


def _from_blocks(x, rows, length):
    """`[N, R * H, block, D]` to `[R, S, H, D]`."""
    blocks, _, block, width = x.shape
    x = x.reshape(blocks, rows, -1, block, width).transpose(1, 0, 3, 2, 4)
    return x.reshape(rows, blocks * block, -1, width)[:, :length]


def _segment_blocks(segment_ids, heads, block):
    """`[R, S]` to `[N, R * H, block]`; padding is a segment of its own."""
    if segment_ids is None:
        return None
    spread = jnp.broadcast_to(segment_ids[:, :, None, None], (*segment_ids.shape, heads, 1))
    return _to_blocks(spread, block, fill=-1)[..., 0]


def _at(x, i):
    return None if x is None else lax.dynamic_index_in_dim(x, i, keepdims=False)


def _set(x, i, value):
    return lax.dynamic_update_index_in_dim(x, value, i, 0)


def _mask(scores, segments_rows, segments_columns, diagonal):
    """Scores `[G, rows, columns]` of one pair of blocks, hidden where `diagonal` (a bool mask) or segments say so."""
    if diagonal is not None:
        scores = jnp.where(diagonal, scores, _MASKED)
    if segments_rows is not None:
        scores = jnp.where(segments_rows[:, :, None] == segments_columns[:, None, :], scores, _MASKED)
    return scores


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blockwise(q, k, v, segment_ids, scale):
    return attention_forward(q, k, v, scale=scale, segment_ids=segment_ids, implementation="blockwise")[0]


def _forward(q, k, v, segment_ids, scale):
    out, saved = attention_forward(q, k, v, scale=scale, segment_ids=segment_ids, implementation="blockwise")
    # Named, so that a layer that is computed again for its backward pass need not run attention again.
    out = checkpoint_name(out, "attention_out")
    return out, (saved, out)


def _backward(scale, residuals, dout):
    saved, out = residuals
    return *attention_backward(saved, out, dout, scale=scale), None


_blockwise.defvjp(_forward, _backward)


def _forward_rows(q, k, v, segment_ids, *, block, scale):
    """Output `[R, S, H, V]` and log-sum-exp `[R, S, H]` of some rows of the batch."""
    rows, length, heads, _ = q.shape
    acc = accumulator(q, k, v)
    dot = functools.partial(jnp.einsum, preferred_element_type=acc)
    segments = _segment_blocks(segment_ids, heads, block)
    q, k, v = _to_blocks(q, block), _to_blocks(k, block), _to_blocks(v, block)
    lower = jnp.tril(jnp.ones((block, block), bool))
    factor = jnp.asarray(scale, acc)

    def query_block(_, i):
        qi, si = _at(q, i), _at(segments, i)

        def scores(j, diagonal):
            raw = lax.optimization_barrier(dot("gsk,gtk->gst", qi, _at(k, j)))
            return _mask(raw, si, _at(segments, j), diagonal)

        def weigh(weights, j):
            return dot("gst,gtv->gsv", weights.astype(v.dtype), _at(v, j))

        # Scores and their maximum stay unscaled: the factor, being positive, costs nothing inside the exponential.
        def key_block(j, carry):
            out, top, total = carry
            s = scores(j, None)
            new = jnp.maximum(top, s.max(-1))
            weights, shrink = jnp.exp((s - new[..., None]) * factor), jnp.exp((top - new) * factor)
            return out * shrink[..., None] + weigh(weights, j), new, total * shrink + weights.sum(-1)

        # The diagonal block comes first: every query sees itself there, so the maximum is real from the start.
        s = scores(i, lower)
        top = s.max(-1)
        weights = jnp.exp((s - top[..., None]) * factor)
        out, top, total = lax.fori_loop(0, i, key_block, (weigh(weights, i), top, weights.sum(-1)))
        return None, ((out / total[..., None]).astype(v.dtype), (top * factor + jnp.log(total))[..., None])

    _, (out, lse) = lax.scan(query_block, None, jnp.arange(q.shape[0]))
    return _from_blocks(out, rows, length), _from_blocks(lse, rows, length)[..., 0]


def _backward_rows(q, k, v, segment_ids, dout, lse, delta, *, block, scale):
    """Gradients of q, k and v for some rows of the batch, each of its array's shape and dtype."""
    rows, length, heads, _ = q.shape
    acc = accumulator(q, k, v)
    dot = functools.partial(jnp.einsum, preferred_element_type=acc)
    segments = _segment_blocks(segment_ids, heads, block)
    q, k, v, dout = (_to_blocks(x, block) for x in (q, k, v, dout))
    lse, delta = (_to_blocks(x[..., None], block)[..., 0] for x in (lse, delta))
    # Transposed once, not per pair of blocks.
    k_transposed = k.swapaxes(-1, -2)
    upper = jnp.triu(jnp.ones((block, block), bool))

    def pair(i, j, diagonal):
        """What queries i and keys j add to dq^T `[G, K, block]`, dk and dv; scores are transposed, keys x queries."""
        qi, vj, di = _at(q, i), _at(v, j), _at(dout, i)
        s = dot("gtk,gsk->gts", _at(k, j), qi) * jnp.asarray(scale, acc)
        s = _mask(s, _at(segments, j), _at(segments, i), diagonal)
        weights = jnp.exp(s - _at(lse, i)[:, None, :])
        dweights = dot("gtv,gsv->gts", vj, di)
        ds = (weights * (dweights - _at(delta, i)[:, None, :])).astype(q.dtype)
        dq = dot("gkt,gts->gks", _at(k_transposed, j), ds)
        return dq, dot("gts,gsk->gtk", ds, qi), dot("gts,gsv->gtv", weights.astype(dout.dtype), di)

    def key_block(dq, j):
        dqj, dk, dv = pair(j, j, upper)
        dq = _set(dq, j, _at(dq, j) + dqj)

        def query_block(i, carry):
            dq, dk, dv = carry
            dqi, dki, dvi = pair(i, j, None)
            return _set(dq, i, _at(dq, i) + dqi), dk + dki, dv + dvi

        dq, dk, dv = lax.fori_loop(j + 1, q.shape[0], query_block, (dq, dk, dv))
        return dq, ((dk * jnp.asarray(scale, acc)).astype(k.dtype), dv.astype(v.dtype))

    dq, (dk, dv) = lax.scan(key_block, jnp.zeros_like(k_transposed, acc), jnp.arange(q.shape[0]))
    dq = (dq * jnp.asarray(scale, acc)).astype(q.dtype).swapaxes(-1, -2)
    return tuple(_from_blocks(x, rows, length) for x in (dq, dk, dv))
