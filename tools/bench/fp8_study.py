"""The controlled run: the same recipe trained in full precision and in FP8, and whether their losses agree.

    python -m tools.bench.fp8_study --workdir runs/fp8_study [--recipe small.pretrain] [--train_steps N] [--runs a,b]

Every run is one of `experiments.run`, in a process and a folder of its own under the workdir; the same command goes on
where it was stopped. All runs see the same tokens in the same order. Those in full precision differ in the seed of
their initial weights, which shows how far two good runs lie apart; FP8 and the controls begin with the first one's. A
control gives up what the recipe is for, and should fail where FP8 passes.

Section 3.3 and appendix B.1: "the relative loss error of our FP8-training model remains consistently below 0.25%",
losses smoothed by an exponential moving average of 0.9. Here: of the main loss, at every step of the second half of
training; or below the spread of the seeds, where that is larger.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from absl import app, flags

from deepseek_jax.config import ConfigError, require
from deepseek_jax.config_io import diff, load_config, save_config
from deepseek_jax.precision.policy import Fp8Config, PrecisionPolicy
from deepseek_jax.training.experiment import Experiment, LoggingConfig
from deepseek_jax.training.schedules import Curve, Phase, ScheduleConfig
from experiments.cores import devices_to_train_on, usable_cores
from experiments.run import CONFIG_NAME, UsageError, find_recipe
from tools.bench.common import machine
from tools.bench.fp8_study_report import Run, draw, read_run, table

Compute = Literal["float32", "bfloat16"]
RESULT = Path(__file__).parent / "results" / "fp8_study.md"
COARSE = Fp8Config(weights="tensor", activations="tensor", gradients="tensor", gradient_format="e5m2")
CAST = Fp8Config(weights="cast", activations="cast", gradients="cast")


@dataclasses.dataclass(frozen=True)
class Case:
    """What sets a run apart."""

    label: str
    role: str
    """"baseline", "fp8" or "control"."""
    fp8: Fp8Config | None = None
    weights_seed: int = 0


CASES = {
    "baseline_1": Case("{compute}, first seed", "baseline"),
    "baseline_2": Case("{compute}, second seed", "baseline", weights_seed=1),
    "baseline_3": Case("{compute}, third seed", "baseline", weights_seed=2),
    "fp8": Case("FP8, the rest {compute}", "fp8", Fp8Config()),
    "per_tensor": Case("a scale per tensor, gradients in E5M2", "control", COARSE),
    "cast": Case("no scales, a plain cast to E4M3", "control", CAST),
    "no_promotion": Case("sums in 14 bits", "control", Fp8Config(promote=False)),
    "coarse": Case("both of these", "control", dataclasses.replace(COARSE, promote=False)),
}
DEFAULT_RUNS = ("baseline_1", "baseline_2", "baseline_3", "fp8", "per_tensor")

_WORKDIR = flags.DEFINE_string("workdir", None, "the folder of the runs", required=True)
_RECIPE = flags.DEFINE_string("recipe", "tiny.pretrain", "what is trained")
_STEPS = flags.DEFINE_integer(
    "train_steps", None, "optimizer steps of each run; default: the recipe's course", lower_bound=2
)
_RUNS = flags.DEFINE_list("runs", list(DEFAULT_RUNS), f"which to train and report: {', '.join(CASES)}")
_COMPUTE = flags.DEFINE_enum(
    "compute",
    "float32",
    ["float32", "bfloat16"],
    "precision.compute of every run: float32 suits a CPU, where bfloat16 is emulated",
)
_DEVICES = flags.DEFINE_integer(
    "virtual_devices", devices_to_train_on(usable_cores()), "virtual CPU devices of a run; 0: the devices there are"
)
_REPORT_ONLY = flags.DEFINE_bool("report_only", False, "train nothing; report on what the folder has")
_WRITE = flags.DEFINE_bool("write", False, "write table and pictures to tools/bench/results too")


def study_config(recipe: str, case: Case, *, steps: int | None, compute: Compute, virtual_devices: int) -> Experiment:
    """The run of a case: the recipe with the case's precision and weights, logged at every step.

    Raises:
      UsageError: there is no such recipe.
      ConfigError: the recipe cannot have these values.
    """
    experiment = find_recipe(recipe)()
    schedule = experiment.schedule if steps is None else shortened(experiment, steps)
    parallel = experiment.parallel
    if virtual_devices > 1 and max(parallel.shape) == 1:
        parallel = dataclasses.replace(parallel, data=virtual_devices)
    # Where experts are spread over devices, dispatch in FP8 is part of the recipe; the controls cannot have it.
    precision = PrecisionPolicy(compute=compute, fp8=case.fp8, dispatch="float8" if case.role == "fp8" else None)
    return dataclasses.replace(
        experiment,
        schedule=schedule,
        parallel=parallel,
        precision=precision,
        weights_seed=case.weights_seed,
        evaluation=dataclasses.replace(experiment.evaluation, every_steps=0, samples=()),
        logging=LoggingConfig(every_steps=1, tensorboard=False),
    )


def shortened(experiment: Experiment, steps: int) -> ScheduleConfig:
    """The recipe's course, every milestone moved in proportion, so that it takes about so many steps."""
    schedule, total = experiment.schedule, 0
    for _ in range(steps):
        total += schedule.rows(total) * experiment.data.sequence_length
    ratio = total / schedule.total_tokens

    def moved(curve: Curve) -> Curve:
        phases: list[Phase] = []
        for phase in curve.phases:
            until = max(round(phase.until * ratio), phases[-1].until + 1 if phases else 1)
            phases.append(dataclasses.replace(phase, until=until))
        return dataclasses.replace(curve, phases=tuple(phases))

    return dataclasses.replace(
        schedule,
        total_tokens=total,
        learning_rate=moved(schedule.learning_rate),
        batch_rows=moved(schedule.batch_rows),
        mtp_weight=moved(schedule.mtp_weight),
        bias_rate=moved(schedule.bias_rate),
    )


