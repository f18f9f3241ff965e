"""What lies beside the weights in a Hugging Face folder: tokenizer, chat template, generation config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepseek_jax.data.tokenizer import SPECIAL_NAMES, Tokenizer
from deepseek_jax.inference.chat import ChatTemplate
from deepseek_jax.interop.errors import InteropError
from deepseek_jax.interop.huggingface import HuggingFaceFolder, read_json

_SPECIALS = ("bos_token", "eos_token", "pad_token", "unk_token")


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder; None where it has no tokenizer.json. Raises `DataError` if it cannot be used."""
    return Tokenizer.load(folder / "tokenizer.json") if (folder / "tokenizer.json").exists() else None


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """The chat template of a folder, from a file of its own or from tokenizer_config.json; None where there is none."""
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    own = folder / "chat_template.jinja"
    text = own.read_text(encoding="utf-8") if own.exists() else config.get("chat_template")
    if isinstance(text, list):  # several by name
        text = next((one.get("template") for one in text if one.get("name") == "default"), None)
    if text is None:
        return None
    if not isinstance(text, str):
        raise InteropError(f"{path}: chat_template is no text")
    return ChatTemplate(text, {name: _content(config[name]) for name in _SPECIALS if config.get(name) is not None})


def read_stop_ids(source: HuggingFaceFolder) -> tuple[int, ...]:
    """The tokens that end a text: `eos_token_id` of generation_config.json, or else of config.json."""
    generation = source.read_json("generation_config.json") or {}
    ids = generation.get("eos_token_id", source.config.get("eos_token_id"))
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    return tuple(i for i in ids if isinstance(i, int) and 0 <= i < source.model.vocab_size)


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


def _content(token: Any) -> str:
    """A special token as tokenizer_config.json writes it: its name, or an object with more about it."""
    return token["content"] if isinstance(token, dict) else str(token)
