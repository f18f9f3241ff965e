"""Converts weights between Hugging Face folders and checkpoints, and between FP8 and BF16; looks into them; compares.

    python -m tools.convert to-checkpoint DeepSeek-V2-Lite/ v2_lite/
    python -m tools.convert to-hf runs/tiny.pretrain exported/ --precision bfloat16
    python -m tools.convert to-hf DeepSeek-V3/ DeepSeek-V3-bf16/ --precision bfloat16
    python -m tools.convert to-hf DeepSeek-V3-bf16/ DeepSeek-V3-fp8/ --precision fp8
    python -m tools.convert inspect DeepSeek-V3/
    python -m tools.convert verify DeepSeek-V3/ DeepSeek-V3-bf16/

One tensor is in memory at a time, whatever the model's size. What is written appears under its name only when it is
whole, and nothing that exists is overwritten.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.config import ConfigError
from deepseek_jax.data import DataError, Tokenizer
from deepseek_jax.interop.errors import InteropError
from deepseek_jax.interop.huggingface import HuggingFaceFolder
from deepseek_jax.interop.progress import ByteProgress
from deepseek_jax.interop.safetensors import INDEX, TensorInfo
from deepseek_jax.interop.save import PRECISIONS, check_room, convert, put_file, save
from deepseek_jax.interop.tokenizer_files import tokenizer_files
from deepseek_jax.interop.weights import WeightSource, pieces, read, source_bytes
from deepseek_jax.paths import local_path, new_folder
from deepseek_jax.training.checkpoint import CheckpointError
from deepseek_jax.training.weights import CheckpointWeights, tokenizer_of, write_checkpoint
from deepseek_jax.wording import first_few
from experiments.run import return_freed_memory

CARRIED = "huggingface"
"""The folder beside a converted checkpoint that keeps the other files of the Hugging Face folder."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv` (without the program's name) and returns the exit code."""
    options = _parser().parse_args(argv)
    with _interruptible() as interrupted:
        try:
            return options.run(options)
        except (ConfigError, InteropError, CheckpointError, DataError, OSError) as error:
            if not interrupted:  # or what was at work when it came has said that it failed
                print(f"error: {error}", file=sys.stderr)
                return 1
        except KeyboardInterrupt:
            pass
    print("stopped; nothing is left behind", file=sys.stderr)
    return 130


@contextlib.contextmanager
def _interruptible() -> Iterator[list[int]]:
    """SIGINT and SIGTERM raise `KeyboardInterrupt` in here; gives the signals that came.

    With Python's own handler asyncio would take SIGINT for itself, and end a write in a way that looks like a failure.
    """
    came: list[int] = []

    def interrupt(number, frame) -> None:
        del frame
        came.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run, text: str, *arguments: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        for argument in arguments:
            command.add_argument(argument)
        return command

    source = "a Hugging Face folder, a run's folder or one of checkpoints"
    to_checkpoint = add("to-checkpoint", _to_checkpoint, f"write SOURCE ({source}) as a checkpoint", "source", "target")
    to_hf = add("to-hf", _to_hf, f"write SOURCE ({source}) as a Hugging Face folder", "source", "target")
    to_hf.add_argument("--precision", choices=PRECISIONS, help="default: keep, or bfloat16 for what was trained here")
    to_hf.add_argument("--shard_gb", type=float, default=5.0, help="size of a file of weights, in GB; default 5")
    for command in (to_checkpoint, to_hf):
        command.add_argument("--step", type=int, help="which checkpoint; default: the newest")
        command.add_argument("--average", action="store_true", help="the moving average of a checkpoint's weights")
        command.add_argument("--verify", action="store_true", help="read what was written again, and compare")
    inspect = add(
        "inspect", _inspect, "list the tensors of a Hugging Face folder, and what is wrong with them", "source"
    )
    inspect.add_argument("--all", action="store_true", help="a line for each tensor, not for each kind")
    verify = add("verify", _verify, "compare TARGET with SOURCE, from which it was converted", "source", "target")
    verify.add_argument("--step", type=int, help="which checkpoint of SOURCE; default: the newest")
    verify.add_argument("--average", action="store_true", help="compare with the moving average of SOURCE's weights")
    return parser


# --- commands -------------------------------------------------------------------------------------------------------


def _to_checkpoint(options: argparse.Namespace) -> int:
    with (
        _open(options.source, options.step, average=options.average) as source,
        new_folder(options.target, "the checkpoint folder") as folder,
    ):
        check_room(folder, source_bytes(source))
        write_checkpoint(source, folder, config=source.config)
        others = _other_files(source)
        if others:
            (folder / CARRIED).mkdir()
        for name, content in others.items():
            put_file(folder / CARRIED / name, content)
        if "tokenizer.json" in others:
            shutil.copyfile(folder / CARRIED / "tokenizer.json", folder / "tokenizer.json")
    print(f"wrote {options.target}; start from it with --init_from {options.target}")
    return _verify(options) if options.verify else 0


def _to_hf(options: argparse.Namespace) -> int:
    if not 1 <= options.shard_gb * 1e9 < math.inf:
        raise ConfigError(f"--shard_gb must be positive, not {options.shard_gb}")
    with _open(options.source, options.step, average=options.average) as source:
        trained_here = source.config is None
        save(
            source,
            options.target,
            precision=options.precision or ("bfloat16" if trained_here else "keep"),
            config=source.config,
            files=_other_files(source),
            shard_bytes=int(options.shard_gb * 1e9),
        )
    print(f"wrote {options.target}")
    return _verify(options) if options.verify else 0


