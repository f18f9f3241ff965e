"""Floating-point operations per token, from the architecture alone: the one counter that MFU and the planner use.

A multiply-add counts as two, causal attention as half of the full square, and the backward pass as twice the forward;
recomputation, norms and other elementwise work count nothing. So counted, DeepSeek-V3 at 4096 tokens takes 250 GFLOP
per token to train, 260 with its MTP module. Routed experts count as often as a token visits them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from deepseek_jax.config import ModelConfig
from deepseek_jax.precision.policy import LinearKind


class Matmul(NamedTuple):
    """A matrix that tokens are multiplied by."""

    name: str
    module: str
    """What it is counted under."""
    inputs: int
    """Its rows: the length of the contraction in the forward pass."""
    outputs: int
    visits: int = 1
    """How often a token is multiplied by a matrix of this shape."""
    kind: LinearKind | None = None
    """What a precision policy calls it; None: it never runs in FP8."""
    recomputed: bool = False
    """Whether selective recomputation does it again in the backward pass: MLA's up-projections (section 3.2.3)."""

    @property
    def flops(self) -> float:
        """Per token, of one product: forward, input gradient and weight gradient take as much each."""
        return 2.0 * self.visits * self.inputs * self.outputs


def attention_matmuls(config: ModelConfig) -> tuple[Matmul, ...]:
    """The projections of one MLA layer (section 2.1.1)."""
    attention, width = config.attention, config.hidden_size
    heads, rank = attention.num_heads, attention.q_lora_rank
    query_size = heads * attention.qk_head_dim
    latent = attention.kv_lora_rank + attention.qk_rope_head_dim
    keys_values = heads * (attention.qk_nope_head_dim + attention.v_head_dim)

    def one(name: str, inputs: int, outputs: int, *, up: bool = False) -> Matmul:
        return Matmul(name, "mla projections", inputs, outputs, kind="attention", recomputed=up)

    if rank is None:
        queries = [one("q", width, query_size, up=True)]
    else:
        queries = [one("q_a", width, rank), one("q_b", rank, query_size, up=True)]
    return (
        *queries,
        one("kv_a", width, latent),
        one("kv_b", attention.kv_lora_rank, keys_values, up=True),
        one("output", heads * attention.v_head_dim, width),
    )


def ffn_matmuls(config: ModelConfig, *, dense: bool) -> tuple[Matmul, ...]:
    """The matrices of a dense FFN, or of an MoE layer: router, shared experts, and the experts that a token visits."""
    moe, width = config.moe, config.hidden_size
    if dense:
        return _swiglu("dense", "dense ffn", width, config.dense_ffn_size, 1, "dense_ffn")
    shared = moe.num_shared_experts * moe.expert_ffn_size
    return (
        Matmul("router", "router", width, moe.num_experts),
        *(_swiglu("shared", "shared experts", width, shared, 1, "shared_experts") if shared else ()),
        *_swiglu("routed", "routed experts", width, moe.expert_ffn_size, moe.experts_per_token, "routed_experts"),
    )


def layer_matmuls(config: ModelConfig, *, dense: bool) -> tuple[Matmul, ...]:
    """All matrices of one layer."""
    return (*attention_matmuls(config), *ffn_matmuls(config, dense=dense))


def mtp_projection(config: ModelConfig) -> Matmul:
    """What an MTP module has besides an MoE layer: it joins two hidden states (section 2.2)."""
    return Matmul("mtp projection", "mtp projection", 2 * config.hidden_size, config.hidden_size)


def output_head(config: ModelConfig) -> Matmul:
    """The matrix behind the last layer, and behind each MTP module."""
    return Matmul("head", "output head", config.hidden_size, config.vocab_size)


def attention_core(config: ModelConfig, length: int, *, causal: bool = True) -> float:
    """FLOPs per token of scores and weighted sums in one layer, forward.

    Args:
      config: the model.
      length: tokens of a sequence.
      causal: a token reads half of the sequence on average; else all of it, as where masked scores are computed too.
    """
    attention = config.attention
    per_position = 2.0 * attention.num_heads * (attention.qk_head_dim + attention.v_head_dim)
    return per_position * length / (2 if causal else 1)


def forward_flops(config: ModelConfig, length: int, *, mtp: bool = True, causal: bool = True) -> dict[str, float]:
    """FLOPs per token of a forward pass over sequences of `length` tokens, by module.

    Args:
      config: the model.
      length: tokens of a sequence.
      mtp: count the MTP modules and their use of the output head, as in training.
      causal: count half of attention's square, which is what MFU does; else all of it.
    """
    depth = config.mtp_depth if mtp else 0
    names = ("mla projections", "attention", "dense ffn", "router", "shared experts", "routed experts")
    found = dict.fromkeys((*names, "mtp projection", "output head"), 0.0)
    for one, times in _all_matmuls(config, depth):
        found[one.module] += times * one.flops
    found["attention"] = (config.num_layers + depth) * attention_core(config, length, causal=causal)
    return found


def backward_flops(
    config: ModelConfig, length: int, *, mtp: bool = True, causal: bool = True
) -> tuple[dict[str, float], dict[str, float]]:
    """FLOPs per token of a backward pass, by module: of input gradients (B), and of weight gradients (W).

    A matrix takes one product in each. Attention has no weights, so the two products that each of its forward products
    needs are both in B.
    """
    forward = forward_flops(config, length, mtp=mtp, causal=causal)
    inputs = {name: 2 * flops if name == "attention" else flops for name, flops in forward.items()}
    weights = {name: 0.0 if name == "attention" else flops for name, flops in forward.items()}
    return inputs, weights


def training_flops(config: ModelConfig, length: int, *, mtp: bool = True, causal: bool = True) -> dict[str, float]:
    """FLOPs per token of a forward and a backward pass, by module."""
    return {name: 3 * flops for name, flops in forward_flops(config, length, mtp=mtp, causal=causal).items()}


def training_flops_per_token(config: ModelConfig, length: int, *, mtp: bool = True, causal: bool = True) -> float:
    """FLOPs per token of a forward and a backward pass: what MFU divides by."""
    return sum(training_flops(config, length, mtp=mtp, causal=causal).values())


def _swiglu(name: str, module: str, width: int, size: int, visits: int, kind: LinearKind) -> tuple[Matmul, ...]:
    return (
        Matmul(f"{name} gate_up", module, width, 2 * size, visits, kind),
        Matmul(f"{name} down", module, size, width, visits, kind),
    )


def _all_matmuls(config: ModelConfig, depth: int) -> Iterator[tuple[Matmul, int]]:
    """Every matrix of the model with `depth` MTP modules, and how many layers have it."""
    yield from ((one, config.num_dense_layers) for one in layer_matmuls(config, dense=True))
    yield from ((one, config.num_moe_layers + depth) for one in layer_matmuls(config, dense=False))
    yield mtp_projection(config), depth
    yield output_head(config), 1 + depth
