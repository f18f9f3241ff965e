"""`python -m pallas_kernels.tune`: the checks, the timings and the table of the GPU at hand, see the package."""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from pallas_kernels import device_tables
from pallas_kernels.device_tables import FIELDS, DeviceTable, Matmul
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
    obstacle = not_hopper()
    if obstacle is not None:
        print(f"pallas_kernels.tune: nothing to tune here: {obstacle}", file=sys.stderr)
        return 2
    device = target()
    print(f"{device.kind}, jax {jax.__version__}\n", flush=True)
    passed = run_checks(say=lambda line: print(line, flush=True))
    matmuls: list[tuple[Matmul, dict[str, int]]] = []
    if not options.checks_only:
        print("\n" + _line(HEAD) + "\n" + _line(["---"] * len(HEAD)), flush=True)
    for product in [] if options.checks_only else all_products():
        if KERNELS[None if product.groups is None else product.name] in passed:
            tuned = tune(product, device.sms, tilings=options.tilings, calls=options.calls)
            print(_line(_cells(product, tuned)), flush=True)
            matmuls.append((product.matmul, {field: getattr(tuned.config, field) for field in FIELDS}))
    today = datetime.date.today().isoformat()
    path = DeviceTable(device.kind, jax.__version__, today, passed, tuple(matmuls)).write(options.to)
    device_tables.read(path)
    print(f"\nwrote {path}: {len(passed)} kernels passed, {len(matmuls)} matmuls were measured")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.tune", description=sys.modules["pallas_kernels.tune"].__doc__
    )
    parser.add_argument(
        "--to", type=Path, default=device_tables.FOLDER, help="folder of tables (default: the package's)"
    )
    parser.add_argument("--tilings", type=_positive, default=8, help="tiles and clusters to time of each matmul")
    parser.add_argument("--calls", type=_positive, default=20, help="timed calls of each")
    parser.add_argument("--checks_only", action="store_true", help="time nothing: configs stay the defaults by size")
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
        f"{times.median:.1f} ({times.spread:.1f})",
        f"{product.flops / times.median / 1e6:.0f}",
        f"{tuned.default.median / times.median:.2f} times",
        f"{tuned.portable.median / times.median:.2f} times",
    )


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
