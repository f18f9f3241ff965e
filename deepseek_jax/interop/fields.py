"""The fields of a parsed JSON object by type, so that what is wrong in a file of others is one clear line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from deepseek_jax.interop.errors import InteropError

MISSING: Any = object()
"""Where a value has no default: the field must be there, or must not be null."""


def render(value: object) -> str:
    """The value as the file writes it."""
    return json.dumps(value, default=repr)


def same(one: object, other: object) -> bool:
    """Equal as JSON: `true` is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


class Fields:
    """The fields of a JSON object by type. Every error names the file, the field and its value."""

    def __init__(self, values: Any, source: str, prefix: str = ""):
        if not isinstance(values, Mapping):
            where = f"{source}: {prefix.removesuffix('.')}" if prefix else source
            raise InteropError(f"{where} must be a JSON object, not {render(values)}")
        self.values, self.source, self._prefix = values, source, prefix

    def error(self, name: str, problem: str) -> InteropError:
        return InteropError(f"{self.source}: {self._prefix}{name} {problem}")

    def unsupported(self, name: str, *supported: object) -> InteropError:
        choices = ", ".join(render(value) for value in supported)
        return self.error(name, f"{render(self.values.get(name))} is not supported; supported: {choices}")

    def get(self, name: str, kinds: tuple[type, ...], what: str, absent: Any = MISSING, null: Any = MISSING) -> Any:
        """The field's value: one of `kinds`, `absent` where there is none, `null` where it is null."""
        value = self.values.get(name, MISSING)
        if value is MISSING:
            if absent is MISSING:
                hint = "" if null is MISSING else " (null says that the model has none)"
                raise self.error(name, f"is missing, and no default can be assumed{hint}")
            return absent
        if value is None and null is not MISSING:
            return null
        # In Python a bool is an int, in JSON it is not.
        wrong = not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
        if wrong or (isinstance(value, float) and not math.isfinite(value)):
            raise self.error(name, f"must be {what}, not {render(value)}")
        return value

    def integer(self, name: str, absent: Any = MISSING, null: Any = MISSING) -> Any:
        return self.get(name, (int,), "an integer", absent, null)

    def number(self, name: str, absent: Any = MISSING, null: Any = MISSING) -> Any:
        value = self.get(name, (int, float), "a finite number", absent, null)
        try:
            return value if value is None else float(value)
        except OverflowError:
            raise self.error(name, f"must be a finite number, not one of {len(str(abs(value)))} digits") from None

    def boolean(self, name: str, absent: bool) -> bool:
        return self.get(name, (bool,), "true or false", absent)

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        """One of `choices`, the first where the field is absent."""
        value = self.get(name, (str,), "a string", choices[0])
        if value not in choices:
            raise self.unsupported(name, *choices)
        return value

    def section(self, name: str) -> Fields | None:
        """The object in this field; None where it is absent, null or empty."""
        value = self.values.get(name)
        return None if value is None or value == {} else Fields(value, self.source, f"{self._prefix}{name}.")
