"""What a field's annotation allows, and how such values are written as text; `config_io` builds on it.

The grammar of a value: `42`, `1_000`, `2**14`, `1e6` where whole numbers go; `3e-4`, `inf`; `true`, `false`; `none`;
a literal or enum name; text, in quotes where it would read as something else; `a,b` or `(a,b)` for tuples; and
`Name` or `Name(field=value,…)` for a dataclass, or a name of its `PRESETS`.
"""

from __future__ import annotations

import dataclasses
import decimal
import enum
import itertools
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeGuard

_INT_LIMIT_DIGITS = 30
"""More digits than any count needs; keeps `1e999999999` from being computed."""
_ORDER = ("none", "bool", "int", "float", "choice", "enum", "class", "tuple", "text")
"""Alternatives of a union are tried in this order: text accepts anything, so it comes last."""


class Mismatch(Exception):
    """The text is not a value of the type: another alternative of a union may still take it."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """One alternative of an annotation; all dataclasses of a union are one alternative together."""

    name: str
    """One of `_ORDER`."""
    type: Any = None
    choices: tuple[Any, ...] = ()
    """Values of a literal, or the dataclasses."""
    elements: tuple[Any, ...] = ()
    """Annotations of a tuple's elements; one, if `any_length`."""
    any_length: bool = False

    def matches_json(self, data: Any) -> bool:
        """Whether `data`, as JSON gives it, is of this alternative."""
        number = isinstance(data, int | float) and not isinstance(data, bool)
        match self.name:
            case "none":
                return data is None
            case "int":
                return number and isinstance(data, int)
            case "float":
                return number or data in ("inf", "-inf", "nan")
            case "choice":
                return any(data == c and type(data) is type(c) for c in self.choices)
            case "enum":
                return isinstance(data, str) and data in self.type.__members__
            case _:
                return isinstance(data, {"bool": bool, "class": dict, "tuple": list, "text": str}[self.name])

    def describe(self) -> str:
        """The alternative in words, after "is not"."""
        match self.name:
            case "choice":
                return f"one of {', '.join(map(str, self.choices))}"
            case "enum":
                return f"one of {', '.join(self.type.__members__)}"
            case "class":
                return " or ".join([*(f"{c.__name__}(…)" for c in self.choices), *presets(self.choices)])
            case "tuple" if self.any_length:
                return f"a list a,b,… each {describe(self.elements[0])}"
            case "tuple":
                return f"{len(self.elements)} values a,b,…: {'; '.join(map(describe, self.elements))}"
        words = {"none": "none", "bool": "true or false", "int": "a whole number", "float": "a number", "text": "text"}
        return words[self.name]


def describe(annotation: Any) -> str:
    """What `annotation` allows, in words: "a whole number or none"."""
    # "none" is tried first, and reads best last.
    return " or ".join(k.describe() for k in sorted(alternatives(annotation), key=lambda k: k.name == "none"))


def field_types(cls: type) -> dict[str, Any]:
    """The fields that `cls`'s constructor takes, with their annotations resolved."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def required_fields(cls: type) -> list[str]:
    """The fields that `cls`'s constructor takes and has no default for."""
    return [
        field.name
        for field in dataclasses.fields(cls)
        if field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]


def alternatives(annotation: Any) -> tuple[Kind, ...]:
    """What `annotation` allows, in the order to try."""
    kinds, classes = [], []
    for member in _members(annotation):
        if _is_config_class(member) or _subclasses(member):
            classes += [c for c in (member, *_subclasses(member)) if _is_config_class(c)]
        else:
            kinds.append(_kind(member))
    if classes:
        kinds.append(Kind("class", choices=tuple(dict.fromkeys(classes))))
    return tuple(sorted(kinds, key=lambda k: _ORDER.index(k.name)))


def declared_classes(annotation: Any) -> list[type]:
    """The dataclasses that `annotation` names."""
    return [m for m in _members(annotation) if _is_config_class(m) or _subclasses(m)]


def known_classes(annotation: Any) -> tuple[type, ...]:
    """The dataclasses that `annotation` allows: those it names and their subclasses."""
    return next((k.choices for k in alternatives(annotation) if k.name == "class"), ())


def presets(classes: Iterable[type]) -> dict[str, Any]:
    """The configs that have a name, of dataclasses with a class variable `PRESETS`."""
    return {name: value for cls in classes for name, value in getattr(cls, "PRESETS", {}).items()}


