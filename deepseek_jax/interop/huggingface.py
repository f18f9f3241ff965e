"""A Hugging Face folder as a source of weights: checked whole before any weight is read.

    config.json                    the architecture: read from its fields, never guessed from a name
    model.safetensors.index.json   which file holds which tensor, where there are several
    model-00001-of-00163.safetensors …
    tokenizer.json, generation_config.json, …

Nothing in the folder is ever executed.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from deepseek_jax.config import ModelConfig
from deepseek_jax.interop.architecture import read_architecture, rope_interleaved
from deepseek_jax.interop.errors import InteropError
from deepseek_jax.interop.fp8 import BLOCK, E4M3, scale_shape
from deepseek_jax.interop.layout import Entry, entries
from deepseek_jax.interop.quantization import Quantization, read_quantization
from deepseek_jax.interop.safetensors import TensorFolder
from deepseek_jax.interop.weights import Form
from deepseek_jax.paths import local_path
from deepseek_jax.wording import first_few

SCALE_SUFFIX = "_scale_inv"
_FLOATS = ("float32", "bfloat16", "float16", "float64")
_SCALES = ("float32", "bfloat16", "float8_e8m0fnu")
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")
"""Buffers that some folders hold although they follow from the config."""


class HuggingFaceFolder:
    """A folder of DeepSeek weights, opened. Raises `InteropError` unless every tensor of the architecture is there, in
    its shape and a dtype that can be read, and no other.
    """

    compute: np.dtype | None = None
    """See `WeightSource`: a folder does not say."""

    def __init__(self, folder: str | Path, *, check: bool = True):
        """Opens and checks a folder; `check=False` leaves it to the caller to look at `problems`."""
        self.path = Path(local_path(folder, "the Hugging Face folder"))
        self.config = read_json(self.path / "config.json")
        source = str(self.path / "config.json")
        self.tensors = TensorFolder(self.path)
        self.model = self._without_absent_mtp(read_architecture(self.config, source=source))
        self.quantization = read_quantization(self.config, source=source)
        if self.quantization is None and any(info.dtype == E4M3 for info in self.tensors.values()):
            self.quantization = Quantization()
        self.entries: Mapping[str, Entry] = entries(self.model, rope_interleaved=rope_interleaved(self.config))
        if check and (problems := self.problems()):
            raise InteropError(
                f"{self.path} does not hold the model that its config.json describes; {'; '.join(problems)}"
            )

    def form(self, entry: Entry) -> Form:
        """How the tensors of `entry` are stored; all of them alike."""
        name = entry.tensors[0][0]
        scales = self.tensors[name + SCALE_SUFFIX].dtype if name + SCALE_SUFFIX in self.tensors else None
        return Form(self.tensors[name].dtype, scales)

    def values(self, entry: Entry, row: int, rows: slice | None = None) -> list[np.ndarray]:
        """The tensors `entry.tensors[row]`, or these rows of it, read from the disk.

        Raises `InteropError` where an MTP module's own embedding or head is another than the main model's: the
        architecture shares them, so what differs could not be kept.
        """
        values = [self.tensors.read(name, rows) for name in entry.tensors[row]]
        for copy in entry.copies:
            if copy in self.tensors and self.tensors.read(copy, rows).tobytes() != values[0].tobytes():
                raise InteropError(
                    f"{self.path}: {copy} differs from {entry.tensors[0][0]}; MTP shares it with the main model "
                    "(section 2.2), so both cannot be kept"
                )
        return values

    def scales(self, entry: Entry, row: int) -> list[np.ndarray]:
        """The scales of these tensors, which are FP8."""
        return [self.tensors.read(name + SCALE_SUFFIX) for name in entry.tensors[row]]

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Another document of the folder, or None where it is not there."""
        return read_json(self.path / name) if (self.path / name).exists() else None

    def close(self) -> None:
        """Closes the files."""
        self.tensors.close()

    def __enter__(self) -> HuggingFaceFolder:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    @property
    def _block(self) -> tuple[int, int]:
        return BLOCK if self.quantization is None else self.quantization.block

    def _without_absent_mtp(self, model: ModelConfig) -> ModelConfig:
        """The architecture without MTP where the folder has none of it: `transformers` writes the number of modules
        into config.json, and leaves their weights out.
        """
        mtp = re.compile(r"model\.layers\.(\d+)\.")
        layers = {int(found[1]) for name in self.tensors if (found := mtp.match(name))}
        if not model.mtp_depth or any(layer >= model.num_layers for layer in layers):
            return model
        logging.info("%s: config.json names %d MTP modules, of which no weight is there", self.path, model.mtp_depth)
        return dataclasses.replace(model, mtp_depth=0)

    def problems(self) -> list[str]:
        """How what is there differs from what the architecture needs: a line for each kind of difference."""
        wanted: dict[str, tuple[int, ...]] = {}
        dtypes: list[str] = []
        for entry in self.entries.values():
            names = [name for row in entry.tensors for name in row]
            wanted.update(dict.fromkeys(names, entry.tensor_shape))
            wanted.update({copy: entry.tensor_shape for copy in entry.copies if copy in self.tensors})
            dtypes += self._check_dtypes(entry, [name for name in (*names, *entry.copies) if name in self.tensors])
        for name in [name for name in wanted if name in self.tensors and self.tensors[name].dtype == E4M3]:
            wanted[name + SCALE_SUFFIX] = scale_shape(wanted[name], self._block) if len(wanted[name]) == 2 else (-1,)
        missing = [name for name in wanted if name not in self.tensors]
        left_over = [name for name in self.tensors if name not in wanted and not _DERIVED.search(name)]
        shapes = [
            f"{name} {list(self.tensors[name].shape)}, not {list(shape)}"
            for name, shape in wanted.items()
            if name in self.tensors and self.tensors[name].shape != shape
        ]
        findings = (
            ("missing", missing),
            ("left over", left_over),
            ("of another shape", shapes),
            ("of an unexpected dtype", dtypes),
        )
        return [f"{_counted(names)} {what}: {first_few(names)}" for what, names in findings if names]

    def _check_dtypes(self, entry: Entry, names: Sequence[str]) -> list[str]:
        """What is wrong with the dtypes of these tensors, in words."""
        found = []
        first = self.tensors.get(names[0] + SCALE_SUFFIX) if names else None
        for name in names:
            dtype = self.tensors[name].dtype
            if dtype != self.tensors[names[0]].dtype:
                found.append(f"{name} ({dtype.name}, but {names[0]} is {self.tensors[names[0]].dtype.name})")
            elif dtype == E4M3:
                scale = self.tensors.get(name + SCALE_SUFFIX)
                if not entry.transposed:
                    found.append(f"{name} ({dtype.name}, but only linear layers can be FP8)")
                elif scale is not None and scale.dtype.name not in _SCALES:
                    found.append(f"{scale.name} ({scale.dtype.name}, not {' or '.join(_SCALES)})")
                elif scale is not None and first is not None and scale.dtype != first.dtype:
                    found.append(f"{scale.name} ({scale.dtype.name}, but {first.name} is {first.dtype.name})")
            elif dtype.name not in _FLOATS:
                found.append(f"{name} ({dtype.name}, not {', '.join(_FLOATS)} or float8_e4m3fn)")
        return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `InteropError` if it is not there, or is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InteropError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InteropError(f"{path} is no JSON ({error})") from None
    if not isinstance(document, dict):
        raise InteropError(f"{path} is no JSON object")
    return document


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s are' if len(names) > 1 else ' is'}"
