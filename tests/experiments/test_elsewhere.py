"""Where there is no Linux, such as macOS on Arm: what is Linux's own is left out, and a run starts all the same."""

from __future__ import annotations

import ctypes
import os
import platform

import pytest

from experiments import run
from experiments.cores import usable_cores


@pytest.fixture
def macos(monkeypatch):
    """What the standard library answers there; a C library that is asked for anything has no `mallopt`."""
    monkeypatch.setattr(platform, "libc_ver", lambda *arguments, **settings: ("", ""))
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    for name in [name for name in os.environ if name == "GLIBC_TUNABLES" or name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)

    def no_library(*arguments, **settings):
        raise AssertionError("glibc's malloc was asked for")

    monkeypatch.setattr(ctypes, "CDLL", no_library)


@pytest.mark.usefixtures("macos")
def test_malloc_is_left_alone():
    run.keep_freed_memory()


def test_malloc_is_told_where_it_is_glibcs(monkeypatch, macos):
    """Or leaving it alone elsewhere would prove nothing."""
    monkeypatch.setattr(platform, "libc_ver", lambda *arguments, **settings: ("glibc", "2.36"))
    with pytest.raises(AssertionError, match="malloc was asked for"):
        run.keep_freed_memory()


@pytest.mark.usefixtures("macos")
def test_all_cores_are_usable(monkeypatch, tmp_path):
    quotas = tuple(str(tmp_path / name) for name in ("cpu.max", "quota", "period"))
    assert usable_cores(quotas) == os.cpu_count()
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    assert usable_cores(quotas) == 10
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores(quotas) == 1


@pytest.mark.usefixtures("macos")
def test_the_environment_is_prepared():
    alone: dict[str, str] = {}
    run.prepare_environment(alone)
    assert alone == {}
    mesh: dict[str, str] = {}
    run.prepare_environment(mesh, virtual_devices=2)
    assert "--xla_force_host_platform_device_count=2" in mesh["XLA_FLAGS"].split()
    assert mesh["JAX_PLATFORMS"] == "cpu"


@pytest.mark.usefixtures("macos")
def test_recipes_are_listed_and_printed(capsys):
    assert run.main(["--list"]) == 0
    assert run.main(["tiny.pretrain", "--print_config"]) == 0
    shown = capsys.readouterr().out
    assert "tiny.pretrain" in shown
    assert "hidden_size" in shown
