"""Train steps compiled for 16 to 2048 H200s, against what was kept of them: a silent resharding shows here.

    python -m tools.aot_golden            # compiles all, compares with the kept ones, exit code 1 where they differ
    python -m tools.aot_golden --points 16,64
    python -m tools.aot_golden --write    # keeps what is found

Needs the extra [cuda] (the plugin, no GPU and no driver), and minutes for each point. Collectives and the state have to
be the same to the byte, temporaries within 3%; the planner's bytes are printed beside the compiler's. Two of the four
points are the recipe `v3.pretrain` on its own mesh and on a quarter of it, by FP8 kernels with full recomputation
and no weight gradient put off, steady ticks unbraided; the other two are few layers of DeepSeek-V3 on two nodes and on
eight. All have the least room for routed tokens, which a balanced router needs and the planner counts; runs begin with
twice as much.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_jax.paths import write_aside
from tools.plan_text import table

KEPT = Path(__file__).parent / "bench" / "results" / "aot_golden.json"
LEAN = ("precision=v3_fp8", "parallel.recompute=full", "parallel.put_off=0", "parallel.overlap=steady")
SMALL = ("model.num_layers=5", "model.num_dense_layers=1", "parallel.data=1", "parallel.pipe=2")
POINTS: dict[int, tuple[str, tuple[str, ...]]] = {
    16: ("v3.pretrain", (*LEAN, *SMALL, "parallel.node=1")),
    64: ("v3.pretrain", (*LEAN, *SMALL, "parallel.node=4")),
    512: ("v3.pretrain_512", LEAN),
    2048: ("v3.pretrain", LEAN),
}
"""Of each number of devices: a recipe, and what is changed."""
SLACK = 0.03
"""By how much temporaries may differ from the kept ones."""


def command(devices: int) -> list[str]:
    """The command line that compiles a point."""
    recipe, changes = POINTS[devices]
    changed = ["--kernels", "--setting=0", *(f"--set={change}" for change in changes)]
    return [sys.executable, "-m", "tools.aot", f"--recipe={recipe}", f"--devices={devices}", *changed]


def compile_point(devices: int) -> dict[str, Any]:
    """What `tools.aot` finds of a point, in a process of its own.

    Raises:
      ChildProcessError: it could not be compiled; the message is that of the tool.
    """
    # The host's platform: nothing looks for a GPU.
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([*command(devices), "--json"], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ChildProcessError(f"{devices} devices: {lines[-1]}")
    return json.loads(done.stdout[done.stdout.index("{") :])


def differences(found: Mapping[str, Any], kept: Mapping[str, Any]) -> list[str]:
    """What is not as it was, one line each."""
    lines = [
        f"{name}: {found[name]:,} and not {kept[name]:,}"
        for name in ("devices", "microbatches", "arguments", "results")
        if found[name] != kept[name]
    ]
    for kind in sorted({*found["collectives"], *kept["collectives"]}):
        now, before = (list(one["collectives"].get(kind, (0, 0))) for one in (found, kept))
        if now != before:
            lines.append(f"{kind}: {now[0]} of {now[1]:,.0f} bytes in a step and not {before[0]} of {before[1]:,.0f}")
    change = found["temporaries"] / kept["temporaries"] - 1
    if abs(change) > SLACK:
        lines.append(f"temporaries: {found['temporaries']:,}, {change:+.1%} of {kept['temporaries']:,}")
    return lines


def report(points: Mapping[int, Mapping[str, Any]]) -> str:
    """The points as a table."""
    rows = []
    for devices, one in sorted(points.items()):
        planned = sum(one["planned"].values()) - one["planned"]["lost"]
        collectives = ", ".join(f"{n} {kind} ({size / 1e9:.1f} GB)" for kind, (n, size) in one["collectives"].items())
        numbers = (one["arguments"], one["temporaries"], one["peak"], planned)
        cells = (f"{size / 1e9:.2f}" for size in numbers)
        fits = "yes" if one["peak"] <= one["usable"] else "no"
        compiled = f"{one['seconds']:.0f} s, {one['host_memory'] / 1e9:.1f} GB"
        rows.append((f"{devices:,}", *cells, f"{planned / one['peak'] - 1:+.1%}", fits, compiled, collectives))
    head = ("devices", "state, GB", "temporaries", "peak", "planned", "error", "fits", "compiling took", "collectives")
    return table(head, rows, left=(6, 7, 8))


def main(argv: Sequence[str]) -> int:
    """Runs the command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.aot_golden", description=__doc__)
    parser.add_argument("--points", default=",".join(map(str, POINTS)), help="numbers of devices, with commas")
    parser.add_argument("--write", action="store_true", help="keep what is found")
    options = parser.parse_args(argv)
    chosen = options.points.split(",")
    unknown = [one for one in chosen if one not in map(str, POINTS)]
    if unknown:
        print(f"no point of {unknown[0]} devices; there are {', '.join(map(str, POINTS))}", file=sys.stderr)
        return 2
    kept = {int(devices): one for devices, one in json.loads(KEPT.read_text()).items()} if KEPT.exists() else {}
    found, wrong = {}, []
    for devices in map(int, chosen):
        try:
            found[devices] = compile_point(devices)
        except ChildProcessError as error:
            print(error, file=sys.stderr)
            return 2
        if options.write:  # At once: the next one may take long.
            kept[devices] = found[devices]
            write_aside(KEPT, json.dumps({str(key): one for key, one in sorted(kept.items())}, indent=1) + "\n")
        elif devices not in kept:
            wrong.append(f"{devices} devices: nothing was kept; --write keeps it")
        else:
            wrong += [f"{devices} devices: {line}" for line in differences(found[devices], kept[devices])]
    print(report(found))
    print("\n".join(wrong) if wrong else "\nas kept" if not options.write else f"\nwrote {KEPT.name}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
