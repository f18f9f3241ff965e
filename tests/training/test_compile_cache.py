"""The persistent compile cache: a second start compiles nothing, and what the user has set stays."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import jax
import pytest

from deepseek_jax.training.compile_cache import use_compile_cache

PROGRAM = """
import jax, jax.monitoring
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rpartition("/")[2]))
from deepseek_jax.training.compile_cache import use_compile_cache
use_compile_cache()
jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((8, 8))).block_until_ready()
print(jax.config.jax_compilation_cache_dir, events.count("cache_hits"), events.count("cache_misses"))
"""


@contextlib.contextmanager
def setting(**values):
    """jax's settings of these names, as they are here only."""
    before = {name: getattr(jax.config, name) for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.fixture
def settings():
    """The settings that `use_compile_cache` may change, and back."""
    with setting(
        jax_compilation_cache_dir=None,
        jax_persistent_cache_min_compile_time_secs=1.0,
        jax_compilation_cache_include_metadata_in_key=False,
    ):
        yield


def test_processes_that_share_a_cpu_all_compile(settings, monkeypatch):
    """Where one of them found its program at once, it would wait for the others for longer than gloo does."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with setting(jax_enable_compilation_cache=True):
        use_compile_cache()
        assert not jax.config.jax_enable_compilation_cache


def test_a_second_start_compiles_nothing(tmp_path):
    """Programs of any compile time are kept, in the user's own cache folder."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}

    def start() -> list[str]:
        command = [sys.executable, "-c", PROGRAM]
        environment["HOME"] = str(tmp_path)
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout.split()

    folder = tmp_path / ".cache" / "deepseek_jax" / "xla"
    directory, hits, misses = start()
    assert directory == str(folder)
    assert (int(hits), int(misses) > 0) == (0, True)
    assert list(folder.iterdir())
    assert start() == [str(folder), misses, "0"]


@pytest.mark.usefixtures("settings")
def test_a_folder_is_set_where_there_was_none(tmp_path):
    use_compile_cache(str(tmp_path / "cache"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "cache")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
    assert jax.config.jax_compilation_cache_include_metadata_in_key is False


@pytest.mark.usefixtures("settings")
def test_what_the_user_has_set_stays(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    for exact_names in (False, True):
        use_compile_cache(exact_names=exact_names)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 1.0


@pytest.mark.usefixtures("settings")
def test_a_trace_takes_only_programs_of_its_own_names(tmp_path):
    use_compile_cache(str(tmp_path), exact_names=True)
    assert jax.config.jax_compilation_cache_include_metadata_in_key is True
