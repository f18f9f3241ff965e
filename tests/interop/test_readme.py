"""The README's "Use a published model", line for line, on a folder that `transformers` wrote."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek_jax.config import AttentionConfig, ModelConfig, MoEConfig
from deepseek_jax.data.tokenizer import train_tokenizer

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
common = pytest.importorskip("tools.bench.common")

CONFIG = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    num_layers=2,
    num_dense_layers=1,
    dense_ffn_size=40,
    attention=AttentionConfig(
        num_heads=2, q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
    ),
    moe=MoEConfig(num_experts=8, experts_per_token=2, expert_ffn_size=16, num_groups=4, groups_per_token=2),
    mtp_depth=0,
)
TEMPLATE = "{{ bos_token }}{% for m in messages %}<｜User｜>{{ m.content }}<｜Assistant｜>{% endfor %}"


def readme_lines() -> str:
    """The code block under 'Use a published model'."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    return re.search(r"```python\n(.*?)```", text.partition("## Use a published model\n")[2], re.DOTALL)[1]


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A small model of theirs with its tokenizer, saved in the folder that the README names; we are beside it."""
    name = re.search(r'ds\.load\("([^"]+)"\)', readme_lines())[1]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        common.hugging_face_config(CONFIG), experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    ours = train_tokenizer(["def fibonacci(n): what is a latent?"] * 4, vocab_size=CONFIG.vocab_size)
    ours.save(tmp_path / "tokenizer.json")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"),
        bos_token="<｜begin▁of▁sentence｜>",
        eos_token="<｜end▁of▁sentence｜>",
        chat_template=TEMPLATE,
    )
    model.generation_config.eos_token_id = ours.eos_id
    model.save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return model, tokenizer


def test_the_lines_of_the_readme_do_what_transformers_does(theirs):
    """Every line runs as it stands, and every value that a line has is compared."""
    theirs, tokenizer = theirs
    source = readme_lines()
    assert source.startswith('import deepseek_jax as ds\n\nmodel = ds.load("')
    scope: dict[str, Any] = {}
    answers = []
    for statement in re.split(r"\n+", source.strip()):
        if statement.startswith("ds.generate"):
            answers.append(eval(statement, scope))  # as an interactive session, which shows what a line is worth
        else:
            exec(statement, scope)
    messages = [{"role": "user", "content": re.search(r'"content": "(.*?)"', source)[1]}]
    prompts = [
        tokenizer("def fibonacci(n):", return_tensors="pt").input_ids,
        tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False),
    ]
    for prompt, answer, count in zip(prompts, answers, (128, 32), strict=True):
        (tokens,) = scope["ds"].generate(scope["model"], prompt.tolist(), max_new_tokens=count)
        with torch.no_grad():
            logits = theirs(torch.cat([prompt, torch.tensor([tokens])], axis=1)).logits[0, prompt.shape[1] - 1 : -1]
        chosen = logits[torch.arange(len(tokens)), torch.tensor(tokens)]
        assert (chosen >= logits.amax(-1) - 1e-3).all()
        assert len(set(tokens)) > 4
        said = tokenizer.decode(tokens, skip_special_tokens=True)
        assert re.sub("</?think>", "", answer) == said  # which our answers keep
    with torch.no_grad():
        expected = theirs(prompts[0]).logits
    np.testing.assert_allclose(np.asarray(scope["logits"]), expected.numpy(), rtol=1e-4, atol=1e-4)
