"""Says what a recipe needs before anyone rents a GPU: does it fit, how long, how many dollars, which layout.

    python -m tools.plan --recipe v3.pretrain --gpus 2048 --gpu h800
    python -m tools.plan --recipe v3.pretrain --gpus 2048 --gpu h200 --set precision=v3_fp8 --schedules
    python -m tools.plan --recipe v3.pretrain --gpus 512 --gpu b200 --search
    python -m tools.plan --calibration
    python -m tools.plan --measure

Nothing is run, and no GPU is needed. Rates come from published kernel tables and microbenchmarks
(`planning/efficiency.py`). How it is counted, and how far from published runs it comes out, is in docs/planner.md.
Without --gpus the recipe's mesh is taken.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax

from deepseek_jax.config import ConfigError, require
from deepseek_jax.config_io import override_all
from deepseek_jax.paths import local_path, write_aside
from deepseek_jax.planning.calibration import deepseek_figures, system_figures
from deepseek_jax.planning.devices import Device, find_device, with_price
from deepseek_jax.planning.job import RUNTIME_WIDTH, Execution, Job, with_device_count
from deepseek_jax.planning.pauses import STORAGE, Pauses, checkpoint_seconds, evaluation_seconds
from deepseek_jax.planning.plan import Plan, Segment, make_plan
from deepseek_jax.planning.schedules import compare_schedules, crossover
from deepseek_jax.planning.search import Search, remedies, search, settings, smallest_that_fits
from deepseek_jax.training.experiment import Experiment
from experiments.run import UsageError, find_recipe, is_user_error
from tools import plan_measure, plan_page, plan_text

_MEASURED = ("tiny.pretrain", "small.pretrain")
"""What --measure takes without --recipe."""
_SLICES = 2000
"""Parts of a run in which the batch is taken to have one size."""


def job_of(experiment: Experiment, count: int | None = None, execution: Execution = "lock_step") -> Job:
    """What a recipe trains, at the batch of its end, on so many devices.

    Raises:
      ConfigError: its mesh cannot have so many, or the model does not fit the mesh.
    """
    parallel = experiment.parallel if count is None else with_device_count(experiment.parallel, count)
    schedule = experiment.schedule
    return Job(
        model=experiment.model,
        parallel=parallel,
        precision=experiment.precision,
        length=experiment.data.sequence_length,
        rows=schedule.rows(schedule.total_tokens - 1),
        moment_bytes=RUNTIME_WIDTH[experiment.optimizer.moment_dtype],
        execution=execution,
        imbalance=1.0 if experiment.force_balanced_routing else 1.04,
    )


def course_of(experiment: Experiment) -> tuple[Segment, ...]:
    """The run's tokens by the size of their batches."""
    schedule, found = experiment.schedule, dict[int, float]()
    each = schedule.total_tokens / _SLICES
    for index in range(_SLICES):
        rows = schedule.rows(int((index + 0.5) * each))
        found[rows] = found.get(rows, 0.0) + each
    return tuple(Segment(tokens, rows) for rows, tokens in found.items())


def pauses_of(experiment: Experiment, plan: Plan, course: Sequence[Segment], storage: float) -> Pauses:
    """What the recipe's run does besides its steps, where a node writes so many bytes a second."""
    steps = round(sum(one.tokens / (one.rows * plan.job.length) for one in course))
    evaluation, every = experiment.evaluation, experiment.checkpoint.every_steps
    average = experiment.moving_average is not None  # it is evaluated too
    return Pauses(
        evaluations=steps // evaluation.every_steps if counts_evaluations(experiment) else 0,
        evaluation_seconds=evaluation_seconds(plan, evaluation.max_bytes or 0, evaluation.batch_rows) * (1 + average),
        checkpoints=steps // every,
        checkpoint_seconds=checkpoint_seconds(plan, every, storage=storage, average=average),
    )


def counts_evaluations(experiment: Experiment) -> bool:
    """Whether the recipe says how much text the evaluations of a run read."""
    return experiment.evaluation.every_steps > 0 and experiment.evaluation.max_bytes is not None


def document(plan: Plan, course: Sequence[Segment], pauses: Pauses) -> dict[str, Any]:
    """A plan for programs. Seconds, bytes, dollars."""
    cost = plan.cost(course, pauses.seconds)
    return {
        "layout": list(settings(plan.job)),
        "devices": plan.job.devices,
        "device": plan.device.name,
        "microbatches": plan.job.microbatches,
        "memory": dataclasses.asdict(plan.memory) | {"total": plan.memory.total, "usable": plan.device.usable_memory},
        "fits": plan.fits,
        "step": dataclasses.asdict(plan.step) | {"total": plan.step.total},
        "tokens_per_second_per_device": plan.tokens_per_second,
        "mfu": {"causal": plan.mfu(), "full": plan.mfu(causal=False)},
        "run": dataclasses.asdict(cost) | {"pauses": dataclasses.asdict(pauses)},
    }


def _calibration(as_json: bool) -> str:
    figures = {"deepseek": deepseek_figures(), "systems": system_figures()}
    if as_json:
        table = {
            name: [dataclasses.asdict(one) | {"error": one.error, "is_met": one.is_met} for one in of]
            for name, of in figures.items()
        }
        return json.dumps(table, indent=1)
    return plan_text.calibration(figures["deepseek"], figures["systems"])


