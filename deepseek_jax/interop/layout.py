"""Which tensors of a Hugging Face folder make up each canonical array: one table, read both ways.

Their linear weights are `[out, in]`, ours `[in, out]`. They keep gate and up, and every expert, as tensors of their
own; here gate and up are one matrix (gate first) and the experts of a layer one array `[E, in, out]`. Their rotary rows
pair neighbours, ours are half-split, so the rotary rows of `q`, `q_b` and `kv_a` change places. Nothing else differs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np

from deepseek_jax.config import AttentionConfig, ModelConfig
from deepseek_jax.interop.fp8 import scale_shape
from deepseek_jax.interop.host import contiguous
from deepseek_jax.model.parameters import ParameterSpec, RouterBias, parameter_specs
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.placement import KINDS, place
from deepseek_jax.tree import flatten

ENDS = {
    "embedding.weight": ("model.embed_tokens.weight",),
    "final_norm.scale": ("model.norm.weight",),
    "head.weight": ("lm_head.weight",),
}
LAYER = {
    "attention_norm.scale": ("input_layernorm.weight",),
    "attention.q.weight": ("self_attn.q_proj.weight",),
    "attention.q_a.weight": ("self_attn.q_a_proj.weight",),
    "attention.q_a_norm.scale": ("self_attn.q_a_layernorm.weight",),
    "attention.q_b.weight": ("self_attn.q_b_proj.weight",),
    "attention.kv_a.weight": ("self_attn.kv_a_proj_with_mqa.weight",),
    "attention.kv_a_norm.scale": ("self_attn.kv_a_layernorm.weight",),
    "attention.kv_b.weight": ("self_attn.kv_b_proj.weight",),
    "attention.o.weight": ("self_attn.o_proj.weight",),
    "ffn_norm.scale": ("post_attention_layernorm.weight",),
    "ffn.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "ffn.down.weight": ("mlp.down_proj.weight",),
    "ffn.router.weight": ("mlp.gate.weight",),
    "ffn.router.bias": ("mlp.gate.e_score_correction_bias",),
    "ffn.experts.gate_up": ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
    "ffn.experts.down": ("mlp.experts.{expert}.down_proj.weight",),
    "ffn.shared.gate_up.weight": ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
    "ffn.shared.down.weight": ("mlp.shared_experts.down_proj.weight",),
}
MTP = {
    "embedding_norm.scale": ("enorm.weight",),
    "hidden_norm.scale": ("hnorm.weight",),
    "projection.weight": ("eh_proj.weight",),
    **{f"block.{ours}": theirs for ours, theirs in LAYER.items()},
    "final_norm.scale": ("shared_head.norm.weight",),
}
MTP_COPIES = {"embed_tokens.weight": "embedding.weight", "shared_head.head.weight": "head.weight"}
"""What an MTP module has in their folders, and what of the main model it is."""

_ROTARY = ("attention.q.weight", "attention.q_b.weight", "attention.kv_a.weight")
_NEVER_FP8 = ("embedding.weight", "head.weight", "ffn.router.weight", "projection.weight")
"""Matrices that the released FP8 folders keep in BF16: embedding, head, router and MTP's projection."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One canonical array, and the tensors that it is made of: by expert, then gate and up where they are joined."""

    name: str
    """`layers.3.ffn.experts.gate_up`"""
    spec: ParameterSpec
    tensors: tuple[tuple[str, ...], ...]
    """One row per expert; a single row where the array is no stack of experts."""
    copies: tuple[str, ...] = ()
    """Other tensors of a folder that hold the same numbers."""
    row_order: np.ndarray | None = dataclasses.field(default=None, compare=False)
    """Our row i is their row `row_order[i]`; None where the order is the same."""

    @property
    def stacked(self) -> bool:
        """Whether the leading dimension counts experts."""
        return len(self.spec.shape) == 3

    @property
    def transposed(self) -> bool:
        """Whether ours is `[in, out]` where theirs is `[out, in]`: all matrices but the embedding."""
        return len(self.spec.shape) >= 2 and self.name != "embedding.weight"

    @property
    def may_be_fp8(self) -> bool:
        """Whether an FP8 folder holds these tensors in FP8."""
        return self.transposed and not self.name.endswith(_NEVER_FP8)

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each tensor in their folder."""
        shape = self.spec.shape[1:] if self.stacked else self.spec.shape
        return (shape[1] // len(self.tensors[0]), shape[0]) if self.transposed else shape

    def box(self, row: int, rows: slice | None = None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where in the canonical array the tensors of a row lie, or these rows of a tensor: start and shape."""
        shape = (1, *self.spec.shape[1:]) if self.stacked else self.spec.shape
        start = (row if self.stacked else 0, *(0,) * (len(shape) - 1))
        if rows is None:
            return start, shape
        count = rows.stop - rows.start
        return ((0, rows.start), (shape[0], count)) if self.transposed else ((rows.start, 0), (count, shape[1]))

    def from_theirs(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Their tensors of one row of `tensors` as (one expert of) the canonical array; a view where it can be."""
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if self.row_order is not None:
            joined = joined[self.row_order]
        return joined.T if self.transposed else joined

    def to_theirs(self, block: np.ndarray) -> list[np.ndarray]:
        """The inverse of `from_theirs`."""
        joined = block.T if self.transposed else block
        if self.row_order is not None:
            joined = joined[np.argsort(self.row_order)]
        return [contiguous(part) for part in np.split(joined, len(self.tensors[0]))]

    def scales_shape(self, block: tuple[int, int]) -> tuple[int, ...]:
        """Shape of all scales of the array, as `scales_from_theirs` lays them out, experts stacked."""
        rows, columns = scale_shape(self.tensor_shape, block)
        shape = (columns, rows * len(self.tensors[0]))
        return (len(self.tensors), *shape) if self.stacked else shape

    def scales_from_theirs(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Scales of 128×128 blocks, per tensor `[out/128, in/128]`, side by side as `from_theirs` puts the tensors.

        Rows of theirs that change places do not take their scales along: a scale belongs to a block of their rows.
        """
        return np.concatenate(parts).T

    def scales_to_theirs(self, scales: np.ndarray) -> list[np.ndarray]:
        """The inverse of `scales_from_theirs`."""
        return np.split(scales.T, len(self.tensors[0]))


def entries(config: ModelConfig, *, rope_interleaved: bool = True) -> dict[str, Entry]:
    """Every canonical array of a model by its name, router biases included, in the order of the layers.

    `rope_interleaved` is whether their rotary rows pair neighbours, as all published ones do.
    """
    order = _row_orders(config.attention) if rope_interleaved else {}
    table = {}
    for name, spec in canonical_specs(config).items():
        prefix, template = _their_names(config, name)
        experts = range(spec.shape[0]) if len(spec.shape) == 3 else (0,)
        tensors = tuple(tuple(prefix + part.format(expert=expert) for part in template) for expert in experts)
        rotary = next((order[suffix] for suffix in order if name.endswith(suffix)), None)
        table[name] = Entry(name, spec, tensors, _copies(config, name), rotary)
    return table


@functools.cache
def canonical_specs(config: ModelConfig) -> dict[str, ParameterSpec]:
    """Declaration of every canonical array by its name: the embedding, the layers in order, MTP, final norm, head."""
    model, placement = Transformer(config), place(config)
    specs: dict[str, ParameterSpec] = {}
    layers: dict[str, dict[str, ParameterSpec]] = {}
    for kind in (parameter_specs(model), parameter_specs(model, RouterBias)):
        for path, spec in flatten(kind).items():
            stack, _, rest = path.partition(".")
            if stack not in KINDS:
                specs[path] = spec
                continue
            for _, _, layer in placement.layers(stack):
                layers.setdefault(layer, {})[rest] = spec
    ordered = {"embedding.weight": specs.pop("embedding.weight")}
    for layer in _layer_names(config):
        ordered |= {f"{layer}.{path}": spec for path, spec in layers[layer].items()}
    return ordered | specs


def _layer_names(config: ModelConfig) -> Iterator[str]:
    yield from (f"layers.{index}" for index in range(config.num_layers))
    yield from (f"mtp.{depth}" for depth in range(config.mtp_depth))


def _their_names(config: ModelConfig, name: str) -> tuple[str, tuple[str, ...]]:
    """The prefix and the templates of the tensors of a canonical array."""
    if name in ENDS:
        return "", ENDS[name]
    kind, index, path = name.split(".", 2)
    number = int(index) + (config.num_layers if kind == "mtp" else 0)
    return f"model.layers.{number}.", (MTP if kind == "mtp" else LAYER)[path]


def _copies(config: ModelConfig, name: str) -> tuple[str, ...]:
    """The tensors of MTP modules that repeat a canonical array of the main model."""
    tied = {"head.weight": "embedding.weight"} if config.tie_embeddings else {}
    return tuple(
        f"model.layers.{config.num_layers + depth}.{copy}"
        for depth in range(config.mtp_depth)
        for copy, shared in MTP_COPIES.items()
        if tied.get(shared, shared) == name
    )


def _row_orders(attention: AttentionConfig) -> dict[str, np.ndarray]:
    """For each rotary matrix, the order in which to take the rows of theirs."""
    size = attention.qk_rope_head_dim
    half_split = np.concatenate([np.arange(0, size, 2), np.arange(1, size, 2)])
    head = np.concatenate([np.arange(attention.qk_nope_head_dim), attention.qk_nope_head_dim + half_split])
    queries = (np.arange(attention.num_heads)[:, None] * attention.qk_head_dim + head).ravel()
    latent = np.concatenate([np.arange(attention.kv_lora_rank), attention.kv_lora_rank + half_split])
    return dict(zip(_ROTARY, (queries, queries, latent), strict=True))
