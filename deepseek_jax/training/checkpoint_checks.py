"""What can be wrong with a checkpoint before any array is read, said in one line each."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.wording import first_few


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, found or used. The message is one line, for the person who started it."""


def check_entries(
    saved: Mapping[str, jax.ShapeDtypeStruct],
    wanted: Mapping[str, Any],
    *,
    skip: Iterable[str] = (),
    source: str = "the checkpoint",
    dtypes: bool = True,
) -> None:
    """Raises `CheckpointError` unless `saved` holds exactly the entries of `wanted`, in the same shapes and dtypes.

    Args:
      saved: global shape and dtype of each entry on disk.
      wanted: the same of each entry that the model at hand has: anything with a shape and, for `dtypes`, a dtype.
      skip: prefixes of names that may be in `saved` only.
      source: names the checkpoint in the message.
      dtypes: False where only the shapes must agree.
    """
    form = _form if dtypes else _shape
    prefixes = tuple(skip)
    missing = [name for name in wanted if name not in saved]
    left_over = [name for name in saved if name not in wanted and not name.startswith(prefixes)]
    differing = [
        f"{name} ({form(saved[name])} saved, {form(template)} wanted)"
        for name, template in wanted.items()
        if name in saved and form(saved[name]) != form(template)
    ]
    other = "of another shape or dtype" if dtypes else "of another shape"
    findings = (("missing", missing), ("left over", left_over), (other, differing))
    complaints = [f"{len(names)} {what}: {first_few(names)}" for what, names in findings if names]
    if complaints:
        raise CheckpointError(f"{source} is of another architecture; entries " + "; entries ".join(complaints))


def check_compatible(
    saved: Mapping[str, Any], current: Mapping[str, Any], *, source: str = "the checkpoint", what: str = "meta"
) -> None:
    """Raises `CheckpointError` unless two JSON documents agree on all that `current` names.

    Called with the parts of a checkpoint's `meta` that must not change, such as the model's architecture and the
    tokenizer's fingerprint: `check_compatible(store.documents(step)["meta"], {"tokenizer": fingerprint, "model": …})`.
    Keys that only `saved` has are ignored; tuples and lists are the same, as they are in JSON.

    Args:
      saved: a document read from a checkpoint.
      current: the values that the run at hand has.
      source: names the checkpoint in the message.
      what: names the document in the message.
    """
    old, new = dict(_leaves(saved, what)), dict(_leaves(current, what))
    absent = object()
    differing = [
        f"{path} is {_shown(old[path])} there and {_shown(value)} here"
        if path in old
        else f"{path} is not recorded there and {_shown(value)} here"
        for path, value in new.items()
        if old.get(path, absent) != value
    ]
    if differing:
        tokenizer = any("tokenizer" in line.split(" is ")[0] for line in differing)
        kind = "was made with another tokenizer" if tokenizer else "does not fit this run"
        raise CheckpointError(f"{source} {kind}: {first_few(differing, separator='; ')}")


def first_line(error: BaseException) -> str:
    """What an exception of another library says at its root, in one line of bounded length."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "…"


def _shape(entry: Any) -> str:
    return f"[{','.join(map(str, entry.shape))}]"


def _form(entry: jax.ShapeDtypeStruct) -> str:
    return jnp.dtype(entry.dtype).name + _shape(entry)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _leaves(document: Any, path: str) -> Iterable[tuple[str, Any]]:
    """Dotted path and value of every leaf of nested dictionaries and lists."""
    if isinstance(document, Mapping) and document:
        return itertools.chain.from_iterable(_leaves(value, f"{path}.{key}") for key, value in document.items())
    if isinstance(document, list | tuple) and document:
        return itertools.chain.from_iterable(_leaves(value, f"{path}.{i}") for i, value in enumerate(document))
    return iter([(path, document if not isinstance(document, tuple) else [])])
