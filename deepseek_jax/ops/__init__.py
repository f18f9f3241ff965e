from deepseek_jax.ops.attention import attention, attention_backward, attention_forward
from deepseek_jax.ops.cross_entropy import cross_entropy, cross_entropy_sum, vocab_partials
from deepseek_jax.ops.embedding import lookup
from deepseek_jax.ops.linear import linear
from deepseek_jax.ops.saved import named
from deepseek_jax.ops.swiglu import swiglu
from pallas_kernels.block_scaled_matmul import block_scaled_matmul
from pallas_kernels.grouped_matmul import (
    group_starts,
    grouped_matmul,
    grouped_matmul_dw,
    grouped_matmul_dx,
    preferred_alignment,
)
from pallas_kernels.permute import combine_rows, gather_rows

__all__ = [
    "attention",
    "attention_backward",
    "attention_forward",
    "block_scaled_matmul",
    "combine_rows",
    "cross_entropy",
    "cross_entropy_sum",
    "gather_rows",
    "group_starts",
    "grouped_matmul",
    "grouped_matmul_dw",
    "grouped_matmul_dx",
    "linear",
    "lookup",
    "named",
    "preferred_alignment",
    "swiglu",
    "vocab_partials",
]
