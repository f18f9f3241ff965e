"""What lies beside the weights: tokenizer, chat template, the tokens that end a text; and ours, as others read them."""

from __future__ import annotations

import dataclasses
import json

import pytest

from deepseek_jax import zoo
from deepseek_jax.data import DataError
from deepseek_jax.data.tokenizer import Tokenizer, train_tokenizer
from deepseek_jax.interop.errors import InteropError
from deepseek_jax.interop.huggingface import HuggingFaceFolder
from deepseek_jax.interop.tokenizer_files import read_chat_template, read_stop_ids, read_tokenizer, tokenizer_files
from tests.data.test_foreign_tokenizers import byte_level

MESSAGES = [{"role": "user", "content": "hello"}]
TEMPLATE = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
BEGIN = "<｜begin▁of▁sentence｜>"


def write(folder, name: str, document: object) -> None:
    (folder / name).write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")


# --- the tokenizer --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return train_tokenizer(["hello world"], vocab_size=280)


def test_a_folders_tokenizer_is_read_or_there_is_none(ours, tmp_path):
    assert read_tokenizer(tmp_path) is None
    ours.save(tmp_path / "tokenizer.json")
    assert read_tokenizer(tmp_path).fingerprint() == ours.fingerprint()
    write(tmp_path, "tokenizer.json", "{")
    with pytest.raises(
        DataError, match=rf"^{tmp_path}/tokenizer\.json: is not a Hugging Face tokenizer\.json \([^\n]+$"
    ):
        read_tokenizer(tmp_path)


# --- chat templates -------------------------------------------------------------------------------------------------


def test_a_folder_without_a_template_has_none(tmp_path):
    assert read_chat_template(tmp_path) is None
    for config in ({}, {"bos_token": None}, {"chat_template": None}, {"chat_template": []}):
        write(tmp_path, "tokenizer_config.json", config)
        assert read_chat_template(tmp_path) is None


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}],
        ["what is this", {"name": "default", "template": TEMPLATE}],
    ],
)
@pytest.mark.parametrize("begin", [BEGIN, {"__type": "AddedToken", "content": BEGIN, "lstrip": False}])
def test_a_template_of_the_config_has_the_special_tokens_of_the_config(template, begin, tmp_path):
    config = {"chat_template": template, "bos_token": begin, "eos_token": "</s>", "unk_token": None}
    write(tmp_path, "tokenizer_config.json", config)
    assert read_chat_template(tmp_path).render(MESSAGES) == f"{BEGIN}hello</s>"


def test_of_several_templates_without_a_default_none_is_taken(tmp_path):
    write(tmp_path, "tokenizer_config.json", {"chat_template": [{"name": "tool_use", "template": TEMPLATE}]})
    assert read_chat_template(tmp_path) is None


def test_a_template_of_its_own_file_comes_first_and_needs_no_config(tmp_path):
    write(tmp_path, "chat_template.jinja", "größer " + TEMPLATE)
    assert read_chat_template(tmp_path).render(MESSAGES) == "größer hello"
    write(tmp_path, "tokenizer_config.json", {"chat_template": "no", "bos_token": BEGIN})
    assert read_chat_template(tmp_path).render(MESSAGES) == f"größer {BEGIN}hello"


