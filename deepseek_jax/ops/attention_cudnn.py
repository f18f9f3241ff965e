"""cuDNN's fused attention behind the interface of `ops.attention`, through `jax.nn.dot_product_attention`.

It keeps only the output and the log-sum-exp, under the names that the blockwise implementation gives them, so selective
recomputation does not run it again. cuDNN itself takes value heads narrower than query and key heads (DeepSeek-V3's 128
and 192), but jax's public function insists on equal ones: values are padded with zeros to the queries' width and the
output is cut back. At 192 and 128 that is half as much again in the products with the values, a fifth over all.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name


def obstacle(q: Array, k: Array, v: Array, segment_ids: Array | None) -> str | None:
    """Why cuDNN cannot run this attention, forward and backward, on the default device; None if it can."""
    if jax.default_backend() != "gpu":
        return f"cuDNN needs an NVIDIA GPU, and the default device is a {jax.default_backend()}"
    device = jax.devices()[0]
    capability = _compute_capability(device)
    if capability is None:
        return f"cuDNN needs an NVIDIA GPU, and the default device is {device.device_kind}"
    if capability < (9, 0):
        return f"it needs Hopper or newer (compute capability 9.0), and {device.device_kind} is older"
    # https://github.com/NVIDIA/cudnn-frontend/issues/242: it takes 128 beside 192, but not both of 192, as padded here.
    if capability >= (10, 0) and q.shape[-1] > 128:
        return f"its backward pass takes heads up to 128 wide on {device.device_kind}, not {q.shape[-1]}"
    return shape_obstacle(q, k, v, segment_ids)


def _compute_capability(device: jax.Device) -> tuple[int, int] | None:
    """(major, minor) of an NVIDIA GPU; None for another one: ROCm says "gfx942"."""
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None


def shape_obstacle(q: Array, k: Array, v: Array, segment_ids: Array | None) -> str | None:
    """The part of `obstacle` that depends on the arrays alone."""
    if segment_ids is not None:
        return "cuDNN's causal attention takes no segment mask of this form; use 'blockwise'"
    if not (q.dtype == k.dtype == v.dtype and q.dtype in (jnp.bfloat16, jnp.float16)):
        return f"it takes bfloat16 or float16, not {q.dtype}, {k.dtype} and {v.dtype}"
    if q.shape[-1] > 256 or q.shape[-1] % 8:
        return f"query and key heads must be a multiple of 8 and at most 256 wide, not {q.shape[-1]}"
    if v.shape[-1] > q.shape[-1]:
        return f"value heads ({v.shape[-1]}) may not be wider than query and key heads ({q.shape[-1]})"
    return None


def attention(q: Array, k: Array, v: Array, *, scale: float) -> Array:
    """Causal attention, q and k `[B, S, H, K]`, v `[B, S, H, V]` in bfloat16 or float16: `[B, S, H, V]`."""
    return _attention(q, k, v, float(scale))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(q, k, v, scale):
    return _padded(q, k, v, scale)[0]


def _padded(q, k, v, scale):
    """The output, and the same with the zeros that belong to the padded values."""
    wide = jax.nn.dot_product_attention(
        q, k, _widened(v, q.shape[-1]), scale=scale, is_causal=True, implementation="cudnn"
    )
    return wide[..., : v.shape[-1]], wide


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Form:
    """How a backward pass is put together again."""

    structure: Any
    places: tuple[int, ...]
    """Of the wide output among its leaves."""
    shape: tuple[int, ...]
    """Of the output."""
    width: int
    """Of the wide output."""


class Saved(NamedTuple):
    """jax's own backward pass, a pytree that holds q, k, v, the output and the log-sum-exp, without the output."""

    leaves: list[Array]
    form: _Form


def forward(q: Array, k: Array, v: Array, *, scale: float) -> tuple[Array, Saved]:
    """The output, and what `backward` needs besides it."""
    out, pullback, wide = jax.vjp(functools.partial(_padded, scale=scale), q, k, v, has_aux=True)
    leaves, structure = jax.tree.flatten(pullback)
    places = tuple(place for place, leaf in enumerate(leaves) if leaf is wide)
    named = [
        checkpoint_name(leaf, "attention_lse") if leaf.dtype == jnp.float32 else leaf
        for leaf in leaves
        if leaf is not wide
    ]
    return out, Saved(named, _Form(structure, places, out.shape, wide.shape[-1]))


def backward(saved: Saved, out: Array, dout: Array) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v."""
    leaves, form = list(saved.leaves), saved.form
    for place in form.places:
        leaves.insert(place, _widened(out.reshape(form.shape), form.width))
    return jax.tree.unflatten(form.structure, leaves)(dout.reshape(form.shape))


def _forward(q, k, v, scale):
    out, saved = forward(q, k, v, scale=scale)
    out = checkpoint_name(out, "attention_out")
    return out, (saved, out)


def _backward(scale, residuals, dout):
    saved, out = residuals
    return backward(saved, out, dout)


_attention.defvjp(_forward, _backward)


def _widened(x, width):
    """x `[..., V]` with zeros up to `[..., width]`."""
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, width - x.shape[-1]),))
