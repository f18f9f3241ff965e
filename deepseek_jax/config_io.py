"""Configs as text: override a leaf by its dotted path, save, load, print and compare.

Works on any nested frozen dataclasses whose fields are annotated with numbers, booleans, text, literals, enums,
tuples, optional values and dataclasses, alone or in unions. A config read here is made by its own constructors, so
every check in `__post_init__` runs.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from deepseek_jax.config import ConfigError, require
from deepseek_jax.config_text import (
    Kind,
    Mismatch,
    alternatives,
    declared_classes,
    describe,
    field_types,
    known_classes,
    parse_value,
    quote_value,
    required_fields,
)

C = TypeVar("C")

_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
"""JSON has no such numbers; they are saved as these strings."""


def leaves(config: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of `config` by its dotted path: `{"optimizer.peak_lr": 2.2e-4, …}`.

    A tuple of plain values is one leaf; a tuple of dataclasses is walked, its elements named by their index.
    """
    inner = dict(_children(config))
    if not inner:
        return {path: config}
    found: dict[str, Any] = {}
    for name, value in inner.items():
        found |= leaves(value, _join(path, name))
    return found


def diff(a: Any, b: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Where two configs differ: `(path, value in a, value in b)`; whole objects where their classes differ."""
    if type(a) is type(b):
        ours, theirs = dict(_children(a)), dict(_children(b))
        if ours and ours.keys() == theirs.keys():
            return [d for name, value in ours.items() for d in diff(value, theirs[name], _join(path, name))]
    return [] if a == b else [(path, a, b)]


# --- override -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Edit:
    """What the overrides ask of one place in the config, and of the places below it."""

    text: str | None = None
    below: dict[str, _Edit] = dataclasses.field(default_factory=dict)

    def assignments(self, path: str) -> Iterator[str]:
        """The overrides at and below `path`, as the user wrote them."""
        if self.text is not None:
            yield f"{path}={self.text}"
        for name, edit in self.below.items():
            yield from edit.assignments(_join(path, name))


class _UnknownPathError(LookupError):
    """Carries the path that leads nowhere up to where the whole config is known."""


def override(config: C, assignment: str) -> C:
    """A copy of `config` with one leaf changed: `override(config, "optimizer.peak_lr=3e-4")`."""
    return override_all(config, [assignment])


def override_all(config: C, assignments: Iterable[str]) -> C:
    """A copy of `config` with several leaves changed at once.

    Each enclosing dataclass is rebuilt once, after all its changes, so fields that must agree can move together. Of
    two values for one path the later counts. A dataclass is replaced by name: `data.sources.0=Jsonl(path=a.jsonl)`.
    """
    root = _Edit()
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        require(
            bool(equals and path.strip()),
            f"override {assignment!r} must read path=value, for example optimizer.peak_lr=3e-4",
        )
        edit = root
        for part in path.strip().split("."):
            edit = edit.below.setdefault(part, _Edit())
        edit.text, edit.below = text.strip(), {}
    try:
        return _apply(root, config, type(config), "")
    except _UnknownPathError as error:
        raise ConfigError(_unknown_path_message(config, str(error))) from None


def _apply(edit: _Edit, value: Any, annotation: Any, path: str) -> Any:
    """`value`, which stands at `path` and is annotated with `annotation`, after `edit`."""
    if edit.text is not None:
        value = _parse(edit.text, value, annotation, path)
    if not edit.below:
        return value
    if _is_config(value):
        types = field_types(type(value))
        changes = {}
        for name, below in edit.below.items():
            if name not in types:
                raise _unknown_path(below, _join(path, name))
            changes[name] = _apply(below, getattr(value, name), types[name], _join(path, name))
        try:
            return dataclasses.replace(value, **changes)
        except ValueError as error:
            raise ConfigError(f"after {', '.join(edit.assignments(path))}: {error}") from error
    if isinstance(value, tuple):
        elements = list(value)
        for name, below in edit.below.items():
            if not name.isdecimal() or int(name) >= len(elements):
                raise _unknown_path(below, _join(path, name))
            index = int(name)
            elements[index] = _apply(below, value[index], _element_type(annotation, index), _join(path, name))
        return tuple(elements)
    classes = [c.__name__ for c in known_classes(annotation)]
    if value is None and classes:
        raise ConfigError(f"{path} is none and has no fields; set it first, for example {path}={classes[0]}")
    name, below = next(iter(edit.below.items()))
    raise _unknown_path(below, _join(path, name))


def _parse(text: str, value: Any, annotation: Any, path: str) -> Any:
    try:
        return parse_value(text, annotation)
    except Mismatch:
        pass
    except ValueError as error:
        raise ConfigError(f"{path}={text}: {error}") from error
    message = f"{path}={text}: {text!r} is not {describe(annotation)}"
    if _is_config(value) and (names := list(field_types(type(value)))):
        message += f"; to change a field of it, set for example {path}.{names[0]}"
    raise ConfigError(message)


def _unknown_path(below: _Edit, path: str) -> _UnknownPathError:
    """The error for the first override at or below `path`, which does not exist."""
    return _UnknownPathError(next(below.assignments(path)).partition("=")[0])


def _unknown_path_message(config: Any, path: str) -> str:
    name = path.rpartition(".")[2]

    def likeness(known: str) -> tuple[float, float]:
        # A name that exists elsewhere is a likelier slip than a path that merely looks alike.
        whole = difflib.SequenceMatcher(None, path, known).ratio()
        return max(whole, difflib.SequenceMatcher(None, name, known.rpartition(".")[2]).ratio()), whole

    nearest = max(leaves(config), key=likeness)
    alike = likeness(nearest)[0] > 0.6
    hint = f"; did you mean {nearest}?" if alike else f"; it has {', '.join(dict(_children(config)))}"
    return f"the config has no field {path}{hint}"


# --- save and load --------------------------------------------------------------------------------------------------


def to_dict(config: Any) -> dict[str, Any]:
    """`config` as dictionaries, lists and scalars that JSON can hold; `from_dict` gives it back exactly."""
    return _encode(config, type(config), "")


def from_dict(cls: type[C], data: Any) -> C:
    """The `cls` that `to_dict` wrote, perhaps in an older version: a field that came later takes its default.

    A missing field without one, an unknown field or a value of the wrong type is a `ConfigError`.
    """
    return _decode(data, cls, "")


def save_config(config: Any, path: str | os.PathLike) -> None:
    """Writes `config` to `path` as JSON: a local path, `gs://…` or `s3://…`."""
    from deepseek_jax.paths import user_path, write_aside  # a tenth of a second that `--help` does not need

    target = user_path(path, "the config")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_aside(target, json.dumps(to_dict(config), indent=2, allow_nan=False) + "\n")


def load_config(cls: type[C], path: str | os.PathLike) -> C:
    """The `cls` saved at `path`."""
    from deepseek_jax.paths import user_path

    file = user_path(path, "the config")
    try:
        data = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"no config at {path}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; name the config.json in it") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not a saved config: {error}") from error
    try:
        return from_dict(cls, data)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def _encode(value: Any, annotation: Any, path: str) -> Any:
    if _is_config(value):
        types = field_types(type(value))
        encoded = {name: _encode(getattr(value, name), types[name], _join(path, name)) for name in types}
        # The class is named only where the annotation leaves it open.
        return encoded if declared_classes(annotation) == [type(value)] else {"type": type(value).__name__} | encoded
    if isinstance(value, tuple):
        return [_encode(v, _element_type(annotation, i), _join(path, str(i))) for i, v in enumerate(value)]
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(f"{path} holds a {type(value).__name__}, which a config file cannot")


def _decode(data: Any, annotation: Any, path: str) -> Any:
    for kind in alternatives(annotation):
        if kind.matches_json(data):
            match kind.name:
                case "class":
                    return _decode_class(data, annotation, path)
                case "tuple":
                    return _decode_tuple(data, annotation, path)
                case "float":
                    return _NON_FINITE[data] if isinstance(data, str) else float(data)
                case "enum":
                    return kind.type[data]
            return data
    raise ConfigError(f"{path or 'the config'} is {data!r}, which is not {describe(annotation)}")


def _decode_tuple(data: list, annotation: Any, path: str) -> tuple:
    kind = _tuple_kind(annotation)
    fits = kind.any_length or len(data) == len(kind.elements)
    require(fits, f"{path} has {len(data)} values and must be {describe(annotation)}")
    return tuple(_decode(d, _element_type(annotation, i), _join(path, str(i))) for i, d in enumerate(data))


def _decode_class(data: dict, annotation: Any, path: str) -> Any:
    cls = _class_named(data, annotation, path)
    types = field_types(cls)
    data = {name: value for name, value in data.items() if name != "type" or "type" in types}
    for name in data.keys() - types.keys():
        nearest = difflib.get_close_matches(name, types, n=1)
        hint = f"; did you mean {_join(path, nearest[0])}?" if nearest else f"; {cls.__name__} has {', '.join(types)}"
        raise ConfigError(f"the config has no field {_join(path, name)}{hint}")
    missing = [_join(path, name) for name in required_fields(cls) if name not in data]
    require(not missing, f"the saved config lacks {', '.join(missing)}: another version wrote it, or it was edited")
    return cls(**{name: _decode(value, types[name], _join(path, name)) for name, value in data.items()})


def _class_named(data: dict, annotation: Any, path: str) -> type:
    declared, known = declared_classes(annotation), known_classes(annotation)
    if "type" not in data or (len(declared) == 1 and "type" in field_types(declared[0])):
        names = ", ".join(c.__name__ for c in known)
        require(len(declared) == 1, f"{path} must name its type, one of {names}")
        return declared[0]
    for cls in known:
        if cls.__name__ == data["type"]:
            return cls
    raise ConfigError(f"{_join(path, 'type')} is {data['type']!r}, which is not {describe(annotation)}")


# --- print ----------------------------------------------------------------------------------------------------------


def format_config(config: Any) -> str:
    """`config` as an indented table; `*` marks what differs from its class's default, and says what that is.

    Values read as `override` takes them.
    """
    rows = [(type(config).__name__, "", "", False), *_rows(config, depth=1)]
    name_width = max(len(name) for name, *_ in rows) + 2
    # A long list sticks out rather than push every note off the screen.
    value_width = max((len(value) for _, value, note, _ in rows if note and len(value) <= 24), default=0) + 2
    lines = []
    for name, value, note, changed in rows:
        gap = "  " if len(value) > value_width else ""
        line = f"{'* ' if changed else '  '}{name:<{name_width}}{value:<{value_width}}{gap}{note}"
        lines.append(line.rstrip())
    return "\n".join(lines) + "\n"


def _rows(value: Any, depth: int) -> Iterator[tuple[str, str, str, bool]]:
    """`(indented name, value, note, differs from default)` of each field of `value` and below."""
    defaults = _defaults(value)
    for name, child in _children(value):
        has_default = name in defaults
        label = "  " * depth + name
        if dict(_children(child)):
            # The fields below speak for themselves, unless the class itself is a choice.
            changed = has_default and _classes(defaults[name]) != _classes(child)
            note = f"default {quote_value(defaults[name])}" if changed else ""
            yield label, "" if isinstance(child, tuple) else type(child).__name__, note, changed
            yield from _rows(child, depth + 1)
        else:
            changed = has_default and child != defaults[name]
            yield label, quote_value(child), f"default {quote_value(defaults[name])}" if changed else "", changed


def _classes(value: Any) -> Any:
    """What a value with fields below it is, leaving out what the fields say."""
    return [type(v) for v in value] if isinstance(value, tuple) else type(value)


def _defaults(value: Any) -> dict[str, Any]:
    defaults = {}
    for field in dataclasses.fields(value) if _is_config(value) else ():
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
    return defaults


# --- the shape of a config ------------------------------------------------------------------------------------------


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    """The named parts of a dataclass, or of a tuple that holds dataclasses; nothing for a leaf."""
    if _is_config(value):
        for name in field_types(type(value)):
            yield name, getattr(value, name)
    elif isinstance(value, tuple) and any(_is_config(v) for v in value):
        yield from ((str(i), v) for i, v in enumerate(value))


def _tuple_kind(annotation: Any) -> Kind:
    return next(kind for kind in alternatives(annotation) if kind.name == "tuple")


def _element_type(annotation: Any, index: int) -> Any:
    """The annotation of element `index` of the tuple that `annotation` allows."""
    kind = _tuple_kind(annotation)
    return kind.elements[0 if kind.any_length else index]


def _is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
