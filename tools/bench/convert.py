"""Benchmark: conversion of checkpoints of more than 20 GB, in memory and in bytes per second beside a plain copy.

    python -m tools.bench.convert --folder=/a/disk/with/75/GB [--write]

Two folders of random weights are made and deleted again: DeepSeek-V3's width, names and FP8 with fewer layers and
experts, and V2-Lite's own shapes in BF16. Every conversion is a process of its own (`tools.convert`), whose anonymous
memory (RssAnon) is looked at ten times a second. Times end when everything is on the disk (`sync`).
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import app, flags

from deepseek_jax import zoo
from deepseek_jax.config import ModelConfig
from deepseek_jax.interop.architecture import write_architecture
from deepseek_jax.interop.fp8 import BLOCK, E4M3, scale_shape
from deepseek_jax.interop.layout import Entry, entries
from deepseek_jax.interop.quantization import Quantization, write_quantization
from deepseek_jax.interop.safetensors import FolderWriter
from tools.bench.common import machine

RESULT = Path(__file__).parent / "results" / "convert.md"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_NOISE_BYTES = 1 << 26

_FOLDER = flags.DEFINE_string(
    "folder", None, "an existing folder on the disk to measure, with 75 GB free", required=True
)
_SMALL = flags.DEFINE_bool("small", False, "a thousandth of the sizes: tries the benchmark, measures nothing")
_WRITE = flags.DEFINE_bool("write", False, f"write the table to {RESULT.name} in tools/bench/results")


@dataclasses.dataclass(frozen=True)
class Row:
    """One thing that was done."""

    what: str
    read: int
    written: int
    seconds: float
    peak: int | None = None
    """Largest RssAnon, in bytes."""


def main(argv: list[str]) -> None:
    """Measures, prints the table, and with `--write` keeps it."""
    del argv
    folder = Path(_FOLDER.value) / "deepseek_jax_convert"
    folder.mkdir()
    try:
        tables = [
            measure(folder, v3_shape(), Quantization(), ["to-checkpoint", "to-hf --precision bfloat16"]),
            measure(folder, v2_lite_shape(), None, ["to-hf", "to-checkpoint"]),
        ]
    finally:
        shutil.rmtree(folder)
    text = report(tables)
    print(text)
    if _WRITE.value:
        RESULT.write_text(text)


def v3_shape() -> ModelConfig:
    """V3 with one dense, one MoE and one MTP layer, 192 of 256 experts: 21 GB in FP8."""
    full = zoo.deepseek_v3(long_context=True)
    config = dataclasses.replace(
        full, num_layers=2, num_dense_layers=1, moe=dataclasses.replace(full.moe, num_experts=192)
    )
    if not _SMALL.value:
        return config
    return dataclasses.replace(
        config,
        hidden_size=224,
        vocab_size=4040,
        dense_ffn_size=576,
        moe=dataclasses.replace(config.moe, expert_ffn_size=64),
    )


def v2_lite_shape() -> ModelConfig:
    """V2-Lite as it is: 31 GB in BF16."""
    config = zoo.deepseek_v2_lite(long_context=True)
    return dataclasses.replace(config, hidden_size=64, vocab_size=3200) if _SMALL.value else config


def measure(
    folder: Path, model: ModelConfig, fp8: Quantization | None, conversions: Sequence[str]
) -> tuple[str, list[Row]]:
    """What was made, and what copying and converting it took."""
    source, target = folder / "source", folder / "target"
    largest = make(source, model, fp8)
    size = bytes_in(source)
    dtype = "FP8" if fp8 else "BF16"
    what = f"{model.hidden_size} wide, {dtype}, {size / 1e9:.1f} GB, largest tensor {largest / 1e9:.2f} GB"
    rows = [timed("plain copy", source, target, ["cp", "-r", str(source), str(target)])]
    for conversion in conversions:
        verb, *options = conversion.split()
        command = [sys.executable, "-m", "tools.convert", verb, str(source), str(target), *options]
        rows.append(timed(conversion, source, target, command))
    shutil.rmtree(source)
    return what, rows


def timed(what: str, source: Path, target: Path, command: Sequence[str]) -> Row:
    """Runs a command that makes `target` from `source`, and deletes the target."""
    os.sync()
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.1)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    os.sync()
    row = Row(what, bytes_in(source), bytes_in(target), time.perf_counter() - start, peak)
    print(f"{what}: {row.seconds:.0f} s", flush=True)
    shutil.rmtree(target)
    return row


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process; 0 where it has ended."""
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def bytes_in(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# --- random weights -------------------------------------------------------------------------------------------------


def make(folder: Path, model: ModelConfig, fp8: Quantization | None) -> int:
    """Writes a Hugging Face folder of random weights; returns the bytes of its largest tensor."""
    folder.mkdir()
    noise = Noise()
    forms = {name: form for entry in entries(model).values() for name, form in _forms(entry, fp8 is not None)}
    with FolderWriter(folder, forms) as writer:
        for name, (dtype, shape) in forms.items():
            writer.write(name, noise(np.dtype(dtype), shape))
    document = write_quantization({**write_architecture(model), "torch_dtype": "bfloat16"}, fp8)
    (folder / "config.json").write_text(json.dumps(document))
    return max(int(np.prod(shape)) * np.dtype(dtype).itemsize for dtype, shape in forms.values())


def _forms(entry: Entry, fp8: bool):
    for name in [name for row in entry.tensors for name in row] + list(entry.copies):
        if name.endswith("e_score_correction_bias"):
            yield name, (np.float32, entry.tensor_shape)
        elif fp8 and entry.may_be_fp8:
            yield name, (E4M3, entry.tensor_shape)
            yield f"{name}_scale_inv", (np.float32, scale_shape(entry.tensor_shape, BLOCK))
        else:
            yield name, (BFLOAT16, entry.tensor_shape)


class Noise:
    """Random weights of which none is infinite or NaN: parts of the same bytes, which no file system packs."""

    def __init__(self):
        words = np.random.default_rng(0).integers(0, 2**16, _NOISE_BYTES // 2, np.uint16)
        self._bytes = {
            E4M3: (words & np.uint16(0xBFBF)).view(np.uint8),
            BFLOAT16: (words & np.uint16(0xBFFF)).view(np.uint8),
            np.dtype(np.float32): (words[: 1 << 20].astype(np.float32) / 2**16).view(np.uint8),
        }

    def __call__(self, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """An array of a dtype and a shape."""
        data, size = self._bytes[dtype], int(np.prod(shape)) * dtype.itemsize
        return (data[:size] if size <= data.size else np.resize(data, size)).view(dtype).reshape(shape)


def report(tables: Sequence[tuple[str, list[Row]]]) -> str:
    """The page as it is kept."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "tensorstore"))
    lines = [
        "# Converting checkpoints",
        "",
        f"`python -m tools.bench.convert --folder=… --write` on {datetime.date.today()}, on {machine()}; {versions}. "
        "One run of each, with `sync` at its end; the rate counts the bytes of the source. "
        "Memory is the largest RssAnon of the process.",
    ]
    for what, rows in tables:
        lines += [
            "",
            f"## {what}",
            "",
            "| | GB read | GB written | s | MB/s of the source | to the copy, by bytes written | peak memory, MB |",
            "|---|---|---|---|---|---|---|",
        ]
        copy = rows[0]
        for row in rows:
            # A conversion that writes twice as much cannot be as fast as a copy: both are judged by what they write.
            ratio = (row.written / row.seconds) / (copy.written / copy.seconds)
            lines.append(
                f"| {row.what} | {row.read / 1e9:.1f} | {row.written / 1e9:.1f} | {row.seconds:.0f} "
                f"| {row.read / row.seconds / 1e6:,.0f} | {ratio:.2f} | {(row.peak or 0) / 1e6:,.0f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    app.run(main)
