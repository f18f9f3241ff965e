"""Plans which device holds which experts, from the loads that a run recorded.

    python -m tools.place_experts runs/mine --devices 8 --nodes 2 --replicas 40 --json placement.json

Averages `load` over the last logged steps, replicates and places the experts by EPLB, and prints for every layer MaxVio
over devices before and after, how many slots move, and the placement. Before means each expert once, in their order,
or the placement of an earlier plan: `--before placement.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from deepseek_jax.config import ConfigError, require
from deepseek_jax.evaluation.report import layer_names
from deepseek_jax.paths import local_path, write_aside
from deepseek_jax.planning.expert_placement import (
    ExpertPlacement,
    contiguous_placement,
    is_hierarchical,
    plan_placement,
)
from deepseek_jax.training.load_metrics import max_violation
from deepseek_jax.training.metrics import read_metrics

_DEVICES = flags.DEFINE_integer("devices", None, "Devices to share the experts of a layer.")
_NODES = flags.DEFINE_integer("nodes", 1, "Nodes that the devices stand in.")
_REPLICAS = flags.DEFINE_integer("replicas", None, "Experts on all devices together; default: each expert once.")
_GROUPS = flags.DEFINE_integer("groups", None, "Groups of experts to keep on one node; default: the model's.")
_STEPS = flags.DEFINE_integer("steps", 100, "How many of the last logged steps to average.")
_JSON = flags.DEFINE_string("json", None, "A file to write the plan to.")
_BEFORE = flags.DEFINE_string("before", None, "An earlier plan, as --json wrote it, to compare with.")


def read_config(run: Path) -> Mapping[str, Any]:
    """The saved config of the run; empty where there is none."""
    path = run / "config.json"
    return _document(path) if path.exists() else {}


def mean_loads(run: Path, config: Mapping[str, Any], steps: int) -> tuple[np.ndarray, int, int]:
    """Mean share of each expert `[layers, experts]` in the last `steps` logged steps, and the first and last of them.

    Raises:
      ConfigError: the folder holds no run, no loads were recorded, or routing was forced to be even.
    """
    require(run.is_dir(), f"no run at {run}: it is not a folder")
    require(steps > 0, f"--steps must be positive, not {steps}")
    records = [record for record in read_metrics(run, "train") if record.get("load")][-steps:]
    require(bool(records), f"{run} recorded no loads of experts; a run logs them where its model has experts")
    forced = config.get("force_balanced_routing") is True
    require(
        not forced and not any(record.get("forced_balance") is True for record in records),
        f"{run} forced its routing to be even, so its loads say nothing; use a run without force_balanced_routing",
    )
    shapes = {np.shape(record["load"]) for record in records if len({len(row) for row in record["load"]}) == 1}
    require(len(shapes) == 1, f"the loads in {run} differ in shape from step to step; take fewer --steps")
    return np.mean([record["load"] for record in records], axis=0), records[0]["step"], records[-1]["step"]


def groups_of(config: Mapping[str, Any]) -> int:
    """Expert groups of a run's model (`model.moe.num_groups`)."""
    match config:
        case {"model": {"moe": {"num_groups": int(groups)}}}:
            return groups
    raise ConfigError("the run has no config.json that tells its model's expert groups; name --groups")


def read_placement(path: Path) -> ExpertPlacement:
    """The placement in a file that `--json` wrote."""
    document = _document(path)
    try:
        return ExpertPlacement.from_dict(document)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def table(names: Sequence[str], before: np.ndarray | None, after: np.ndarray, moved: np.ndarray | None) -> str:
    """MaxVio over devices per layer, before and after, and the slots that move; a dash where nothing came before."""
    lines = ["layer      MaxVio before   after   moved slots"]
    for row, name in enumerate(names):
        old = "-" if before is None else f"{before[row]:.3f}"
        slots = "-" if moved is None else str(moved[row])
        lines.append(f"{name:<10} {old:>13} {after[row]:>7.3f} {slots:>13}")
    if len(names) > 1:
        old = "-" if before is None else f"{before.mean():.3f}"
        slots = "-" if moved is None else str(moved.sum())
        lines.append(f"{'mean, sum':<10} {old:>13} {after.mean():>7.3f} {slots:>13}")
    return "\n".join(lines)


def _document(path: Path) -> Mapping[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    require(isinstance(document, Mapping), f"{path} does not hold a JSON object")
    return document


def _plan(run: Path, devices: int) -> None:
    """Plans for the run by the command's flags, prints the plan and writes it."""
    nodes, steps = _NODES.value, _STEPS.value
    config = read_config(run)
    loads, first, last = mean_loads(run, config, steps)
    layers, experts = loads.shape
    replicas = experts if _REPLICAS.value is None else _REPLICAS.value
    groups = groups_of(config) if _GROUPS.value is None else _GROUPS.value
    plan = plan_placement(loads, replicas, devices=devices, nodes=nodes, groups=groups)
    before = None
    if _BEFORE.value is not None:
        before = read_placement(Path(local_path(_BEFORE.value, "the earlier plan")))
    elif experts % devices == 0:
        before = contiguous_placement(layers, experts, devices, nodes=nodes)
    moved = None if before is None else plan.moved_from(before)
    old = None if before is None else max_violation(before.device_load(loads))
    new = max_violation(plan.device_load(loads))
    names = layer_names(config)
    names = names if len(names) == layers else [f"row {row}" for row in range(layers)]
    if _JSON.value is not None:
        document = {
            "run": str(run),
            "steps": [first, last],
            "layers": list(names),
            "loads": loads.tolist(),
            "max_vio_before": None if old is None else old.tolist(),
            "max_vio_after": new.tolist(),
            "moved_slots": None if moved is None else moved.tolist(),
        }
        path = local_path(_JSON.value, "the plan")
        write_aside(path, json.dumps(document | plan.to_dict()) + "\n")
    hierarchical = nodes > 1 and is_hierarchical(groups, nodes)
    kind = f"hierarchical: {groups // nodes} of {groups} groups on each node" if hierarchical else "global"
    print(f"{run}: mean load of logged steps {first} to {last}")
    print(f"{experts} experts as {replicas} replicas on {devices} devices, nodes: {nodes} ({kind})\n")
    print(table(names, old, new, moved))
    print(f"\nexperts of each device\n{plan.text(names)}")


def main(argv: Sequence[str]) -> int:
    """Plans for the run named on the command line; what cannot be planned ends it with one line."""
    if len(argv) != 2 or _DEVICES.value is None:
        print("usage: python -m tools.place_experts RUN_FOLDER --devices N [--nodes N] [--replicas N]", file=sys.stderr)
        return 2
    try:
        _plan(Path(local_path(argv[1], "the run")), _DEVICES.value)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    app.run(main)
