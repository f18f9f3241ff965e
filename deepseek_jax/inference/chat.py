"""Chat templates: a conversation as the text that a model was trained to continue.

The template is Jinja, as Hugging Face folders hold it. It is rendered in Jinja's sandbox, where it reaches nothing but
the conversation, and is never run as Python.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

Message = Mapping[str, Any]
"""`{"role": "user", "content": "…"}`, and whatever else a template reads."""


class ChatError(ValueError):
    """A conversation that a template cannot render, or a model without one. One line."""


class ChatTemplate:
    """A compiled template and the special tokens that it writes."""

    def __init__(self, text: str, special_tokens: Mapping[str, str]):
        """`special_tokens` by the names that templates use: `bos_token`, `eos_token`, … Raises `ChatError`."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise, strftime_now=_now)
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateError as error:
            raise ChatError(f"the chat template is no Jinja that can be read: {error}") from None
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **values: Any) -> str:
        """The conversation as text; `values` go to the template, such as `thinking=True`."""
        values = {"tools": None, "documents": None, **self._special_tokens, **values}
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **values)
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise ChatError(f"the chat template cannot render this conversation: {error}") from None


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    """Without the escapes for HTML that Jinja's own filter makes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise ChatError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