def _search(
    job: Job, device: Device, count: int, experiment: Experiment, options: argparse.Namespace
) -> tuple[str, int]:
    found: Search = search(job, device, count, top=options.top, seconds=options.seconds)
    code = 0 if found.best else 1
    if options.json:
        course, storage = course_of(experiment), options.storage * 1e9
        best = [document(plan, course, pauses_of(experiment, plan, course, storage)) for plan in found.best]
        spare = device.usable_memory
        lacking = [{"layout": list(settings(one)), "lacks": memory.total - spare} for one, memory in found.nearest]
        return json.dumps(
            {"best": best, "nearest": lacking, "tried": found.tried, "fitting": found.fitting}, indent=1
        ), code
    larger = None if found.best else smallest_that_fits(job, device, count)
    return plan_text.search_report(found, device, count, larger), code


def _plan(job: Job, device: Device, count: int | None, experiment: Experiment, options: argparse.Namespace) -> str:
    plan, course = make_plan(job, device, count), course_of(experiment)
    pauses = pauses_of(experiment, plan, course, options.storage * 1e9)
    as_json = json.dumps(document(plan, course, pauses), indent=1)
    if options.json and not options.html:
        return as_json
    fixes = () if plan.fits else remedies(job, device)
    larger = None if plan.fits or fixes else smallest_that_fits(job, device, job.devices)
    text = plan_text.plan_report(options.recipe, plan, plan.cost(course, pauses.seconds), pauses, fixes, larger)
    if options.html:
        write_aside(local_path(options.html, "the page"), plan_page.page(options.recipe, plan, text))
    if options.json:
        return as_json
    if not options.schedules:
        return text
    return f"{text}\n\n{plan_text.schedules_report(compare_schedules(job, device), crossover(job, device))}"


def run(options: argparse.Namespace) -> tuple[str, int]:
    """What is printed, and the exit code: 1 where a search found nothing that fits.

    Raises:
      UsageError: there is no such recipe, or none is named.
      ConfigError: a change, a device or a number of them is wrong.
    """
    if options.measure:
        names = [options.recipe] if options.recipe else list(_MEASURED)
        recipes = {name: override_all(find_recipe(name)(), options.set) for name in names}
        return plan_measure.report(plan_measure.measure(recipes)), 0
    if options.calibration:
        return _calibration(options.json), 0
    if options.recipe is None:
        raise UsageError(
            "name a recipe, as with --recipe v3.pretrain; python -m experiments.run --list has all of them"
        )
    require(options.gpus is None or options.gpus > 0, f"--gpus is how many there are, not {options.gpus}")
    require(options.storage > 0, f"--storage is GB that a node writes in a second, not {options.storage:g}")
    device = with_price(find_device(options.gpu), options.price)
    experiment = override_all(find_recipe(options.recipe)(), options.set)
    if options.search:
        count = options.gpus or job_of(experiment).devices
        # Any layout will do: none of it is kept.
        parallel = dataclasses.replace(experiment.parallel, pipe=1, data=1, node=1, expert=1, layers_per_stage=None)
        job = job_of(dataclasses.replace(experiment, parallel=parallel), None, options.execution)
        return _search(job, device, count, experiment, options)
    job = job_of(experiment, options.gpus, options.execution)
    return _plan(job, device, options.gpus, experiment, options), 0


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    found = argparse.ArgumentParser(
        prog="python -m tools.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--recipe", help="as `python -m experiments.run --list` has it")
    found.add_argument("--gpus", type=int, metavar="N", help="how many; default: what the recipe's mesh has")
    found.add_argument("--gpu", default="h200", metavar="NAME", help="which, of planning/devices.py; default h200")
    found.add_argument("--price", type=float, metavar="$", help="of a GPU and hour; default: the device table's")
    found.add_argument(
        "--storage",
        type=float,
        default=STORAGE / 1e9,
        metavar="GB/S",
        help="what a node writes of a checkpoint in a second; default 2",
    )
    found.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="change a value of the recipe")
    found.add_argument(
        "--execution",
        choices=("lock_step", "free"),
        default="lock_step",
        help="lock_step: as this library runs a schedule; free: every rank by itself, as other systems do",
    )
    found.add_argument("--schedules", action="store_true", help="compare schedules; when does 1F1B beat DualPipe?")
    found.add_argument("--html", metavar="FILE", help="write the plan as a page with its bars and its pipeline as well")
    found.add_argument("--search", action="store_true", help="rank layouts that fit, and name those that nearly do")
    found.add_argument("--top", type=int, default=10, metavar="N", help="how many layouts --search prints")
    found.add_argument("--seconds", type=float, default=45.0, metavar="S", help="how long --search may take")
    found.add_argument("--calibration", action="store_true", help="the planner beside published runs")
    found.add_argument(
        "--measure", action="store_true", help="train steps of small recipes, planned and measured on this processor"
    )
    found.add_argument("--json", action="store_true", help="print it for programs")
    return found


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv` (without the program's name) and returns the exit code."""
    options = parser().parse_args(argv)
    try:
        text, code = run(options)
    except (ConfigError, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if not is_user_error(error) and not isinstance(error, OSError):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(text)
    return code


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # or a machine's GPU would be taken for nothing
    sys.exit(main(sys.argv[1:]))
