"""What is known of a device: which kernels equal their references on it, and how they best cut their work.

A table is a JSON file that `python -m pallas_kernels.tune` writes on a GPU, one for each kind of device. A kernel is
chosen by itself only where a table, made with the same jax, says that it passed its checks; and a matmul is cut as the
table has it if one of the same widths was measured. Everything else follows the defaults by size. The files lie in
`pallas_kernels/measured`, and in the folder that the environment variable `PALLAS_KERNELS_TABLES` names, which comes
first.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.target import target

FOLDER = Path(__file__).parent / "measured"
"""Of the tables that come with the package."""
OWN_FOLDER = "PALLAS_KERNELS_TABLES"
"""The environment variable that names another."""
FIELDS = ("tile_m", "tile_n", "stages", "cluster", "swath")
"""Of a config that a table has."""
FACTOR = 2
"""A config serves matmuls of up to so many times the tokens that it was measured with, or as many times fewer."""


class TableError(ValueError):
    """A file is no table; one line that says where and what."""


@dataclasses.dataclass(frozen=True)
class Matmul:
    """A matmul, as far as the best way to cut it depends on it."""

    tokens: int
    """Rows of the result; in Wgrad what is summed over. It is what changes from batch to batch."""
    width: int
    """What is summed over; in Wgrad rows of the result."""
    columns: int
    """Of the result."""
    operands: str
    """Their dtype."""
    result: str
    """Its dtype."""
    transposed: bool = False
    """The right operand lies `[N, K]`, where a kernel reads either order."""
    sums_tokens: bool = False
    """It is a Wgrad."""
    groups: tuple[str, int, int] | None = None
    """What they are along, how many, and their alignment; see `Groups`."""


@dataclasses.dataclass(frozen=True)
class DeviceTable:
    """The contents of a file."""

    device: str
    """As jax names its kind."""
    jax: str
    """The version that compiled the kernels."""
    date: str
    """When, as `YYYY-MM-DD`."""
    passed: tuple[str, ...]
    """Ops whose kernels equalled their references."""
    matmuls: tuple[tuple[Matmul, Mapping[str, int]], ...] = ()
    """The fastest config of each that was measured, as `FIELDS`."""

    def config(self, matmul: Matmul) -> dict[str, int]:
        """That of the matmul measured whose tokens are nearest, all else being the same; empty if there is none."""

        def ratio(tokens: int) -> float:
            return max(tokens / matmul.tokens, matmul.tokens / tokens)

        def same(known: Matmul) -> bool:
            return dataclasses.replace(known, tokens=matmul.tokens) == matmul and ratio(known.tokens) <= FACTOR

        found = [(ratio(known.tokens), i) for i, (known, _) in enumerate(self.matmuls) if same(known)]
        return dict(self.matmuls[min(found)[1]][1]) if found else {}

    def write(self, folder: Path) -> Path:
        """Writes the file, whole or not at all, and returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / file_name(self.device)
        fields = dataclasses.asdict(self)
        fields["matmuls"] = [dataclasses.asdict(matmul) | {"config": dict(cut)} for matmul, cut in self.matmuls]
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
        draft.replace(path)
        return path


def file_name(device: str) -> str:
    """Of the table of a kind of device."""
    return re.sub(r"\W+", "_", device).strip("_").lower() + ".json"


def read(path: Path) -> DeviceTable:
    """Reads a file.

    Raises:
      TableError: if it is no such table.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        matmuls = tuple(_matmul(row) for row in fields.pop("matmuls"))
        table = DeviceTable(**fields | {"passed": tuple(fields["passed"]), "matmuls": matmuls})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TableError(
            f"{path} is no table of pallas_kernels ({type(error).__name__}: {error}); write it again with "
            "`python -m pallas_kernels.tune`, or remove it"
        ) from error
    if not all(isinstance(name, str) for name in (table.device, table.jax, table.date, *table.passed)):
        raise TableError(f"{path} is no table of pallas_kernels: device, jax, date and passed must be text")
    return table


def _matmul(row: dict[str, Any]) -> tuple[Matmul, dict[str, int]]:
    cut = row.pop("config")
    if sorted(cut) != sorted(FIELDS) or not all(type(size) is int for size in cut.values()):
        raise ValueError(f"a config has {', '.join(FIELDS)}, whole numbers each, not {cut}")
    groups = None if row["groups"] is None else tuple(row["groups"])
    matmul = Matmul(**row | {"groups": groups})
    if not all(type(size) is int and size > 0 for size in (matmul.tokens, matmul.width, matmul.columns)):
        raise ValueError(f"tokens, width and columns of a matmul are positive whole numbers: {matmul}")
    return matmul, cut


_IGNORED: contextvars.ContextVar[bool] = contextvars.ContextVar("ignored", default=False)


@contextlib.contextmanager
def ignored() -> Iterator[None]:
    """Within, there are no tables: kernels run where they are named, with the defaults by size."""
    token = _IGNORED.set(True)
    try:
        yield
    finally:
        _IGNORED.reset(token)


def of_device(kind: str) -> DeviceTable | None:
    """The table of a kind of device; None if there is none.

    Raises:
      TableError: if its file is no such table.
    """
    if _IGNORED.get():
        return None
    return _of_device(kind, os.environ.get(OWN_FOLDER))


@functools.cache
def _of_device(kind: str, own: str | None) -> DeviceTable | None:
    folders = [Path(own)] if own else []
    paths = (folder / file_name(kind) for folder in (*folders, FOLDER))
    path = next((path for path in paths if path.is_file()), None)
    return None if path is None else read(path)


def unproven(op: str) -> str | None:
    """Why the kernel of an op is not chosen by itself on the target device; None if it is."""
    device = target()
    if device.trusted:
        return None
    table, again = of_device(device.kind), "run `python -m pallas_kernels.tune` there"
    if table is None:
        return f"no table says that the kernel passed its checks on {device.kind}: {again}"
    if table.jax != jax.__version__:
        return f"the table of {device.kind} is of jax {table.jax}, and this is {jax.__version__}: {again}"
    if op not in table.passed:
        return f"the kernel of {op} did not pass its checks on {device.kind}, says its table of {table.date}"
    return None


def measured_config(matmul: Matmul) -> dict[str, int]:
    """How a matmul was fastest on the target device, as `FIELDS`; empty where nobody measured."""
    table = of_device(target().kind)
    return {} if table is None else table.config(matmul)
