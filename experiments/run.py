"""Starts any recipe: `python -m experiments.run tiny.pretrain --set optimizer.peak_lr=3e-4`.

Importing this module, `--help` and `--list` touch neither jax nor the library, so they answer at once, and the
environment that jax reads when it is imported can still be set.
"""

from __future__ import annotations

import ast
import ctypes
import difflib
import errno
import importlib
import importlib.util
import logging
import math
import os
import platform
import signal
import sys
import traceback
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import launch
from experiments.cores import usable_cores

EXIT_DONE, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
"""A stop by a signal exits with 128 plus its number, as shells do: 130 for SIGINT, 143 for SIGTERM."""

CONFIG_NAME = "config.json"
_RUN_MARKS = (CONFIG_NAME, "metrics.jsonl", "checkpoints")
"""Any of these in a folder says that a run lives there."""

USAGE = """\
Start a recipe:   python -m experiments.run tiny.pretrain [--set optimizer.peak_lr=3e-4]...
Go on with a run: python -m experiments.run --resume --workdir runs/tiny.pretrain
Start it again:   python -m experiments.run --config runs/tiny.pretrain/config.json --workdir runs/again

  --set PATH=VALUE      change one value of the config; may be repeated. Values: 3e-4, 2**14, true, none,
                        text, a,b for lists, Jsonl(path=a.jsonl) for a part chosen by name
  --print_config        print the resolved config, marking what differs from the defaults, and stop
  --workdir DIR         where the run lives; default runs/RECIPE
  --resume              continue from the last checkpoint in the workdir
  --config FILE         take a saved config instead of a recipe
  --init_from FROM      start from weights, not from the seed: hf:FOLDER (Hugging Face), or the folder of another run.
                        Architecture and tokenizer are taken from there; optimizer and data begin anew
  --profile FIRST:LAST  write an XProf trace of these steps to WORKDIR/profile
  --virtual_devices N   N devices on the CPU; a recipe for one device splits its batch over them (parallel.data=N).
                        One per core trains fastest; more simulate a mesh
  --simulate_hosts N    N processes on this machine that share the virtual devices, 8 of them unless said otherwise
  --coordinator HOST:PORT, --num_processes N, --process_id I
                        one of N processes on several hosts; SLURM and Kubernetes say so by themselves. HOST:PORT is
                        process 0's, which uses the next port too; --virtual_devices are then those of each process
  --host_timeout S      seconds to wait for the other processes at the start; default 300
  --debug               show the traceback of an error
  --list                list the recipes and stop
"""


