"""Text in, text out: a model with its tokenizer continues texts, conversations and tokens, and says what it lacks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import processors

from deepseek_jax.data.tokenizer import Tokenizer, train_tokenizer
from deepseek_jax.inference.chat import ChatError, ChatTemplate
from deepseek_jax.inference.generate import generate
from deepseek_jax.inference.language_model import LanguageModel
from deepseek_jax.model.transformer import Transformer
from tests.inference.conftest import CONFIG, lively_model

BOS, EOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<｜User｜>' if m.role == 'user' else '<｜Assistant｜>' }}{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
CHAT = [{"role": "user", "content": "hello"}]
TEXT = "the world, and what is in it"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """With a beginning of sentence before every text, as DeepSeek's file has it."""
    trained = train_tokenizer(["hello world, this is what they say of it"] * 4, vocab_size=320)
    backend = tokenizers.Tokenizer.from_str(trained._backend.to_str())
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, trained.bos_id)])
    return Tokenizer(backend)


@pytest.fixture(scope="module")
def bound() -> Transformer:
    return lively_model(dataclasses.replace(CONFIG, vocab_size=320), jnp.float32)


@pytest.fixture(scope="module")
def model(bound, tokenizer) -> LanguageModel:
    return LanguageModel(bound, tokenizer, ChatTemplate(TEMPLATE, {"bos_token": BOS}), stop_ids=[tokenizer.eos_id])


def plain(model: LanguageModel, prompt: list[int], steps: int = 8) -> list[int]:
    """What the model says to these tokens, as tokens, wherever it might stop."""
    (output,) = generate(model, [prompt], max_new_tokens=steps, stop_ids=())
    return output


# --- prompts --------------------------------------------------------------------------------------------------------


def test_each_kind_of_prompt_gets_its_kind_of_answer(model, tokenizer):
    tokens, words = tokenizer.encode_prompt(TEXT), tokenizer.encode_markup(f"{BOS}{USER}hello{ASSISTANT}")
    to_text, to_chat = (tokenizer.decode(plain(model, prompt), skip_specials=True) for prompt in (tokens, words))
    assert to_text != to_chat

    def run(prompts):
        return generate(model, prompts, max_new_tokens=8)

    assert run(TEXT) == to_text
    assert run(CHAT) == run(tuple(CHAT)) == to_chat
    assert run([TEXT, "x", TEXT]) == [to_text, run("x"), to_text]
    assert run([CHAT]) == [to_chat]
    assert run([tokens, words[:2]]) == [plain(model, tokens), plain(model, words[:2])]
    assert run([CHAT, TEXT, words, np.array(tokens)]) == [to_chat, to_text, plain(model, words), plain(model, tokens)]
    assert run([]) == []


def test_a_text_begins_as_the_tokenizers_file_says_and_never_empty(model, tokenizer):
    assert model.encode("hello") == [tokenizer.bos_id, *tokenizer.encode("hello")]
    assert model.encode("") == [tokenizer.bos_id]
    without = LanguageModel(model.model, train_tokenizer(["x"], vocab_size=300))
    assert without.encode("") == [without.tokenizer.eos_id]


def test_names_of_special_tokens_in_a_text_are_text(model, tokenizer):
    text = f"{USER}hello{ASSISTANT}{EOS}<think>"
    assert not {*model.encode(text)[1:]} & tokenizer.special_ids
    assert tokenizer.decode(model.encode(text)[1:]) == text


def test_a_conversation_goes_through_the_template_whose_special_tokens_are_such(model, tokenizer):
    hello = tokenizer.encode("hello").tolist()
    begin, user, assistant = tokenizer.bos_id, tokenizer.user_id, tokenizer.assistant_id
    assert model.encode(CHAT) == [begin, user, *hello, assistant]
    assert model.encode([*CHAT, {"role": "user", "content": ASSISTANT}]) == [
        *(begin, user, *hello, user, *tokenizer.encode(ASSISTANT), assistant)
    ]


# --- answers --------------------------------------------------------------------------------------------------------