def _inspect(options: argparse.Namespace) -> int:
    with HuggingFaceFolder(options.source, check=False) as folder:
        rows = list(folder.tensors.values())
        for line in _table([[info] for info in rows] if options.all else _by_kind(rows)):
            print(line)
        total, files = sum(info.nbytes for info in rows), len({info.file for info in rows})
        print(f"\n{len(rows):,} tensors, {total / 1e9:,.2f} GB in {files} file{'s' * (files > 1)}")
        problems = folder.problems()
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        return 1 if problems else 0


def _verify(options: argparse.Namespace) -> int:
    """Compares every tensor of the target with the source's in the target's form, bit for bit."""
    with _open(options.source, options.step, average=options.average) as source, _open(options.target) as target:
        if source.model != target.model:
            raise InteropError(f"{options.target} holds another architecture than {options.source}")
        differing: dict[str, None] = {}  # each once, in order: a huge tensor is compared in pieces
        with ByteProgress("comparing", source_bytes(target)) as done:
            for entry in source.entries.values():
                theirs = target.entries[entry.name]
                form = target.form(theirs)
                for row, rows in pieces(entry, source.form(entry), form):
                    pairs = zip(read(source, entry, row, rows), read(target, theirs, row, rows), strict=True)
                    for name, (wanted, found) in zip(entry.tensors[row], pairs, strict=True):
                        values, scales = convert(name, wanted, form, source.quantization, target.quantization)
                        if not (_equal(values, found.values) and _equal(scales, found.scales)):
                            differing[name] = None
                        done.add(found.values.nbytes)
    if differing:
        raise InteropError(f"{len(differing)} tensors differ: {first_few(differing)}")
    print(f"{options.target} holds what {options.source} holds")
    return 0


# --- parts ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _open(
    name: str, step: int | None = None, *, average: bool = False
) -> Iterator[HuggingFaceFolder | CheckpointWeights]:
    """A Hugging Face folder where there are safetensors, else a checkpoint."""
    path = Path(local_path(name, "the source"))
    if not path.exists():
        raise InteropError(f"{path} does not exist")
    if (path / INDEX).exists() or any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        if step is not None:
            raise ConfigError(f"--step chooses a checkpoint, and {path} is a Hugging Face folder")
        if average:
            raise ConfigError(f"--average takes a checkpoint's, and {path} is a Hugging Face folder")
        with HuggingFaceFolder(path) as folder:
            yield folder
    else:
        yield CheckpointWeights(path, step, average=average)


def _other_files(source: HuggingFaceFolder | CheckpointWeights) -> dict[str, Path | bytes]:
    """What else belongs into a Hugging Face folder: tokenizer, templates, generation config, license, …"""
    folder = source.path if isinstance(source, HuggingFaceFolder) else source.path / CARRIED
    if folder.exists():
        return {
            path.name: path
            for path in sorted(folder.iterdir())
            if path.is_file() and not path.name.startswith(".")
            and path.suffix not in _WEIGHTS and path.name not in ("config.json", INDEX)
        }  # fmt: skip
    found = tokenizer_of(source.path)
    if found is None:
        return {}
    documents = tokenizer_files(Tokenizer.load(found), max_length=_reach(source))
    texts = {name: (json.dumps(document, indent=2) + "\n").encode() for name, document in documents.items()}
    return {"tokenizer.json": found, **texts}


def _reach(source: WeightSource) -> int:
    """How many tokens a text may have."""
    yarn = source.model.attention.yarn
    return 4096 if yarn is None else round(yarn.original_length * yarn.factor)


def _equal(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def _by_kind(rows: Sequence[TensorInfo]) -> list[list[TensorInfo]]:
    """Tensors that differ in the numbers of their names only, and agree in shape and dtype."""
    kinds: dict[Any, list[TensorInfo]] = {}
    for info in rows:
        kinds.setdefault((re.sub(r"\.\d+\.", ".*.", info.name), info.shape, info.dtype), []).append(info)
    return list(kinds.values())


def _table(kinds: Sequence[Sequence[TensorInfo]]) -> Iterator[str]:
    lines = [("tensor", "number", "shape", "dtype", "MB")]
    for kind in kinds:
        shape = " x ".join(map(str, kind[0].shape)) or "scalar"
        size = sum(info.nbytes for info in kind) / 1e6
        lines.append(
            (_ranges([info.name for info in kind]), f"{len(kind):,}", shape, kind[0].dtype.name, f"{size:,.2f}")
        )
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    for name, *rest in lines:
        yield "  ".join(
            [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        )


def _ranges(names: Sequence[str]) -> str:
    """One name for many: `model.layers.3-60.mlp.experts.0-255.up_proj.weight`."""
    parts = [re.findall(r"\.(\d+)(?=\.)", name) for name in names]
    spans = iter([(min(map(int, column)), max(map(int, column))) for column in zip(*parts, strict=True)])

    def span(_: re.Match) -> str:
        low, high = next(spans)
        return f".{low}" if low == high else f".{low}-{high}"

    return re.sub(r"\.\d+(?=\.)", span, names[0])


if __name__ == "__main__":
    return_freed_memory()
    sys.exit(main(sys.argv[1:]))
