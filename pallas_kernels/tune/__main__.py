"""`python -m pallas_kernels.tune`: the checks, the timings and the table of the GPU at hand, see the package."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from pallas_kernels import device_tables
from pallas_kernels import tune as tune_package
from pallas_kernels.device_tables import FIELDS, DeviceTable, Matmul, TableError
from pallas_kernels.implementation import not_hopper
from pallas_kernels.target import target
from pallas_kernels.tune.checks import run_checks
from pallas_kernels.tune.products import Product, all_products
from pallas_kernels.tune.search import Tuned, tune

KERNELS = {
    None: "block_scaled_matmul",
    "Fprop": "grouped_matmul",
    "Dgrad": "grouped_matmul_dx",
    "Wgrad": "grouped_matmul_dw",
}
"""Whose checks a product rests on: with groups that of its name, without them the first."""
HEAD = ("product", "operands", "M×N×K", "groups", "chosen", "µs (spread)", "TFLOP/s", "default", "without the kernel")


def main(argv: Sequence[str]) -> int:
    """Runs the command line; the exit code."""
    options = _parser().parse_args(argv)
    obstacle = not_hopper() or _no_references() or _not_writable(options.to)
    if obstacle is not None:
        print(f"pallas_kernels.tune: nothing to tune here: {obstacle}", file=sys.stderr)
        return 2
    device = target()
    print(f"{device.kind}, jax {jax.__version__}\n", flush=True)
    with device_tables.ignored():
        passed = run_checks(say=lambda line: print(line, flush=True))
        table = DeviceTable(device.kind, jax.__version__, datetime.date.today().isoformat(), passed)
        table = dataclasses.replace(table, matmuls=() if options.again else _known(options.to, device.kind))
        path = table.write(options.to)
        for product in [] if options.checks_only else _to_measure(table):
            table = _with(table, product, options)
            table.write(options.to)  # At once: the next one may take long.
    print(f"\nwrote {path}: {len(passed)} kernels passed, {len(table.matmuls)} matmuls are measured")
    return 0


def _no_references() -> str | None:
    try:
        jax.devices("cpu")
    except RuntimeError:
        return "references run on the CPU, and jax was told to have none: set JAX_PLATFORMS=cuda,cpu"
    return None


def _not_writable(folder: Path) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"the table cannot be written to {folder} ({error.strerror}): name another folder with --to"


def _known(folder: Path, kind: str) -> tuple[tuple[Matmul, Mapping[str, int]], ...]:
    """What was measured before by this jax; a file that is no table is as good as none."""
    try:
        table = device_tables.read(folder / device_tables.file_name(kind))
    except (TableError, OSError):
        return ()
    return table.matmuls if table.jax == jax.__version__ else ()


def _to_measure(table: DeviceTable) -> list[Product]:
    """Products of kernels that passed, and that are not in the table."""
    known = {matmul for matmul, _ in table.matmuls}
    print("\n" + _line(HEAD) + "\n" + _line(["---"] * len(HEAD)), flush=True)
    return [
        product
        for product in all_products()
        if KERNELS[None if product.groups is None else product.name] in table.passed and product.matmul not in known
    ]


def _with(table: DeviceTable, product: Product, options: argparse.Namespace) -> DeviceTable:
    """The table with one product more, if its kernel gives the product."""
    try:
        tuned = tune(product, target().sms, tilings=options.tilings, calls=options.calls)
    except Exception as error:  # Whatever a compiler or a driver raises: there is no config to keep.
        line = (str(error).splitlines() or [""])[0]
        print(f"{product}: {type(error).__name__}: {line}", file=sys.stderr)
        return table
    print(_line(_cells(product, tuned)), flush=True)
    cut = {field: getattr(tuned.config, field) for field in FIELDS}
    return dataclasses.replace(table, matmuls=(*table.matmuls, (product.matmul, cut)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.tune", description=tune_package.__doc__)
    parser.add_argument(
        "--to", type=Path, default=device_tables.FOLDER, help="folder of tables (default: the package's)"
    )
    parser.add_argument("--tilings", type=_positive, default=8, help="tiles and clusters to time of each matmul")
    parser.add_argument("--calls", type=_positive, default=20, help="timed calls of each")
    parser.add_argument("--again", action="store_true", help="measure what the table has already, too")
    parser.add_argument("--checks_only", action="store_true", help="time nothing more")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _cells(product: Product, tuned: Tuned) -> tuple[str, ...]:
    config, times = tuned.config, tuned.chosen
    groups = "" if product.groups is None else f"{product.groups} × {product.rows}"
    return (
        product.name,
        product.operands.name,
        f"{product.all_rows}×{product.n}×{product.k}",
        groups,
        f"{config.tile_m}×{config.tile_n}, {config.stages} stages, cluster {config.cluster}, swath {config.swath}",
        f"{times.median:.1f} ({times.spread:.1f}){'' if times.clock == 'GPU' else ' by the clock of the host'}",
        f"{product.flops / times.median / 1e6:.0f}",
        f"{tuned.default.median / times.median:.2f} times",
        f"{tuned.portable.median / times.median:.2f} times",
    )


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
