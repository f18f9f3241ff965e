"""cuDNN's fused attention behind the interface of `ops.attention`, through `jax.nn.dot_product_attention`.

It keeps only the output and the log-sum-exp, like the blockwise implementation. cuDNN itself takes value heads narrower
than query and key heads (DeepSeek-V3's 128 and 192), but jax's public function insists on equal ones: values are padded
with zeros to the queries' width and the output is cut back, a third more work in the products with the values.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def obstacle(q: Array, k: Array, v: Array, segment_ids: Array | None) -> str | None:
    """Why cuDNN cannot run this attention on the default device, or None if it can."""
    if jax.default_backend() != "gpu":
        return f"cuDNN needs an NVIDIA GPU, and the default device is a {jax.default_backend()}"
    device = jax.devices()[0]
    if float(getattr(device, "compute_capability", 0)) < 9.0:
        return f"it needs Hopper or newer (compute capability 9.0), and {device.device_kind} is older"
    return shape_obstacle(q, k, v, segment_ids)


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
    width = v.shape[-1]
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, q.shape[-1] - width)))
    out = jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn")
    return out[..., :width]