def test_an_answer_ends_before_the_models_stop_token(bound, tokenizer):
    """A token that spells out a text, so that it would be seen."""
    prompt = tokenizer.encode_prompt(TEXT)
    (full,) = generate(bound, [prompt], max_new_tokens=12)
    stop = next(token for token in full[2:] if tokenizer.byte_lengths[token] > 0 and token not in full[:2])
    before, whole = full[: full.index(stop)], full[: full.index(stop) + 1]
    model = LanguageModel(bound, tokenizer, stop_ids=[stop])
    assert generate(model, TEXT, max_new_tokens=12) == tokenizer.decode(before, skip_specials=True)
    assert generate(model, [prompt], max_new_tokens=12) == [whole]
    assert generate(model, TEXT, max_new_tokens=12, stop_ids=()) == tokenizer.decode(full, skip_specials=True)
    free = LanguageModel(bound, tokenizer)
    assert generate(free, TEXT, max_new_tokens=12, stop_ids={stop}) == generate(model, TEXT, max_new_tokens=12)
    assert generate(model, TEXT, max_new_tokens=len(before)) == tokenizer.decode(before, skip_specials=True)


def test_an_answer_holds_no_special_token_but_those_around_thoughts(model, tokenizer):
    said = tokenizer.encode_markup(f"<think>hm</think>yes{EOS}{USER}{BOS}<｜▁pad▁｜>")
    assert model.decode(said) == "<think>hm</think>yes"


# --- logits ---------------------------------------------------------------------------------------------------------


def test_right_padding_changes_no_logits(model64):
    rows = [[5, 9, 1], [11, 3, 40, 8, 29, 2, 7, 30], [52]]
    padded = np.zeros((3, 8), np.int32)
    for row, tokens in zip(padded, rows, strict=True):
        row[: len(tokens)] = tokens
    with jax.enable_x64(True):
        speaker = LanguageModel(model64)
        together = speaker(padded)
        assert together.shape == (3, 8, CONFIG.vocab_size)
        for got, tokens in zip(together, rows, strict=True):
            alone = speaker([tokens])  # a list will do
            np.testing.assert_allclose(got[: len(tokens)], alone[0], rtol=1e-9, atol=1e-9)
        with_other_padding = speaker(np.where(padded == 0, 17, padded))
        np.testing.assert_allclose(with_other_padding[0, :3], together[0, :3], rtol=1e-9, atol=1e-9)
        assert float(jnp.abs(with_other_padding[0, 3:] - together[0, 3:]).max()) > 1e-3


def test_logits_are_those_of_the_transformer(model, bound):
    tokens = jnp.asarray([[5, 300, 7], [8, 9, 10]], jnp.int32)
    np.testing.assert_allclose(model(tokens), bound(tokens), rtol=2e-5, atol=2e-5)
    assert model(tokens).dtype == jnp.float32
    assert model.config is bound.config


# --- what is missing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [TEXT, [TEXT], [[1, 2], TEXT]])
def test_a_text_for_a_model_without_a_tokenizer_is_told_in_one_line(bound, prompt):
    expected = r"^this model came without a tokenizer\.json: give prompts as lists of token ids$"
    with pytest.raises(ChatError, match=expected):
        generate(bound, prompt)
    with pytest.raises(ChatError, match=r"^folder came without a tokenizer\.json: "):
        generate(LanguageModel(bound, name="folder"), prompt)


def test_a_conversation_for_a_model_without_a_template_is_told_in_one_line(bound, tokenizer):
    with pytest.raises(ChatError, match=r"^folder came without a chat template: give prompts as text$"):
        generate(LanguageModel(bound, tokenizer, name="folder"), [CHAT, CHAT])


def test_one_message_is_no_conversation(model):
    with pytest.raises(ChatError, match=r"^a conversation is a list of messages, .*: put it into a list$"):
        generate(model, CHAT[0])


@pytest.mark.parametrize("prompt", ["a\ud800b", [{"role": "user", "content": "a\ud800b"}]])
def test_half_a_character_is_told_in_one_line(model, prompt):
    with pytest.raises(ChatError, match=r"^the prompt holds half a surrogate pair, '\\ud800'; give whole characters$"):
        generate(model, prompt)
