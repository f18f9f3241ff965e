"""What every test shares: the environment that jax reads at import, hypothesis settings, and visible skips."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

# Before anything imports jax. Compiled programs are kept between runs, under the repository and not the user's home.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")

import hypothesis
import pytest

# Deadlines fail on a loaded machine, and a failure that the next run does not repeat helps nobody.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests that need packages which are not installed, and says which."""
    absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    skips = {"torch": f"needs {' and '.join(absent)}: make test PARITY=1"} if absent else {}
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        skips["aot"] = "needs jax's CUDA wheels (no GPU): make test-aot"
    for item in items:
        for name, reason in skips.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips the tests for a GPU where there is none; asks jax only when such a test is about to run."""
    if item.get_closest_marker("gpu"):
        import jax

        if jax.default_backend() != "gpu":
            pytest.skip(f"needs a GPU; jax runs on {jax.default_backend()} here")


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Lets compiled programs go between files once they map half of what a process may map (65,530 by default).

    Beyond that XLA dies while it compiles, without a word.
    """
    if (nextitem is None or nextitem.path != item.path) and _mapped_areas() > 30_000:
        import gc

        import jax

        jax.clear_caches()
        small_model = sys.modules.get("small_model")
        if small_model is not None:
            small_model._step.cache_clear()
        gc.collect()


def _mapped_areas() -> int:
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0
