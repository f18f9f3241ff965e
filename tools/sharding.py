"""Prints what a recipe puts on every device and what a step sends, from shapes alone: no array, no device.

    python -m tools.sharding v3.pretrain
    python -m tools.sharding v3.pretrain --devices 4096 --set parallel.dispatcher=all_to_all --json table.json

--devices takes the recipe's mesh with as many data replicas as they need. The tables are Markdown. Collectives are read
off the program that the step runs; bytes are sent by one device, by the usual algorithms (`planning/collectives.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterable, Sequence

import jax

from deepseek_jax.config_io import override_all
from deepseek_jax.paths import local_path, write_aside
from deepseek_jax.planning.collectives import Collective, total_sent
from deepseek_jax.planning.job import with_device_count
from deepseek_jax.training.experiment import Experiment
from deepseek_jax.training.sharding_table import ParameterRow, ShardingTable, sharding_table
from experiments.run import find_recipe, is_user_error

_PARTS = {
    "master": "master_bytes",
    "moments": "moment_bytes",
    "working copy": "copy_bytes",
    "gradient": "gradient_bytes",
}
"""What each column of bytes is called, and the field that has it."""


def resolve(recipe: str, changes: Iterable[str], devices: int | None) -> Experiment:
    """The recipe with `path=value` changes, laid out over so many devices.

    Raises:
      UsageError: there is no such recipe.
      ConfigError: a change is wrong, or the mesh cannot have so many devices.
    """
    experiment = override_all(find_recipe(recipe)(), changes)
    if devices is None:
        return experiment
    return dataclasses.replace(experiment, parallel=with_device_count(experiment.parallel, devices))


def report(table: ShardingTable) -> str:
    """The table for people."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in table.mesh.items())
    parts = [f"Mesh: {mesh} = {table.devices:,} devices"]
    parts += [_parameter_table(table), "\n".join(_totals(table))]
    parts += [_step_line(table), _collective_table(table.collectives), "\n".join(_sent(table))]
    if table.mesh["pipe"] > 1:
        parts.append(
            "What stages and the model's two ends send is counted as often as the schedule calls them; messages from "
            "stage to stage are sent in every tick."
        )
    return "\n\n".join(parts)


# --- parameters -----------------------------------------------------------------------------------------------------


def _parameter_table(table: ShardingTable) -> str:
    head = ("parameter", "shape", "master split over", "copy", "copy split over", *(f"{part}, MB" for part in _PARTS))
    return _markdown(head, [_parameter_line(row) for row in table.rows], right=len(_PARTS))


def _parameter_line(row: ParameterRow) -> tuple[str, ...]:
    sizes = (_number(getattr(row, field) / 1e6) for field in _PARTS.values())
    shape = ", ".join(map(str, row.shape))
    return (
        row.name,
        f"[{shape}]",
        _split(row.partition),
        row.copy_dtype if row.copy_bytes else "–",
        _split(row.copy_partition) if row.copy_bytes else "–",
        *sizes,
    )


def _split(partition: Sequence[Sequence[str]]) -> str:
    """The axes of each dimension that is split, `–` for one that is not."""
    return ", ".join("·".join(axes) or "–" for axes in partition)


def _totals(table: ShardingTable) -> Iterable[str]:
    main, mtp = table.elements(mtp=False), table.elements(mtp=True)
    held = sum(row.held_elements for row in table.rows)
    yield (
        f"{_billions(main)} parameters"
        + (", router biases included" if table.biases else "")
        + (f", and {_billions(mtp)} of MTP modules" if mtp else "")
        + "; masters and summed gradients are float32."
    )
    if held > main + mtp:
        yield (
            f"Stacks hold {_billions(held)}: {1 - (main + mtp) / held:.1%} of that are slots that stay empty, because "
            "every stage has as many of each kind of layer as the fullest."
        )
    sums = {part: sum(getattr(row, field) for row in table.rows) for part, field in _PARTS.items()}
    yield _gigabytes("Each device", sums.values())
    yield _gigabytes(f"All {table.devices:,}", (size * table.devices for size in sums.values()))
    state = sums["master"] + sums["moments"]
    empty = 1 - sum(row.elements for row in table.parameters) / sum(row.held_elements for row in table.parameters)
    even = table.least_state_bytes / (1 - empty)
    yield (
        f"Theory: {table.state_bytes_per_element} bytes a parameter of master and moments, split evenly over "
        f"{table.devices:,} devices, are {_number(table.least_state_bytes / 1e9)} GB on each; "
        f"here {_number(state / 1e9)} GB: {_number((even - table.least_state_bytes) / 1e9)} GB of empty slots, "
        f"{_number((state - even) / 1e9)} GB of what is not split over all."
    )


