from deepseek_jax.ops.attention import attention
from deepseek_jax.ops.cross_entropy import cross_entropy, cross_entropy_sum, vocab_partials
from deepseek_jax.ops.embedding import lookup
from deepseek_jax.ops.grouped_matmul import (
    group_starts,
    grouped_matmul,
    grouped_matmul_dw,
    grouped_matmul_dx,
    preferred_alignment,
)
from deepseek_jax.ops.linear import linear

__all__ = [
    "attention",
    "cross_entropy",
    "cross_entropy_sum",
    "group_starts",
    "grouped_matmul",
    "grouped_matmul_dw",
    "grouped_matmul_dx",
    "linear",
    "lookup",
    "preferred_alignment",
    "vocab_partials",
]