def check_folder(folder: Path, wanted: Experiment) -> bool:
    """Whether a run was begun in `folder`.

    Raises:
      ConfigError: it is another run than `wanted`.
    """
    path = folder / CONFIG_NAME
    if not path.exists():
        return False
    if changes := diff(wanted, load_config(Experiment, path)):
        field, here, there = changes[0]
        raise ConfigError(
            f"{folder} holds another run: {field} is {there} there and {here} in this study; name another --workdir, "
            "or give the --recipe, --train_steps, --compute and --virtual_devices that it was begun with"
        )
    return True


def train(name: str, experiment: Experiment, workdir: Path) -> None:
    """Trains one run to its end, or as far as its losses are finite, from where it stands.

    Raises:
      ConfigError: it was stopped or failed; the message says where its output is.
    """
    folder, log = workdir / name, workdir / f"{name}.log"
    begun = check_folder(folder, experiment)
    if (folder / "result.json").exists() or diverged(folder):
        return
    if begun:
        options = ["--resume"]
    else:
        config = workdir / f"{name}.json"
        save_config(experiment, config)
        options = ["--config", str(config)]
    command = [sys.executable, "-m", "experiments.run", *options, "--workdir", str(folder)]
    if _DEVICES.value:
        command += ["--virtual_devices", str(_DEVICES.value)]
    print(f"{name}: {'goes on' if begun else 'begins'}; its output: {log}", file=sys.stderr)
    status = _wait(command, log)
    if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise ConfigError(f"{name} was stopped and is saved; the same command goes on")
    if status and not diverged(folder):
        lines = log.read_text(errors="replace").strip().splitlines() or ["without a word"]
        raise ConfigError(f"{name} ended with status {status}: {lines[-1]} (all of its output: {log})")


def diverged(folder: Path) -> bool:
    """Whether the run ended because something was not finite (`training.stability` saves its batch)."""
    return any(folder.glob("nonfinite_step_*.npz"))


def _wait(command: Sequence[str], log: Path) -> int:
    """The exit status of a command whose output is added to `log`. A signal to this process ends it in its own way."""
    with log.open("ab") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as process:
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            while True:
                try:
                    return process.wait()
                except KeyboardInterrupt:  # the run got it as well, and saves itself
                    continue
        finally:
            signal.signal(signal.SIGTERM, before)


def report(names: Sequence[str], workdir: Path) -> str:
    """Markdown of the runs that there are; draws the pictures into the workdir."""
    runs = [
        read_run(workdir / name, CASES[name].label.format(compute=_COMPUTE.value), CASES[name].role)
        for name in names
        if (workdir / name / "metrics.jsonl").exists()
    ]
    require(bool(runs), f"no run of this study in {workdir}; leave out --report_only to train")
    picture = draw(runs)
    for suffix in ("png", "svg"):
        picture.savefig(workdir / f"fp8_study.{suffix}", dpi=160)
    return "\n".join([*_heading(names, runs), *table(runs), "", "![losses and relative errors](fp8_study.png)", ""])


def _heading(names: Sequence[str], runs: Sequence[Run]) -> list[str]:
    steps = "" if _STEPS.value is None else f" --train_steps {_STEPS.value}"
    command = (
        f"python -m tools.bench.fp8_study --workdir DIR --recipe {_RECIPE.value}{steps} --compute {_COMPUTE.value} "
        f"--virtual_devices {_DEVICES.value} --runs {','.join(names)} --write"
    )
    return [
        "# FP8 against full precision: a controlled run",
        "",
        f"`{command}` on {datetime.date.today()}, on {machine()}; jax {importlib.metadata.version('jax')}.",
        "",
        f"Matmuls that are not FP8, and all activations: {_COMPUTE.value}. {runs[0].tokens[-1]:,.0f} tokens each, the "
        "same ones in the same order.",
        "",
    ]


def main(argv: Sequence[str]) -> int:
    """Trains what is not trained yet, and reports."""
    names = list(dict.fromkeys(_RUNS.value))
    try:
        require(len(argv) == 1, f"unexpected argument {' '.join(argv[1:])}; runs are named by --runs=a,b")
        unknown = [name for name in names if name not in CASES]
        require(not unknown, f"--runs: there is no {', '.join(unknown)}; there are {', '.join(CASES)}")
        require("baseline_1" in names, "--runs needs baseline_1, with which the others are compared")
        workdir = Path(_WORKDIR.value)
        experiments = {
            name: study_config(
                _RECIPE.value,
                CASES[name],
                steps=_STEPS.value,
                compute=_COMPUTE.value,
                virtual_devices=_DEVICES.value,
            )
            for name in names
        }
        for name, experiment in experiments.items():  # all of them, before an hour goes into the first
            check_folder(workdir / name, experiment)
        if not _REPORT_ONLY.value:
            workdir.mkdir(parents=True, exist_ok=True)
            for name, experiment in experiments.items():
                train(name, experiment, workdir)
        text = report(names, workdir)
    except (ConfigError, UsageError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    (workdir / "fp8_study.md").write_text(text)
    print(text)
    if _WRITE.value:
        RESULT.write_text(text)
        RESULT.with_suffix(".png").write_bytes((workdir / "fp8_study.png").read_bytes())
    return 0


if __name__ == "__main__":
    app.run(main)
