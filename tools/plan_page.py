"""A plan as one self-contained page: the memory of a device, the time of a step, the pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from html import escape

from deepseek_jax.parallel.pipeline.draw import svg
from deepseek_jax.parallel.pipeline.simulate import Costs, simulate
from deepseek_jax.planning.plan import Plan, cell_times
from deepseek_jax.planning.stages import StageTime
from tools.plan_text import MEMORY_PARTS, STEP_PARTS

_COLOURS = ("#3b5bdb", "#2b8a3e", "#e67700", "#9c36b5", "#0c8599", "#c2255c", "#868e96")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #212529; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.bar { position: relative; display: flex; height: 2.2rem; background: #e9ecef; margin: .6rem 0; }
.bar > span { height: 100%; }
.limit { position: absolute; top: -.4rem; bottom: -.4rem; border-left: 3px solid #e03131; }
ul.legend { list-style: none; padding: 0; columns: 2; }
ul.legend i { display: inline-block; width: .9rem; height: .9rem; margin-right: .5rem; vertical-align: -1px; }
pre { background: #f8f9fa; padding: 1rem; overflow-x: auto; font-size: 12.5px; }
.picture { overflow-x: auto; }
"""


def page(title: str, plan: Plan, text: str) -> str:
    """The page.

    Args:
      title: the recipe's name.
      plan: what is drawn.
      text: the plan in words, as `plan_text` has it.
    """
    memory, usable = dataclasses.asdict(plan.memory), plan.device.usable_memory
    gigabytes = {name: memory[key] / 1e9 for key, name in MEMORY_PARTS.items()}
    step = dataclasses.asdict(plan.step)
    seconds = {name: step[key] for key, name in STEP_PARTS.items()}
    verdict = (
        f"It fits, with {-plan.lacks / 1e9:.1f} GB to spare."
        if plan.fits
        else f"It does not fit: {plan.lacks / 1e9:.1f} GB are lacking."
    )
    parts = [
        f"<h1>{escape(title)} on {plan.job.devices:,} {escape(plan.device.name)}</h1>",
        f"<h2>Memory of a device: {plan.memory.total / 1e9:.1f} GB of {usable / 1e9:.0f} GB</h2><p>{verdict}</p>",
        _bar(gigabytes, "GB", limit=usable / 1e9),
        f"<h2>Time of a step: {plan.step.total:.2f} s</h2>"
        f"<p>{plan.tokens_per_second:,.0f} tokens/s a GPU, MFU {plan.mfu():.1%} with causal attention</p>",
        _bar(seconds, "s"),
        _pipeline(plan),
        f"<h2>The plan</h2><pre>{escape(text)}</pre>",
    ]
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
    return f"{head}<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"


def _bar(parts: Mapping[str, float], unit: str, limit: float | None = None) -> str:
    """Parts side by side, with a mark at the limit, and what each colour means."""
    whole = max(sum(parts.values()), limit or 0.0) or 1.0
    shown = [(name, value, colour) for (name, value), colour in zip(parts.items(), _COLOURS, strict=True) if value > 0]
    spans = "".join(
        f'<span style="width:{100 * value / whole:.3f}%;background:{colour}" title="{escape(name)}"></span>'
        for name, value, colour in shown
    )
    mark = "" if limit is None else f'<div class="limit" style="left:{100 * limit / whole:.3f}%"></div>'
    legend = "".join(
        f'<li><i style="background:{colour}"></i>{escape(name)}: {value:.3g} {unit}</li>'
        for name, value, colour in shown
    )
    return f'<div class="bar">{spans}{mark}</div><ul class="legend">{legend}</ul>'


def _pipeline(plan: Plan) -> str:
    """The schedule with the fewest microbatches that show it, its stages all of the mean size."""
    job = plan.job
    if job.parallel.pipe == 1:
        return ""
    times = cell_times(job, plan.device)
    count = len(times.stages)
    mean = sum(times.stages[1:], start=times.stages[0]).times(1 / count)
    choice = job.parallel.schedule_choice
    schedule = choice.make(min(job.microbatches, choice.fitting(2 * job.parallel.pipe)))
    costs = Costs(
        forward=mean.forward + mean.forward_exchange,
        input_gradient=mean.input_gradient + mean.backward_exchange,
        weight_gradient=mean.weight_gradient,
        overlapped=_pair(mean, times.exchange_units) if times.overlap else None,
        transfer=times.transfer,
    )
    timeline = simulate(schedule, costs, "lock_step" if job.execution == "lock_step" else "ideal")
    return (
        f"<h2>The pipeline, with {schedule.microbatches} microbatches</h2><p>Seconds, all stages of the mean size; a "
        f'step has {job.microbatches} microbatches.</p><div class="picture">{svg(timeline)}</div>'
    )


def _pair(stage: StageTime, units: float) -> float:
    """A forward beside a full backward; no less than the longer of them alone, which is what a picture can show."""
    compute = stage.forward + stage.input_gradient + stage.weight_gradient
    exchange = stage.forward_exchange + stage.backward_exchange
    longest = max(
        stage.forward + stage.forward_exchange,
        stage.input_gradient + stage.weight_gradient + stage.backward_exchange,
    )
    return max(min(max(compute / (1 - units), exchange), compute + exchange), longest)
