"""The plain layers: linear, RMSNorm, embedding, SwiGLU. B batch, S sequence, D model, F hidden, V vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax import ops
from deepseek_jax.model.parameters import parameter
from deepseek_jax.model.quantized import declare_quantized, quantized
from deepseek_jax.precision import fp8 as fp8_layers
from deepseek_jax.precision.policy import Fp8Config


def at_least_float32(dtype) -> jnp.dtype:
    """float32, or the dtype itself where it is wider, so that parity tests can run in float64."""
    return jnp.promote_types(dtype, jnp.float32)


class Linear(nnx.Module):
    """A matrix without bias, `[..., in] -> [..., out]`; `weight` is `[in, out]`."""

    def __init__(
        self,
        in_size: int,
        out_size: int,
        axes: tuple[str | None, str | None],
        *,
        init_std: float,
        fp8: Fp8Config | None = None,
    ):
        self.weight = parameter((in_size, out_size), axes, init_std=init_std)
        self.fp8 = fp8
        if fp8 is not None:
            declare_quantized(self, "weight", fp8)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.fp8 is not None:
            return fp8_layers.linear(x, self.weight[...], quantized(self, "weight", self.fp8), self.fp8)
        return ops.linear(x, self.weight[...].astype(x.dtype))


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last dimension, computed in float32 or wider, returned in x's dtype."""

    def __init__(self, size: int, eps: float):
        self.eps = eps
        self.scale = parameter((size,), (None,), initializer="ones", full_precision=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(at_least_float32(x.dtype))
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + self.eps) * self.scale[...]).astype(x.dtype)


class Embedding(nnx.Module):
    """Token embedding; `weight` is `[V, D]`."""

    def __init__(self, vocab_size: int, hidden_size: int, *, init_std: float):
        self.weight = parameter((vocab_size, hidden_size), ("vocab", "embed"), init_std=init_std)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """`[...]` int32 -> `[..., D]`."""
        return ops.lookup(self.weight[...], tokens)


class SwiGLU(nnx.Module):
    """The dense feed-forward network: `down(silu(gate(x)) * up(x))`; gate and up are one matrix `[D, 2F]`."""

    def __init__(self, hidden_size: int, ffn_size: int, *, init_std: float, fp8: Fp8Config | None = None):
        self.gate_up = Linear(hidden_size, 2 * ffn_size, ("embed", "ffn"), init_std=init_std, fp8=fp8)
        self.down = Linear(ffn_size, hidden_size, ("ffn", "embed"), init_std=init_std, fp8=fp8)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate_up, down = self.gate_up(x), self.down
        if down.fp8 is not None:
            return fp8_layers.swiglu_linear(gate_up, down.weight[...], quantized(down, "weight", down.fp8), down.fp8)
        return down(ops.swiglu(checkpoint_name(gate_up, "gate_up")))
