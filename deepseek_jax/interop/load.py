"""Weights from a Hugging Face folder (`deepseek_jax.load`) or a checkpoint straight into the arrays of a mesh.

Each tensor is read once, decoded, and written into the shards that hold it. Host memory holds one expert or one matrix
at a time beside what the devices hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from deepseek_jax.config import ConfigError, ModelConfig
from deepseek_jax.inference.language_model import LanguageModel
from deepseek_jax.interop.host import one_ahead
from deepseek_jax.interop.huggingface import HuggingFaceFolder
from deepseek_jax.interop.progress import ByteProgress
from deepseek_jax.interop.tokenizer_files import read_add_bos, read_chat_template, read_stop_ids, read_tokenizer
from deepseek_jax.interop.weights import WeightSource, pieces, read, source_bytes
from deepseek_jax.model.parameters import RouterBias, parameter_specs
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.filling import StackFiller
from deepseek_jax.parallel.mesh import AXES, mesh_of
from deepseek_jax.parallel.placement import ParameterLayout, place
from deepseek_jax.tree import Tree, flatten, unflatten


def load(folder: str | Path, *, dtype=None, mesh: Mesh | None = None, progress: bool = True) -> LanguageModel:
    """A model from a Hugging Face folder, with its tokenizer.

    Args:
      folder: safetensors and config.json of DeepSeek-V3, V2 or a relative; its weights in BF16, FP16, float32, or FP8
        with scales by block.
      dtype: of the weights and the computation; None takes the embedding's own, so BF16 for the released FP8 folders.
        Norms and the router are float32 whatever it is.
      mesh: where the weights go (see `parallel.mesh`): experts are split over `expert`, all else is copied to every
        device. None takes the first device.
      progress: show a bar, in bytes.

    Raises:
      InteropError: the folder lacks a tensor, holds one too many, is damaged, or is of an architecture that is not
        supported; its chat template is broken.
      DataError: its tokenizer.json cannot be used.
      ConfigError: it is in the cloud; the tokenizer has more tokens than the model; the mesh has other axes, several
        stages or does not divide the experts; `dtype` is none of floats.
    """
    mesh = mesh_of(np.asarray(jax.devices()[:1]).reshape(1, 1, 1, 1)) if mesh is None else mesh
    dtype = None if dtype is None else _float(dtype)
    if set(mesh.axis_names) != set(AXES):
        raise ConfigError(
            f"the mesh has the axes {', '.join(map(str, mesh.axis_names))}; make it with "
            f"deepseek_jax.parallel.mesh.mesh_of, from devices in the shape [{', '.join(AXES)}]"
        )
    if mesh.shape["pipe"] != 1:
        raise ConfigError(
            f"a model is loaded onto one pipeline stage: make the mesh with pipe=1, not {mesh.shape['pipe']}"
        )
    with HuggingFaceFolder(folder) as source:
        _check_split(source.model, mesh)
        tokenizer, template = read_tokenizer(source.path), read_chat_template(source.path)
        if tokenizer is not None and tokenizer.vocab_size > source.model.vocab_size:
            raise ConfigError(
                f"{tokenizer.name} has {tokenizer.vocab_size} tokens, and the model's vocab_size is "
                f"{source.model.vocab_size}, so it is another model's: put the right one there, or take it away"
            )
        if dtype is None:
            stored = source.form(source.entries["embedding.weight"]).dtype
            dtype = jnp.float32 if stored == np.float64 else stored
        model = load_transformer(source, mesh, dtype=dtype, progress=progress)
        stops = read_stop_ids(source) or (() if tokenizer is None else (tokenizer.eos_id,))
        add_bos = read_add_bos(source.path)
        return LanguageModel(model, tokenizer, template, stop_ids=stops, add_bos=add_bos, name=str(source.path))


def _float(dtype: Any) -> jnp.dtype:
    """`dtype`, if weights can be of it. Raises `ConfigError`."""
    floats = ("bfloat16", "float16", "float32", *(("float64",) if jax.config.read("jax_enable_x64") else ()))
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in floats:
        raise ConfigError(f"dtype must be one of {', '.join(floats)}, not {found.name if found else repr(dtype)}")
    return found


def _check_split(model: ModelConfig, mesh: Mesh) -> None:
    """Raises `ConfigError` unless the mesh divides the experts."""
    ranks = mesh.shape["node"] * mesh.shape["expert"]
    if (model.num_moe_layers or model.mtp_depth) and model.moe.num_experts % ranks:
        raise ConfigError(
            f"{model.moe.num_experts} experts cannot be split evenly over {ranks} devices (node "
            f"{mesh.shape['node']} x expert {mesh.shape['expert']}); make the mesh with a divisor"
        )


def load_transformer(source: WeightSource, mesh: Mesh, *, dtype, progress: bool = False) -> Transformer:
    """The model with the weights of `source` on a mesh of one stage, ready to be called."""
    model, placement = Transformer(source.model), place(source.model)
    layouts = [ParameterLayout(parameter_specs(model, kind), placement, mesh) for kind in (nnx.Param, RouterBias)]
    params, bias = (filler.finish(drop_stage=True) for filler in fill(source, *layouts, dtype=dtype, progress=progress))
    return nnx.merge(nnx.graphdef(model), unflatten({**flatten(params), **flatten(bias)}))


def load_state(
    source: WeightSource, params: ParameterLayout, bias: ParameterLayout, *, dtype=jnp.float32
) -> tuple[Tree, Tree]:
    """The parameters and router biases that a training run starts from, as it stacks them."""
    return tuple(
        filler.finish() for filler in fill(source, params, bias, dtype=dtype, progress=jax.process_index() == 0)
    )


def fill(
    source: WeightSource, params: ParameterLayout, bias: ParameterLayout, *, dtype, progress: bool
) -> tuple[StackFiller, StackFiller]:
    """Reads what this process's devices hold of `source` into new arrays of the two layouts."""
    wide = jnp.promote_types(dtype, jnp.float32)

    def filler_of(layout: ParameterLayout) -> StackFiller:
        specs = flatten(layout.specs)
        return StackFiller(layout, {n: wide if s.full_precision else jnp.dtype(dtype) for n, s in specs.items()})

    weights, biases = filler_of(params), filler_of(bias)

    def decoded() -> Iterator[tuple[StackFiller, str, tuple[int, ...], np.ndarray | None, int]]:
        for name, entry in source.entries.items():
            filler = biases if name.endswith("router.bias") else weights
            target = np.dtype(wide if entry.spec.full_precision else dtype)
            for row, rows in pieces(entry, source.form(entry)):
                start, shape = entry.box(row, rows)
                piece = None
                if filler.wants(name, start, shape):
                    tensors = read(source, entry, row, rows)
                    piece = entry.from_theirs([tensor.decoded(target) for tensor in tensors]).reshape(shape)
                yield filler, name, start, piece, int(np.prod(shape)) * source.form(entry).dtype.itemsize

    with ByteProgress("loading", source_bytes(source), quiet=not progress) as done:
        for filler, name, start, piece, size in one_ahead(decoded()):
            if piece is not None:
                filler.put(name, start, piece)
            done.add(size)
    return weights, biases
