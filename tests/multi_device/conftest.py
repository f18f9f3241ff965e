"""Runs each file of this folder in a process of its own, with eight virtual CPU devices.

The number of devices is fixed when jax starts, so these tests cannot share a process with the others. Here each file
is one test, which passes if `pytest` on that file does. To run one function:

    pytest tests/multi_device/test_x.py -k name
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.run import prepare_environment, prepare_for_stages

DEVICES = 8
TIMEOUT_SECONDS = 900
TIMEOUT_WITH_SLOW_SECONDS = 3 * 3600
_COMPILE_QUICKLY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
"""For arrays of a few numbers nearly all time goes into compiling."""
_INSIDE = "DEEPSEEK_JAX_TEST_DEVICES"
"""Set in the process that has the devices, where files are collected as everywhere."""


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.File | None:
    """Puts an `IsolatedFile` in the place of the module, which is then not imported here."""
    return None if _INSIDE in os.environ else IsolatedFile.from_parent(parent, path=module_path)


class IsolatedFile(pytest.File):
    """A test file seen from outside: one item."""

    def collect(self) -> Iterator[pytest.Item]:
        yield IsolatedRun.from_parent(self, name=f"on_{DEVICES}_devices")


class IsolatedRun(pytest.Item):
    """Runs `pytest` on the file in a process with virtual devices."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        tree = ast.parse(self.path.read_text(encoding="utf-8"))
        # So that `-k name` finds the file, and then the function in it.
        self.extra_keyword_matches |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}

    def runtest(self) -> None:
        environment = os.environ | {_INSIDE: str(DEVICES)}
        prepare_environment(environment, virtual_devices=DEVICES)
        if "pipeline" in self.path.name:
            prepare_for_stages(environment, virtual_devices=DEVICES)
        environment["XLA_FLAGS"] += " " + _COMPILE_QUICKLY
        command = [sys.executable, "-m", "pytest", str(self.path), "-p", "no:cacheprovider", "-rs", "--tb=short"]
        command += ["-m", self.config.option.markexpr] if self.config.option.markexpr else []
        command += ["-k", self.config.option.keyword] if self.config.option.keyword else []
        quick = "not slow" in (self.config.option.markexpr or "")
        limit = TIMEOUT_SECONDS if quick else TIMEOUT_WITH_SLOW_SECONDS
        code, output = _run(command, environment, str(self.config.rootpath), limit)
        self.add_report_section("call", f"{DEVICES} devices", output)
        if code == pytest.ExitCode.NO_TESTS_COLLECTED:
            pytest.skip("no test of this file was selected")
        if code != pytest.ExitCode.OK:
            pytest.fail(f"pytest ended with {code} on {DEVICES} virtual devices:\n{output}", pytrace=False)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, f"{self.path.name} on {DEVICES} virtual devices"


def _run(command: list[str], environment: dict[str, str], folder: str, limit: int) -> tuple[int | str, str]:
    """The exit code and the output of `command`; one that takes more than `limit` seconds is ended."""
    # What the outer run asked of xdist or the report is not for the inner one.
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd=folder,
            timeout=limit,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        return f"no answer in {limit} s", output
    return done.returncode, done.stdout