def _billions(count: int) -> str:
    return f"{count / 1e9:.3f}B" if count >= 1e8 else f"{count / 1e6:.3f}M"


def _gigabytes(who: str, sizes: Iterable[float]) -> str:
    sizes = [size / 1e9 for size in sizes]
    named = ", ".join(f"{part} {_number(size)}" for part, size in zip(_PARTS, sizes, strict=True))
    return f"{who}: {named}, together {_number(sum(sizes))} GB."


# --- collectives ----------------------------------------------------------------------------------------------------


def _step_line(table: ShardingTable) -> str:
    return (
        f"One step: {table.batch_rows:,} sequences of {table.sequence_length:,} tokens, in {table.microbatches:,} "
        "microbatches on each device, with the least room for tokens on their way to experts."
    )


def _collective_table(found: Iterable[Collective]) -> str:
    def key(one: Collective) -> tuple:
        return one.kind, one.axes, one.ranks, one.purpose, one.phase

    groups: dict[tuple, list[Collective]] = {}
    for one in found:
        groups.setdefault(key(one), []).append(one)
    lines = []
    for (kind, axes, ranks, purpose, phase), members in groups.items():
        calls, sent = sum(one.calls for one in members), total_sent(members)
        lines.append(
            (
                purpose or "–",
                phase or "–",
                kind,
                "·".join(axes),
                str(ranks),
                f"{calls:,}",
                _number(sent / calls / 1e6),
                _number(sent / 1e9),
            )
        )
    head = ("what for", "pass", "collective", "axes", "ranks", "calls", "MB a call", "GB a step")
    return _markdown(head, lines, right=4)


def _sent(table: ShardingTable) -> Iterable[str]:
    yield f"A device sends {_number(total_sent(table.collectives) / 1e9)} GB in a step:"
    by_axes = lambda one: one.axes  # noqa: E731
    for axes, members in itertools.groupby(sorted(table.collectives, key=by_axes), by_axes):
        yield f"- over {'·'.join(axes)}: {_number(total_sent(members) / 1e9)} GB"
    yield ""
    yield (
        "Of S bytes that each of n ranks puts in, a device sends (n-1) S for an all_gather, (n-1)/n S for a "
        "reduce_scatter or an all_to_all, 2 (n-1)/n S for an all_reduce (sums and extremes). Buffers on their way to "
        "experts have a fixed size and travel whole; a ragged_all_to_all is counted as if they were full."
    )


# --- text -----------------------------------------------------------------------------------------------------------


def _number(value: float) -> str:
    """Three digits or more: `1,234`, `12.3`, `0.0123`; `0` for nothing."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.1e}"


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]], *, right: int) -> str:
    """A table whose last `right` columns are numbers, in columns of equal width."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    first = len(head) - right

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if i >= first else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return f"| {' | '.join(padded)} |"

    rule = [f"{'-' * (w + 1)}:" if i >= first else "-" * (w + 2) for i, w in enumerate(widths)]
    return "\n".join([line(head), f"|{'|'.join(rule)}|", *map(line, lines)])


# --- the command ----------------------------------------------------------------------------------------------------


def _document(table: ShardingTable) -> dict:
    """The table for programs."""
    found = [dataclasses.asdict(one) | {"bytes_sent": one.bytes_sent} for one in table.collectives]
    return dataclasses.asdict(table) | {"devices": table.devices, "collectives": found}


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv` (without the program's name) and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.sharding", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="as `python -m experiments.run --list` has it")
    parser.add_argument("--devices", type=int, help="default: what the recipe's mesh has")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="change a value of the recipe")
    parser.add_argument("--json", metavar="FILE", help="write the table here as well")
    options = parser.parse_args(argv)
    try:
        table = sharding_table(resolve(options.recipe, options.set, options.devices))
        if options.json:
            write_aside(local_path(options.json, "the table"), json.dumps(_document(table)) + "\n")
    except Exception as error:
        if not is_user_error(error) and not isinstance(error, OSError):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(report(table))
    return 0


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # or a machine's GPU would be taken for nothing
    sys.exit(main(sys.argv[1:]))
