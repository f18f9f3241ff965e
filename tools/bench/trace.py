"""Where a step's time goes: jax's profile of a CPU, read together with the compiled program that ran."""

from __future__ import annotations

import collections
from pathlib import Path

from deepseek_jax.planning.compiled import CompiledProgram, Computation, Instruction, flops, product_flops

MOVES = ("copy", "dynamic-slice", "dynamic-update-slice", "slice", "bitcast", "reshape", "transpose", "concatenate")
EXCHANGES = ("all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")
CONTROL = ("while", "conditional", "call")


def read_trace(folder: Path, program: CompiledProgram) -> dict:
    """FLOPs of the matrix products that ran, on all devices, and seconds by kind of work, most first.

    An instruction's own time is counted, without that of what it runs. Devices that share a core wait for it inside
    their operations, so seconds are shares of the time rather than processor time; where each runs until it waits, only
    those of exchanges are.
    """
    seconds, counts = _times(folder)
    found = {one.name: (here, one) for here in program.computations.values() for one in here.instructions}
    total, kinds = 0.0, collections.Counter()
    for name, time in seconds.items():
        here, one = found.get(name, (None, None))
        if here is None or one is None:
            kinds["other"] += time
            continue
        own = 0.0 if one.opcode in CONTROL else _flops(program, here, one)
        total += counts[name] * own
        kinds["products" if own else _kind(program, one)] += time
    return {"flops": total, "seconds": dict(kinds.most_common())}


def _times(folder: Path) -> tuple[collections.Counter, collections.Counter]:
    """Own seconds and number of runs of each instruction, over all devices."""
    from jax.profiler import ProfileData

    seconds: collections.Counter = collections.Counter()
    counts: collections.Counter = collections.Counter()
    path = max(folder.glob("plugins/profile/*/*.xplane.pb"))
    for plane in ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            events = []
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    events.append((event.start_ns, -event.duration_ns, stats["hlo_op"]))
            inside: list[tuple[float, str]] = []
            for start, negative, name in sorted(events):
                while inside and inside[-1][0] <= start:
                    inside.pop()
                if inside:
                    seconds[inside[-1][1]] += negative / 1e9
                seconds[name] -= negative / 1e9
                counts[name] += 1
                inside.append((start - negative, name))
    return seconds, counts


def _flops(program: CompiledProgram, here: Computation, one: Instruction) -> float:
    return product_flops(here, one) + sum(flops(program, name) for name in one.called)


def _kind(program: CompiledProgram, one: Instruction) -> str:
    """exchanges, zeros, moves (what only puts arrays elsewhere), control or elementwise."""
    if one.kind in EXCHANGES:
        return "exchanges"
    if one.opcode in CONTROL:
        return "control"
    codes = {inner.opcode for name in one.called for _, inner in program.inside(name)} or {one.opcode}
    codes -= {"parameter", "constant", "tuple", "get-tuple-element"}
    if codes <= {"broadcast"}:
        return "fills"
    integer = ("add", "compare", "select", "convert", "broadcast", "clamp", "iota", "minimum", "maximum", "pad")
    if codes <= {*MOVES, *integer} and codes & set(MOVES[:3]) and "add" not in _float_ops(program, one):
        return "moves"
    return "elementwise"


def _float_ops(program: CompiledProgram, one: Instruction) -> set[str]:
    inner = [i for name in one.called for _, i in program.inside(name)] or [one]
    return {i.opcode for i in inner if i.arrays and i.arrays[0].dtype in ("f32", "bf16", "f64")}
