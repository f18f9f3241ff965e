"""What lies beside the weights in a Hugging Face folder: tokenizer, chat template, generation config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepseek_jax.data.tokenizer import SPECIAL_NAMES, Tokenizer
from deepseek_jax.inference.chat import ChatError, ChatTemplate
from deepseek_jax.interop.errors import InteropError
from deepseek_jax.interop.huggingface import HuggingFaceFolder, read_json

_SPECIALS = ("bos_token", "eos_token", "pad_token", "unk_token")


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder; None where it has no tokenizer.json. Raises `DataError` if it cannot be used."""
    return Tokenizer.load(folder / "tokenizer.json") if (folder / "tokenizer.json").exists() else None


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """The chat template of a folder, from a file of its own or from tokenizer_config.json; None where there is none.

    Raises `InteropError` if a file cannot be read, or the template not be compiled.
    """
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    own = folder / "chat_template.jinja"
    home, text = (own, _read_text(own)) if own.exists() else (path, _configured_template(config))
    if text is None:
        return None
    if not isinstance(text, str):
        raise InteropError(f"{home}: chat_template is a {type(text).__name__}, not text or a list of named ones")
    tokens = {name: _content(config[name], path) for name in _SPECIALS if config.get(name) is not None}
    try:
        return ChatTemplate(text, tokens)
    except ChatError as error:
        raise InteropError(f"{home}: {error}") from None


def read_add_bos(folder: Path) -> bool:
    """Whether tokenizer_config.json wants a beginning of sentence before a text, as DeepSeek's folders do.

    Their tokenizer.json does not put it there; older versions of `transformers` do, by this field.
    """
    path = folder / "tokenizer_config.json"
    return path.exists() and read_json(path).get("add_bos_token") is True


def read_stop_ids(source: HuggingFaceFolder) -> tuple[int, ...]:
    """The tokens that end a text: `eos_token_id` of generation_config.json, or else of config.json.

    What is no token of the model ends nothing, and is left out.
    """
    ids = (source.read_json("generation_config.json") or {}).get("eos_token_id")
    ids = source.config.get("eos_token_id") if ids is None else ids
    ids = ids if isinstance(ids, list) else [ids]
    return tuple(i for i in ids if type(i) is int and 0 <= i < source.model.vocab_size)


def tokenizer_files(tokenizer: Tokenizer, *, max_length: int) -> dict[str, dict[str, Any]]:
    """tokenizer_config.json and generation_config.json, so that `transformers` uses a tokenizer of ours as we do."""
    names = {role: _name(tokenizer, role) for role in ("bos", "eos", "pad")}
    tokens = {f"{role}_token": name for role, name in names.items() if name is not None}
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_id") for role in names if names[role] is not None}
    return {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_length,
            **tokens,
        },
        "generation_config.json": ids,
    }


def _name(tokenizer: Tokenizer, role: str) -> str | None:
    number = getattr(tokenizer, f"{role}_id")
    if number is None:
        return None
    name = tokenizer.token_bytes[number].decode()
    return name if name in SPECIAL_NAMES[role] or role == "pad" else None


def _configured_template(config: dict[str, Any]) -> Any:
    """`chat_template` of tokenizer_config.json; of several by name, the one that is called default."""
    template = config.get("chat_template")
    if not isinstance(template, list):
        return template
    named = [one for one in template if isinstance(one, dict)]
    return next((one.get("template") for one in named if one.get("name") == "default"), None)


def _content(token: Any, path: Path) -> str:
    """A special token as tokenizer_config.json writes it: its name, or an object with more about it."""
    name = token.get("content") if isinstance(token, dict) else token
    if not isinstance(name, str):
        raise InteropError(f"{path}: a special token is {token!r}, neither its name nor an object with its content")
    return name


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InteropError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InteropError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from None
