"""Plans, searches and calibrations in words and Markdown tables, for `tools.plan`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from deepseek_jax.planning.calibration import Figure
from deepseek_jax.planning.device_memory import owned
from deepseek_jax.planning.devices import Device
from deepseek_jax.planning.flops import backward_flops, forward_flops, training_flops_per_token
from deepseek_jax.planning.job import Job
from deepseek_jax.planning.parameters import active_parameters, total_parameters
from deepseek_jax.planning.pauses import Pauses
from deepseek_jax.planning.plan import Cost, Plan
from deepseek_jax.planning.schedules import Compared, Crossover, describe
from deepseek_jax.planning.search import Remedy, Search, settings
from deepseek_jax.planning.traffic import exchanges, stage_transfer_bytes, weight_traffic

_BAR = 40
MEMORY_PARTS = {
    "masters": "master weights and moments",
    "weights": "working copies of weights",
    "gradients": "gradients",
    "activations": "activations",
    "put_off": "put-off weight gradients",
    "buffers": "buffers of layers at work",
    "lost": "lost between buffers",
}
STEP_PARTS = {
    "forward": "forward alone",
    "backward": "backward alone",
    "weight_gradients": "put-off weight gradients",
    "pairs": "forward beside backward",
    "bubble": "bubble",
    "weights": "weights between devices",
    "update": "optimizer",
}


def plan_report(
    recipe: str, plan: Plan, cost: Cost, pauses: Pauses, fixes: Sequence[Remedy], larger: Job | None
) -> str:
    """A plan for people.

    Args:
      recipe: its name.
      plan: of it.
      cost: of the whole run.
      pauses: what of it are not steps.
      fixes: changes that make it fit, where it does not.
      larger: a job on more devices that fits, where no few changes do.
    """
    parts = [
        _layout(recipe, plan),
        _model(plan),
        _memory(plan, fixes, larger),
        _step(plan),
        _sent(plan),
        _run(plan, cost, pauses),
        _sources(plan),
    ]
    return "\n\n".join(parts)


def _layout(recipe: str, plan: Plan) -> str:
    job, parallel = plan.job, plan.job.parallel
    mesh = f"pipe {parallel.pipe} x data {parallel.data} x node {parallel.node} x expert {parallel.expert}"
    waiting = "" if parallel.put_off is None else f" with put_off={parallel.put_off}"
    schedule = f", {parallel.schedule}{waiting}" if parallel.pipe > 1 else ""
    precision = "FP8" if job.is_fp8 else job.precision.compute
    how = "in lock step, as this library runs it" if job.execution == "lock_step" else "every rank by itself"
    microbatches = f"{job.microbatches} microbatch{'' if job.microbatches == 1 else 'es'} of {job.microbatch_rows}"
    return (
        f"{recipe} on {job.devices:,} {plan.device.name}: {mesh}{schedule}, {how}\n"
        f"A step: {job.rows:,} sequences of {job.length:,} tokens, {microbatches} a device; "
        f"{precision}, recompute {parallel.recompute}, "
        f"ZeRO-1 {'on' if parallel.zero else 'off'}"
    )


def _model(plan: Plan) -> str:
    config, length = plan.job.model, plan.job.length
    with_mtp = f", {total_parameters(config) / 1e9:.1f}B with MTP" if config.mtp_depth else ""
    lines = [
        f"Parameters: {total_parameters(config, mtp=False) / 1e9:.3f}B{with_mtp}; active "
        f"{active_parameters(config, mtp=False) / 1e9:.2f}B, with one vocabulary matrix "
        f"{active_parameters(config, vocabulary_matrices=1, mtp=False) / 1e9:.2f}B",
        f"FLOPs per token: {training_flops_per_token(config, length) / 1e9:,.1f} G (attention causal), "
        f"{training_flops_per_token(config, length, causal=False) / 1e9:,.1f} G (in full)",
    ]
    forward, (inputs, weights) = forward_flops(config, length), backward_flops(config, length)
    passes = (forward, inputs, weights)
    rows = [(name, *(f"{of[name] / 1e9:,.3f}" for of in passes)) for name in forward if forward[name] > 0]
    head = ("GFLOP per token, causal", "forward", "input gradients", "weight gradients")
    return "\n".join(lines) + "\n\n" + table(head, rows, right=3)


def _memory(plan: Plan, fixes: Sequence[Remedy], larger: Job | None) -> str:
    usable = plan.device.usable_memory
    parts = dataclasses.asdict(plan.memory)
    lines = [f"Memory of a device: {plan.memory.total / 1e9:.1f} GB of {usable / 1e9:.0f} GB that a program can use"]
    lines += _bars({name: parts[key] / 1e9 for key, name in MEMORY_PARTS.items()}, "GB")
    if plan.fits:
        lines.append(f"It fits, with {-plan.lacks / 1e9:.1f} GB to spare.")
        return "\n".join(lines)
    lines.append(f"It does not fit: {plan.lacks / 1e9:.1f} GB are lacking.")
    for one in fixes:
        sets = " ".join(f"--set {change}" for text in one.changes for change in text.split(" "))
        lines.append(f"  fits with {sets}: {one.plan.memory.total / 1e9:.1f} GB, {one.plan.step.total:.1f} s a step")
    if not fixes:
        lines.append("  No one, two or three changes make it fit on so many: --search tries all layouts.")
        lines.append(f"  {_larger(larger)}")
    return "\n".join(lines)


def _larger(job: Job | None) -> str:
    if job is None:
        return "Nor does it fit on 4096 times as many: a microbatch is too large."
    return f"It fits on {job.devices:,} of them: {' '.join(settings(job))}"


def _step(plan: Plan) -> str:
    parts = dataclasses.asdict(plan.step)
    lines = [f"Time of a step: {plan.step.total:.2f} s, the mean over ranks"]
    lines += _bars({name: parts[key] for key, name in STEP_PARTS.items()}, "s")
    rate = plan.tokens_per_second
    lines.append(
        f"{rate:,.0f} tokens/s a GPU, {rate * plan.job.devices / 1e6:,.3g}M in all; "
        f"{plan.flops_per_second() / 1e12:,.3g} TFLOP/s a GPU; "
        f"MFU {plan.mfu():.1%} with causal attention, {plan.mfu(causal=False):.1%} with all of it, of the "
        f"{plan.job.precision.compute} peak"
    )
    return "\n".join(lines)


def _sent(plan: Plan) -> str:
    job, device = plan.job, plan.device
    lines = ["A device sends"]
    for name, one in zip(("dispatch", "combine"), exchanges(job), strict=True):
        if one.node or one.network:
            lines.append(
                f"  {name}, a layer and microbatch: {one.network / 1e6:,.0f} MB to nodes, {one.node / 1e6:,.0f} MB "
                f"within them, {1e3 * one.seconds(device):.2f} ms"
            )
    if job.parallel.pipe > 1:
        lines.append(f"  to the next stage, a microbatch: {stage_transfer_bytes(job) / 1e6:,.0f} MB, and as much back")
    traffic = weight_traffic(job, *owned(job))
    if traffic.total:
        lines.append(
            f"  a step: {traffic.gathered / 1e9:.2f} GB of weights gathered, {traffic.reduced / 1e9:.2f} GB of "
            f"gradients summed, {traffic.mirrored / 1e9:.2f} GB between ranks that hold the same stage"
        )
    return "\n".join(lines) if len(lines) > 1 else "A device sends nothing."


def _run(plan: Plan, cost: Cost, pauses: Pauses) -> str:
    money = "" if cost.dollars is None else f", ${cost.dollars:,.0f} at ${plan.device.price:g} an hour"
    took = f"{cost.hours / 24:,.3g} days, {cost.gpu_hours:,.0f} GPU hours{money}"
    lines = [f"The run: {cost.tokens / 1e9:,.0f}B tokens in {took}"]
    for count, name, each in (
        (pauses.evaluations, "evaluations", pauses.evaluation_seconds),
        (pauses.checkpoints, "checkpoints", pauses.checkpoint_seconds),
    ):
        share = f"{count:,} {name}: {each:.2g} s each, {count * each / 3600 / cost.hours:.2%} of it"
        lines.append(f"  {share if count else f'no {name} on the way are counted'}")
    lines.append("  growing batches are counted; the evaluation and the checkpoint at the end, and failures, are not")
    return "\n".join(lines)


def _sources(plan: Plan) -> str:
    lines = [f"Device: {plan.device.source}", "Rates"]
    lines += [f"  {name}: {text}" for name, text in plan.device.efficiency.sources.items()]
    return "\n".join([*lines, "How far such plans are from published runs: python -m tools.plan --calibration"])


def search_report(found: Search, device: Device, count: int, larger: Job | None) -> str:
    """A search for people; `larger` is a job on more devices that fits, where none does on these."""
    lines = [
        f"{found.tried:,} layouts of {count:,} {device.name}s, {found.fitting:,} of which fit "
        f"{device.usable_memory / 1e9:.0f} GB; {found.simulated:,} simulated, all others are slower even without "
        f"a bubble; {found.seconds:.0f} s"
        + ("" if found.complete else ". THE TIME RAN OUT, so a faster one may be missing: raise --seconds")
    ]
    if found.best:
        head = ("s a step", "tokens/s a GPU", "MFU", "bubble", "GB", "layout")
        rows = [
            (
                f"{plan.step.total:.2f}",
                f"{plan.tokens_per_second:,.0f}",
                f"{plan.mfu():.1%}",
                f"{plan.step.bubble / plan.step.total:.0%}",
                f"{plan.memory.total / 1e9:.1f}",
                _short(plan),
            )
            for plan in found.best
        ]
        lines += ["", table(head, rows, left=(5,))]
        lines += ["", "The first one: " + " ".join(f"--set {one}" for one in settings(found.best[0].job))]
    else:
        lines.append("None fits: take more devices, or devices with more memory.")
        lines.append(_larger(larger))
    shown = found.nearest[:3] if found.best else found.nearest
    if shown:
        lines += ["", "Those that do not fit, and lack least:"]
        for job, memory in shown:
            largest = max(MEMORY_PARTS, key=lambda part: getattr(memory, part))
            lines.append(
                f"  {(memory.total - device.usable_memory) / 1e9:.1f} GB lacking, most of it {MEMORY_PARTS[largest]} "
                f"({getattr(memory, largest) / 1e9:.1f} GB): {' '.join(settings(job))}"
            )
    return "\n".join(lines)


def _short(plan: Plan) -> str:
    job, parallel = plan.job, plan.job.parallel
    parts = [f"{parallel.pipe}x{parallel.data}x{parallel.node}x{parallel.expert}"]
    if parallel.pipe > 1:
        waiting = "" if parallel.put_off is None else f" put_off {parallel.put_off}"
        parts.append(f"{parallel.schedule}{waiting}")
    parts += [f"{job.microbatches}x{job.microbatch_rows}", f"recompute {parallel.recompute}"]
    parts += ["FP8" if job.is_fp8 else job.precision.compute, *([] if parallel.zero else ["no ZeRO"])]
    return ", ".join(parts)


def schedules_report(compared: Iterable[Compared], found: Crossover | None) -> str:
    """Schedules beside each other, and when 1F1B beats DualPipe."""
    rows = []
    for one in compared:
        if one.plan is None:
            rows.append(("–", "–", "–", one.name, one.refusal))
            continue
        step, memory = one.plan.step, one.plan.memory.total
        lacks = "" if one.plan.fits else f"lacks {one.plan.lacks / 1e9:.1f} GB"
        rows.append((f"{step.total:.2f}", f"{step.bubble:.2f}", f"{memory / 1e9:.1f}", one.name, lacks))
    lines = [table(("s a step", "bubble, s", "GB", "schedule", ""), rows, left=(3, 4))]
    if found is not None:
        lines += ["", "When 1F1B beats DualPipe:", *(f"  {line}" for line in describe(found))]
    return "\n".join(lines)


def calibration(deepseek: Iterable[Figure], systems: Iterable[Figure]) -> str:
    """Both tables."""
    head = ("figure", "unit", "published", "first", "error", "second", "error", "what it is", "")
    parts = []
    for title, figures in (
        ("DeepSeek's own run: 2048 H800, PP16, EP64, ZeRO-1, DualPipe, FP8 (goal: 10%)", deepseek),
        ("Other systems on DeepSeek-V3, the same rates for all of a kind of GPU (goal: 20%)", systems),
    ):
        parts.append(f"{title}\n\n{table(head, [_figure(one) for one in figures], left=(0, 1, 7, 8))}")
    return "\n\n".join(parts)


def _figure(one: Figure) -> tuple[str, ...]:
    ours = []
    for value, error in ((one.first, one.first_error), (one.second, one.error)):
        ours += ["–" if value is None else number(value), "" if error is None else f"{error:+.1%}"]
    return one.of, one.unit, number(one.published), *ours, _verdict(one), one.note


def _verdict(one: Figure) -> str:
    if one.is_met is None:
        return one.role
    first, second = ("met" if is_met else "missed" for is_met in (one.first_is_met, one.is_met))
    return f"{one.role}: first {first}, second {second}"


# --- text -----------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Four digits, or all before the point."""
    if value == int(value) and abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _bars(parts: dict[str, float], unit: str) -> list[str]:
    """A line for each part: its size, and a bar of its share."""
    total, longest = sum(parts.values()) or 1.0, max(map(len, parts))
    return [
        f"  {name.ljust(longest)}  {value:8.3f} {unit}  {'#' * round(_BAR * value / total)}".rstrip()
        for name, value in parts.items()
        if value > 0
    ]


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, right: int | None = None, left: Sequence[int] = ()
) -> str:
    """A Markdown table in columns of equal width.

    Args:
      head: its first line.
      rows: the others.
      right: so many of the last columns are numbers; default: all but `left`.
      left: columns of words.
    """
    words = set(range(len(head) - right)) if right is not None else set(left)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (c.ljust(w) if i in words else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return f"| {' | '.join(padded)} |"

    rule = ["-" * (w + 2) if i in words else f"{'-' * (w + 1)}:" for i, w in enumerate(widths)]
    return "\n".join([line(head), f"|{'|'.join(rule)}|", *map(line, rows)])
