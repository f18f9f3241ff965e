"""Compiled programs kept on disk between runs."""

from __future__ import annotations

from typing import Any

import jax
from etils import epath


def use_compile_cache(directory: str | None = None, *, exact_names: bool = False) -> None:
    """Keeps compiled programs on disk, so that a second start compiles nothing; a user's own setting stays.

    Simulated hosts, which are several processes on a CPU, compile at every start.

    A program found there has the names and source lines of the code that first compiled it; with `exact_names`, for a
    trace, only programs that agree in these too are taken.
    """
    config: Any = jax.config  # declares its values at run time
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        # Only process 0 writes, and another one's key for the same program is different: process 0 would begin at once,
        # and gloo gives up after half a minute of waiting for those that compile.
        config.update("jax_enable_compilation_cache", False)
    if config.jax_compilation_cache_dir is None:
        path = epath.Path(directory or "~/.cache/deepseek_jax/xla").expanduser()
        config.update("jax_compilation_cache_dir", str(path))
        config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if exact_names:
        config.update("jax_compilation_cache_include_metadata_in_key", True)