def _members(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [m for arg in typing.get_args(annotation) for m in _members(arg)]
    return [annotation]


def _kind(member: Any) -> Kind:
    scalars = {type(None): "none", None: "none", bool: "bool", int: "int", float: "float", str: "text"}
    origin, args = typing.get_origin(member), typing.get_args(member)
    if origin is Literal:
        return Kind("choice", choices=args)
    if origin is tuple:
        any_length = len(args) == 2 and args[1] is Ellipsis
        return Kind("tuple", elements=args[:1] if any_length else args, any_length=any_length)
    if isinstance(member, type) and issubclass(member, enum.Enum):
        return Kind("enum", type=member)
    if member in scalars:
        return Kind(scalars[member], type=member)
    raise TypeError(f"a config field cannot be annotated with {member}; see deepseek_jax/config_text.py")


def _is_config_class(member: Any) -> TypeGuard[type]:
    return isinstance(member, type) and dataclasses.is_dataclass(member)


def _subclasses(member: Any) -> list[type]:
    """The dataclasses derived from `member`, a base class of configs."""
    if not isinstance(member, type) or member.__module__ == "builtins" or issubclass(member, enum.Enum):
        return []
    found = [s for c in member.__subclasses__() for s in (c, *_subclasses(c))]
    return [c for c in found if _is_config_class(c)]


# --- text to value --------------------------------------------------------------------------------------------------


def parse_value(text: str, annotation: Any) -> Any:
    """The value that `text` writes. Raises `Mismatch`, or a dataclass's own `ConfigError`."""
    for kind in alternatives(annotation):
        try:
            return _PARSERS[kind.name](text.strip(), kind)
        except Mismatch:
            continue
    raise Mismatch(text)


def _parse_none(text: str, kind: Kind) -> None:
    _expect(text.lower() in ("none", "null"))


def _parse_bool(text: str, kind: Kind) -> bool:
    _expect(text.lower() in ("true", "false"))
    return text.lower() == "true"


def _parse_int(text: str, kind: Kind) -> int:
    if power := re.fullmatch(r"([+-]?\d+)\s*\*\*\s*(\d+)", text):
        base, exponent = int(power[1]), int(power[2])
        _expect(exponent * math.log10(max(abs(base), 1)) < _INT_LIMIT_DIGITS)
        return base**exponent
    _expect(re.fullmatch(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d+)?", text) is not None)
    number = decimal.Decimal(text)
    _expect(number.adjusted() < _INT_LIMIT_DIGITS and number == number.to_integral_value())
    return int(number)


def _parse_float(text: str, kind: Kind) -> float:
    try:
        number = float(text)
    except ValueError:
        return float(_parse_int(text, kind))
    _expect(not math.isnan(number))
    return number


def _parse_choice(text: str, kind: Kind) -> Any:
    matches = [c for c in kind.choices if str(c) == _unquote(text)]
    _expect(bool(matches))
    return matches[0]


def _parse_enum(text: str, kind: Kind) -> enum.Enum:
    for member in kind.type:
        if text in (member.name, str(member.value)):
            return member
    raise Mismatch(text)


def _parse_tuple(text: str, kind: Kind) -> tuple:
    bare = _without_brackets(text)
    for parts in [_split(bare), _split(text)]:
        if not kind.any_length and len(parts) != len(kind.elements):
            continue
        types_ = kind.elements * len(parts) if kind.any_length else kind.elements
        try:
            return tuple(parse_value(part, t) for part, t in zip(parts, types_, strict=True))
        except Mismatch:
            continue
    raise Mismatch(text)


def _parse_class(text: str, kind: Kind) -> Any:
    if text in (named := presets(kind.choices)):
        return named[text]
    call = re.fullmatch(r"(\w+)\s*(\(.*\))?", text, re.DOTALL)
    found = [c for c in kind.choices if call and c.__name__ == call[1]]
    if call is None or not found:
        raise Mismatch(text)
    cls, arguments = found[0], _split(_without_brackets(call[2] or "()"))
    fields, values = field_types(cls), {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        name = name.strip()
        if not equals or name not in fields:
            raise ValueError(f"{cls.__name__} takes field=value with the fields {', '.join(fields)}, not {argument!r}")
        try:
            values[name] = parse_value(value, fields[name])
        except Mismatch:
            raise ValueError(f"{cls.__name__}.{name}: {value!r} is not {describe(fields[name])}") from None
    if missing := [name for name in required_fields(cls) if name not in values]:
        raise ValueError(f"{cls.__name__} needs {', '.join(missing)}")
    return cls(**values)


def _parse_text(text: str, kind: Kind) -> str:
    return _unquote(text)


_PARSERS = {name: globals()[f"_parse_{name}"] for name in _ORDER}


def _expect(condition: bool) -> None:
    if not condition:
        raise Mismatch


def _unquote(text: str) -> str:
    if len(text) >= 2 and text[0] == text[-1] == '"':
        try:
            return json.loads(text)
        except ValueError:
            return text
    if len(text) >= 2 and text[0] == text[-1] == "'" and "'" not in text[1:-1]:
        return text[1:-1]
    return text


def _scan(text: str) -> Iterator[tuple[int, str, int]]:
    """`(index, character, bracket depth)` of what stands outside quotes."""
    depth, quote, escaped = 0, "", False
    for i, char in enumerate(text):
        if quote:
            quote = "" if char == quote and not escaped else quote
            escaped = char == "\\" and not escaped
        elif char in "\"'":
            quote = char
        else:
            depth -= char in ")]"
            yield i, char, depth
            depth += char in "(["


def _split(text: str) -> list[str]:
    """The parts of `text` between commas outside brackets and quotes; a last empty part is a trailing comma."""
    cuts = [-1, *(i for i, char, depth in _scan(text) if char == "," and depth == 0), len(text)]
    parts = [text[a + 1 : b].strip() for a, b in itertools.pairwise(cuts)]
    return parts if parts[-1] else parts[:-1]


def _without_brackets(text: str) -> str:
    """`text` without one pair of brackets that encloses all of it."""
    closing = [i for i, char, depth in _scan(text) if char in ")]" and depth == 0]
    return text[1:-1].strip() if text[:1] in ("(", "[") and closing[:1] == [len(text) - 1] else text


# --- value to text --------------------------------------------------------------------------------------------------


def quote_value(value: Any) -> str:
    """`value` as `parse_value` reads it back."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, int):
        return f"{value:_}"
    if isinstance(value, tuple):
        return f"({','.join(map(quote_value, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, str):
        return value if _reads_as_text(value) else json.dumps(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((name, getattr(value, name)) for name in field_types(type(value)))
        inside = ",".join(f"{name}={quote_value(v)}" for name, v in fields)
        return f"{type(value).__name__}({inside})"
    return repr(value)


def _reads_as_text(text: str) -> bool:
    """Whether `text` without quotes is still text, in every place that it may stand."""
    if text != text.strip() or text.lower() in ("none", "null", "true", "false"):
        return False
    try:
        float(text)
    except ValueError:
        return re.fullmatch(r"[^,()\[\]\"'=\\]+", text) is not None
    return False