@pytest.mark.parametrize(
    ("name", "document", "message"),
    [
        ("tokenizer_config.json", '{"chat_template": ', r"tokenizer_config\.json is no JSON \(Expecting value: .+\)"),
        ("tokenizer_config.json", [TEMPLATE], r"tokenizer_config\.json is no JSON object"),
        (
            "tokenizer_config.json",
            {"chat_template": 7},
            r"tokenizer_config\.json: chat_template is a int, not text or a list of named ones",
        ),
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": "default", "template": {}}]},
            r"tokenizer_config\.json: chat_template is a dict, not text or a list of named ones",
        ),
        (
            "tokenizer_config.json",
            {"chat_template": "x", "bos_token": {"text": "<s>"}},
            r"tokenizer_config\.json: a special token is \{'text': '<s>'\}, neither its name nor an object with .+",
        ),
        (
            "tokenizer_config.json",
            {"chat_template": "{% if %}"},
            r"tokenizer_config\.json: the chat template is no Jinja that can be read: .+",
        ),
        ("chat_template.jinja", "{{", r"chat_template\.jinja: the chat template is no Jinja that can be read: .+"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_in_one_line(name, document, message, tmp_path):
    write(tmp_path, name, document)
    with pytest.raises(InteropError, match=rf"^{tmp_path}/{message}$") as refused:
        read_chat_template(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_template_that_cannot_be_read_is_told_in_one_line(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"fine \xff")
    with pytest.raises(InteropError, match=r"chat_template\.jinja is not UTF-8 \(invalid start byte at byte 5\)$"):
        read_chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.jinja").mkdir()
    with pytest.raises(InteropError, match=r"chat_template\.jinja cannot be read \(Is a directory\)$"):
        read_chat_template(tmp_path)


# --- the tokens that end a text -------------------------------------------------------------------------------------


def opened(folder, config: dict) -> HuggingFaceFolder:
    """A folder of which nothing has been read but config.json."""
    source = object.__new__(HuggingFaceFolder)
    source.path, source.config = folder, config
    source.model = dataclasses.replace(zoo.tiny(), vocab_size=300)
    return source


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, {}, ()),
        (None, {"eos_token_id": 1}, (1,)),
        (None, {"eos_token_id": [1, 0]}, (1, 0)),
        ({}, {"eos_token_id": 1}, (1,)),
        ({"eos_token_id": None}, {"eos_token_id": 1}, (1,)),
        ({"eos_token_id": 0}, {"eos_token_id": 1}, (0,)),
        ({"eos_token_id": [2, 3]}, {"eos_token_id": 1}, (2, 3)),
        ({"eos_token_id": []}, {"eos_token_id": 1}, ()),
        ({"eos_token_id": [299, 300, -1, True, "2", None, 2.0]}, {}, (299,)),
        ({"eos_token_id": "</s>"}, {}, ()),
    ],
)
def test_the_generation_config_names_the_tokens_that_end_a_text_or_else_the_config(
    generation, config, expected, tmp_path
):
    if generation is not None:
        write(tmp_path, "generation_config.json", generation)
    assert read_stop_ids(opened(tmp_path, config)) == expected


def test_a_broken_generation_config_is_told_in_one_line(tmp_path):
    write(tmp_path, "generation_config.json", '{"eos_token_id": 1')
    with pytest.raises(InteropError, match=rf"^{tmp_path}/generation_config\.json is no JSON \([^\n]+\)$"):
        read_stop_ids(opened(tmp_path, {}))


# --- ours in their hands --------------------------------------------------------------------------------------------


def test_files_of_a_foreign_vocabulary_name_only_what_it_has():
    """GPT-2's kind, which has one special token; it pads too, because padding is masked."""
    files = tokenizer_files(Tokenizer(byte_level("<|endoftext|>")), max_length=77)
    named = files["tokenizer_config.json"]
    assert (named["eos_token"], named["pad_token"], named["model_max_length"]) == ("<|endoftext|>", "<|endoftext|>", 77)
    assert "bos_token" not in named
    assert files["generation_config.json"] == {"eos_token_id": 0, "pad_token_id": 0}


@pytest.mark.torch
@pytest.mark.parametrize("text", ["hello world ", "größer , .  x don 't", f"a{BEGIN}b"])
def test_transformers_uses_our_tokenizer_as_we_do(text, ours, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours.save(tmp_path / "tokenizer.json")
    for name, document in tokenizer_files(ours, max_length=77).items():
        write(tmp_path, name, document)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(text).input_ids == ours.encode_markup(text)
    assert theirs.decode(ours.encode_markup(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    assert theirs.model_max_length == 77
    ends = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (ends.bos_token_id, ends.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert read_stop_ids(opened(tmp_path, {})) == (ours.eos_id,)