class UsageError(Exception):
    """A command line that cannot be carried out; the message says why."""


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv` (without the program's name) and returns the exit code."""
    options = _options()
    try:
        positional = options(["run", *argv])[1:]
    except flags.Error as error:
        return _fail(f"{error}; --help shows the options", EXIT_USAGE)
    if options.help or (not argv):
        print(USAGE, end="")
        return EXIT_DONE
    if options.list:
        print(list_recipes(), end="")
        return EXIT_DONE
    # Grain looks at absl's own flags, which nobody parses here.
    flags.FLAGS.mark_as_parsed()
    started = False
    try:
        if options.simulate_hosts and not options.print_config:
            return launch.simulate(argv, options)
        cluster = launch.find(options, os.environ)
        threads_are_chosen = "NPROC" in os.environ
        prepare_environment(os.environ, virtual_devices=options.virtual_devices)
        devices = launch.total_virtual_devices(options, cluster)
        experiment, workdir = _resolve(options, positional, devices)
        if experiment.parallel.pipe > 1 and not threads_are_chosen:
            prepare_for_stages(os.environ, virtual_devices=options.virtual_devices)
        if options.print_config:
            from deepseek_jax.config_io import format_config

            print(format_config(experiment), end="")
            return EXIT_DONE
        profile = _profile_steps(options.profile)
        speaks = cluster is None or cluster.process_id == 0
        _check_workdir(workdir, experiment, resume=options.resume, speaks=speaks)
        started = True
        # Only when all have checked the folder and are here may one of them write to it.
        with launch.joined(cluster, experiment, workdir, options):
            return _run(experiment, workdir, profile, resume=options.resume, virtual_devices=devices, speaks=speaks)
    except KeyboardInterrupt as interrupt:
        number = getattr(interrupt, "signal", signal.SIGINT)
        return _fail(str(interrupt) or "interrupted before there was anything to save", 128 + number)
    except Exception as error:
        if not is_user_error(error):
            raise
        if options.debug:
            traceback.print_exc()
        return _fail(str(error), EXIT_FAILED if started else EXIT_USAGE)


def _options() -> flags.FlagValues:
    """Flags of their own, so that neither another library's nor a second call's mix with ours."""
    options = flags.FlagValues()
    flags.DEFINE_bool("help", False, "", short_name="h", flag_values=options)
    flags.DEFINE_multi_string("set", [], "", flag_values=options)
    for name in ("print_config", "resume", "debug", "list"):
        flags.DEFINE_bool(name, False, "", flag_values=options)
    for name in ("workdir", "config", "profile", "init_from"):
        flags.DEFINE_string(name, None, "", flag_values=options)
    flags.DEFINE_integer("virtual_devices", 0, "", lower_bound=0, flag_values=options)
    launch.define_flags(options)
    return options


def _resolve(options: flags.FlagValues, positional: Sequence[str], virtual_devices: int) -> tuple[Any, str]:
    """The experiment and the folder that the command line asks for; `virtual_devices` are those of all processes."""
    if len(positional) > 1:
        raise UsageError(f"one recipe at a time, not {' '.join(positional)}; values are changed with --set path=value")
    if options.config and positional:
        raise UsageError(f"give the recipe {positional[0]} or --config, not both")
    source = options.config
    if not positional and not source and options.resume and options.workdir:
        from deepseek_jax.paths import local_path

        source = str(local_path(options.workdir, "the workdir") / CONFIG_NAME)
    if source:
        if not options.workdir and not options.print_config:
            raise UsageError("--config needs --workdir, the folder of the new run")
        experiment, workdir = _load(source), options.workdir
    elif positional:
        recipe = find_recipe(positional[0])
        experiment, workdir = recipe(), options.workdir or f"runs/{_short_name(positional[0])}"
    else:
        raise UsageError("name a recipe, such as tiny.pretrain; --list shows them all")
    from deepseek_jax.config_io import override_all

    if options.init_from:
        from deepseek_jax.training.init_from import starting_from

        if options.resume:
            raise UsageError("--resume continues from the run's own checkpoint; leave out --init_from")
        # What is set of these two may be what makes the folder usable: a tokenizer of its own, a shorter context.
        early = [change for change in options.set if change.startswith(("tokenizer.", "data."))]
        experiment = starting_from(override_all(experiment, early), options.init_from)
    experiment = override_all(experiment, options.set)
    if virtual_devices > 1 and math.prod(experiment.parallel.shape) == 1:
        experiment = override_all(experiment, [f"parallel.data={virtual_devices}"])
    return experiment, workdir


def _load(path: str) -> Any:
    from deepseek_jax.config_io import load_config
    from deepseek_jax.training.experiment import Experiment

    return load_config(Experiment, path)


def _profile_steps(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    from deepseek_jax.training.profiling import parse_steps

    return parse_steps(text)


def _check_workdir(workdir: str, experiment: Any, *, resume: bool, speaks: bool) -> None:
    """Refuses to start over in a run's folder; says, where it `speaks`, what a resumed run changes of its config."""
    from deepseek_jax.config import ConfigError
    from deepseek_jax.config_io import diff
    from deepseek_jax.paths import local_path

    folder = local_path(workdir, "the workdir")
    found = [name for name in _RUN_MARKS if (folder / name).exists()]
    if found and not resume:
        raise UsageError(
            f"{workdir} already holds a run ({', '.join(found)}): "
            "pass --resume to continue it, or another --workdir to start anew"
        )
    if resume and not found:
        raise UsageError(f"--resume: {workdir} holds no run to continue")
    if resume and speaks and CONFIG_NAME in found:
        try:
            changes = diff(_load(f"{workdir}/{CONFIG_NAME}"), experiment)
        except ConfigError as error:  # a recipe may continue what an older version began
            print(f"cannot compare with the run's config: {error}", file=sys.stderr)
            return
        for path, before, now in changes:
            print(f"resuming with {path} = {now}, was {before}", file=sys.stderr)


def _run(
    experiment: Any,
    workdir: str,
    profile: tuple[int, int] | None,
    *,
    resume: bool,
    virtual_devices: int,
    speaks: bool,
) -> int:
    from deepseek_jax.training.loop import train

    if speaks:
        show_choice_of_kernels()
    result = train(experiment, workdir=workdir, resume=resume, profile=profile)
    if result.status == "interrupted":
        number = getattr(result, "signal", None) or signal.SIGINT
        again = f"--resume --workdir {workdir}" + (f" --virtual_devices {virtual_devices}" if virtual_devices else "")
        if speaks:
            print(f"stopped by {signal.Signals(number).name}; {again} goes on", file=sys.stderr)
        return 128 + number
    return EXIT_DONE


# --- recipes --------------------------------------------------------------------------------------------------------


def recipes(folder: Path | None = None) -> dict[str, str]:
    """`{"tiny.pretrain": first line of its docstring}` of every recipe in `experiments/`, without importing one.

    A recipe is a public function annotated `-> Experiment` that can be called without arguments.
    """
    found = {}
    for file in sorted((folder or Path(__file__).parent).glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8"), str(file)).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and _is_recipe(node):
                found[f"{file.stem}.{node.name}"] = (ast.get_docstring(node) or "").partition("\n")[0]
    return found


def _is_recipe(node: ast.FunctionDef) -> bool:
    arguments = node.args
    optional = len(arguments.defaults) == len(arguments.posonlyargs) + len(arguments.args)
    optional = optional and None not in arguments.kw_defaults
    returns = ast.unparse(node.returns).strip("'\"") if node.returns else ""
    return optional and returns.rpartition(".")[2] == "Experiment"


def list_recipes() -> str:
    """The recipes as a table for people."""
    known = recipes()
    width = max(map(len, known), default=0)
    return "".join(f"{name:<{width}}  {line}".rstrip() + "\n" for name, line in known.items())


def find_recipe(name: str) -> Callable[[], Any]:
    """The function that `name` means: `tiny.pretrain` in this folder, or `package.module.function` anywhere."""
    known, short = recipes(), _short_name(name)
    if short in known:
        module, _, function = short.rpartition(".")
        return getattr(importlib.import_module(f"experiments.{module}"), function)
    module, _, function = name.rpartition(".")
    if module and module != "experiments" and _module_exists(module):
        recipe = getattr(importlib.import_module(module), function, None)
        if callable(recipe):
            return recipe
    nearest = difflib.get_close_matches(short, known, n=1, cutoff=0.4)
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    raise UsageError(f"no recipe {name}.{hint} There are: {', '.join(known) or 'none'}")


def _short_name(name: str) -> str:
    return name.removeprefix("experiments.")


def _module_exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


# --- environment and errors -----------------------------------------------------------------------------------------


def prepare_environment(environment: MutableMapping[str, str], *, virtual_devices: int = 0) -> None:
    """Sets what jax and XLA read when jax is imported; call it before that.

    What the user set is kept, but for JAX_PLATFORMS where there are virtual devices: only the CPU has these.
    """
    keep_freed_memory()
    if not virtual_devices:
        return
    given = environment.get("XLA_FLAGS", "").split()
    wanted: dict[str, int | str] = {
        "--xla_force_host_platform_device_count": virtual_devices,
        # The default of 40 s kills a slow machine's run that is only waiting its turn.
        "--xla_cpu_collective_call_terminate_timeout_seconds": 600,
    }
    if virtual_devices > 1:
        # The devices share the cores already: threads within one device's operations would only get in their way.
        wanted["--xla_cpu_multi_thread_eigen"] = "false"
    given += [f"{flag}={value}" for flag, value in wanted.items() if not any(g.startswith(flag) for g in given)]
    environment["XLA_FLAGS"] = " ".join(given)
    environment["JAX_PLATFORMS"] = "cpu"
    # A collective occupies a thread of XLA's until all devices have come to it. Those of a train step without pipeline
    # stages follow one another, so a thread per device is enough, and more take turns on the cores and spoil each
    # other's caches. Simulated meshes run programs of any kind, and hang now and then with few threads.
    if 1 < virtual_devices <= usable_cores():
        environment.setdefault("NPROC", str(virtual_devices))
    elif virtual_devices > 1:
        environment.setdefault("NPROC", str(max(32, 4 * virtual_devices)))


def prepare_for_stages(environment: MutableMapping[str, str], *, virtual_devices: int) -> None:
    """Gives a run with pipeline stages the threads that it needs; call it before jax has devices.

    A tick sends up to a dozen arrays at once, and with too few threads devices wait for each other forever. More for
    all would be too many: XLA cuts each program into as many parts as there are threads, and maps each into memory.
    """
    if virtual_devices > 1:
        environment["NPROC"] = str(16 * virtual_devices)


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next step; elsewhere, or where the user tuned malloc, does nothing.

    XLA's CPU backend frees and allocates the buffers of every step anew, and glibc gives blocks of that size back to
    the kernel each time. To get them zeroed again, page by page, costs a train step a tenth of its time.
    """
    # Numbers of malloc.h. One arena, since only the main one can grow without mmap; never mmap; never trim.
    arena_max, mmap_max, top_pad, trim_threshold = -8, -4, -2, -1
    _set_malloc({arena_max: 1, mmap_max: 0, top_pad: 64 << 20, trim_threshold: -1})


def show_choice_of_kernels() -> None:
    """Has `pallas_kernels` say on stderr which kernels it chooses; on a CPU it has none and says nothing."""
    log = logging.getLogger("pallas_kernels")
    log.setLevel(logging.INFO)
    if not log.handlers:
        log.addHandler(logging.StreamHandler())


def return_freed_memory() -> None:
    """Tells glibc to give blocks of a megabyte and more back as soon as they are freed, for what passes a lot through.

    By itself it does so only until such a block is freed for the first time, and then keeps them, in every thread.
    """
    mmap_threshold = -3
    _set_malloc({mmap_threshold: 1 << 20})


def _set_malloc(options: dict[int, int]) -> None:
    """Sets options of glibc's malloc; elsewhere, or where the user tuned it, does nothing."""
    tuned = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    if tuned or platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in options.items():
        mallopt(option, value)


def is_user_error(error: BaseException) -> bool:
    """Whether the message is for the user: the library's own errors are, a disk's, and those of a file where a folder
    should be or the other way round; any other is a bug to trace.
    """
    ours = ("deepseek_jax", "pallas_kernels")
    disk = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
    path = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR)
    if isinstance(error, OSError) and error.errno in (*disk, *path):
        return True
    return isinstance(error, UsageError) or any(cls.__module__.partition(".")[0] in ours for cls in type(error).__mro__)


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    try:
        exit_code = main(sys.argv[1:])
    except Exception:  # a bug
        traceback.print_exc()
        exit_code = EXIT_FAILED
    launch.leave(exit_code)
