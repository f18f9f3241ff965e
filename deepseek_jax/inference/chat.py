"""Chat templates: a conversation as the text that a model was trained to continue.

The template is Jinja, as Hugging Face folders hold it. It is rendered in Jinja's sandbox, where it reaches nothing but
the conversation, and is never run as Python.
"""

from __future__ import annotations

import collections
import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from deepseek_jax.data.tokenizer import Tokenizer

Message = Mapping[str, Any]
"""`{"role": "user", "content": "…"}`, and whatever else a template reads."""

MARKUP_ROLES = ("system", "assistant")
"""Whose messages may name special tokens: what was written for the model (DeepSeek's descriptions of tools), or by it
(`</think>`)."""


class ChatError(ValueError):
    """A conversation that a template cannot render, or a model without one. One line."""


class ChatTemplate:
    """A compiled template and the special tokens that it writes."""

    def __init__(self, text: str, special_tokens: Mapping[str, str]):
        """`special_tokens` by the names that templates use: `bos_token`, `eos_token`, … Raises `ChatError`."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise, strftime_now=_now, namespace=_Namespace)
        try:
            self._template = environment.from_string(text)
        except Exception as error:  # Python compiles what Jinja makes of it, and has errors of its own
            raise ChatError(f"the chat template is no Jinja that can be read: {_said(error)}") from None
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **values: Any) -> str:
        """The conversation as text; `values` go to the template, such as `thinking=True`.

        The template sees a copy, made of JSON's types alone, in which fields that are None are left out. Raises
        `ChatError`.
        """
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping):
                raise ChatError(f"message {i} is a {type(message).__name__}; give it a role and a content")
        given = {"add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
        try:
            plain = _plain([{key: value for key, value in one.items() if value is not None} for one in messages])
            text = self._template.render(messages=plain, **given | self._special_tokens | _plain(values))
        except Exception as error:  # whatever the template does, it is the template's
            raise ChatError(f"the chat template cannot render this conversation: {_said(error)}") from None
        return check_text(text)


def check_text(text: str) -> str:
    """`text`, if it can be tokenized. Raises `ChatError` if it holds half a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ChatError(
            f"the prompt holds half a surrogate pair, {text[error.start]!a}; give whole characters"
        ) from None
    return text


def conversation_tokens(template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """A conversation as the tokens that the model continues, in which nobody but `MARKUP_ROLES` writes special tokens.

    Their names in other messages, a user's or a tool's, are plain text. Where these hold none, the tokens are those of
    the rendered text, as in `transformers`.

    Raises:
      ChatError: the template cannot render the conversation, or not without a special token that a message names.
    """
    text = template.render(messages)
    names = sorted((tokenizer.token_bytes[i].decode() for i in tokenizer.special_ids), key=len, reverse=True)
    pattern = re.compile(f"({'|'.join(map(re.escape, names))})")
    # Rendered once more with a mark after whatever a name could begin with, messages hold no name, be it whole or put
    # together from two of them: those that are left are the template's own.
    mark = next(c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in text)
    heads = re.compile(f"([{re.escape(''.join({name[0] for name in names}))}])")
    marked = template.render([one if _has_markup(one) else _marked(one, heads, mark) for one in messages])
    if pattern.findall(marked) == pattern.findall(text):
        return tokenizer.encode_markup(text)
    if marked.replace(mark, "") != text:
        brought = collections.Counter(pattern.findall(text)) - collections.Counter(pattern.findall(marked))
        raise ChatError(
            f"a message names the special token {' and '.join(brought) or names[0]}, and the chat template does more "
            "with this message than to write it: take the name out"
        )
    tokens: list[int] = []
    for i, piece in enumerate(pattern.split(marked)):  # text and names in turn
        tokens += tokenizer.encode_markup(piece) if i % 2 else tokenizer.encode(piece.replace(mark, "")).tolist()
    return tokens


def _has_markup(message: Message) -> bool:
    return message.get("role") in MARKUP_ROLES


def _marked(value: Any, heads: re.Pattern[str], mark: str) -> Any:
    """A message with a mark after each of these characters, wherever it holds text but in its role."""
    if isinstance(value, str):
        return heads.sub(lambda found: found[1] + mark, value)
    if isinstance(value, Mapping):
        return {key: one if key == "role" else _marked(one, heads, mark) for key, one in value.items()}
    return [_marked(one, heads, mark) for one in value] if isinstance(value, list | tuple) else value


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, around what the model itself says, is what stands within."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's type)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's, without names such as `__call__`, by which an object tells Python what it is."""

    def __init__(*args: Any, **kwargs: Any):
        self, *rest = args  # a field of the namespace may be called self
        jinja2.utils.Namespace.__init__(self)
        for name, value in dict(*rest, **kwargs).items():
            _Namespace.__setitem__(self, name, value)

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.sandbox.SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)


def _plain(value: Any) -> Any:
    """A copy in JSON's types: the sandbox knows nothing of what the methods of others do."""
    return json.loads(json.dumps(value, default=_plain_mapping))


def _plain_mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"it holds a {type(value).__name__}, where text, numbers, lists and mappings can be")
    return dict(value)


def _said(error: Exception) -> str:
    """One line about an error, with its kind where its message was not written for a template's reader."""
    line = " ".join(str(error).split())
    return line if isinstance(error, jinja2.TemplateError | ChatError) else f"{type(error).__name__}: {line}"


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without the escapes for HTML that Jinja's own filter makes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise ChatError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
