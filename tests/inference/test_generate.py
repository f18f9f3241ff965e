"""Generation against full recomputation, token for token, and its promises: batch mates, seeds, stops, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.inference import generate as module
from deepseek_jax.inference.generate import Generator, Sampling, bucket, generate
from tests.inference.conftest import CONFIG, lively_model

PROMPTS = [[5], [11, 3, 40, 8, 29], [7, 7], [52, 0, 1, 2, 3, 4, 9, 30, 31, 17, 6]]


def recompute(model, prompt: list[int], steps: int) -> list[int]:
    """Greedy continuation without a cache: the whole sequence through `Transformer.__call__` for every token."""
    forward = jax.jit(lambda model, tokens: model(tokens))
    tokens = list(prompt)
    for _ in range(steps):
        padded = np.zeros((1, 48), np.int32)  # what follows a token does not reach it
        padded[0, : len(tokens)] = tokens
        tokens.append(int(forward(model, padded)[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_equals_full_recomputation_token_for_token(model64):
    with jax.enable_x64(True):
        outputs = generate(model64, PROMPTS, max_new_tokens=32)
        expected = [recompute(model64, prompt, 32) for prompt in PROMPTS]
    assert outputs == expected
    assert len({token for output in outputs for token in output}) > 8  # no model that repeats one token


def test_a_prompt_does_not_depend_on_its_batch_mates(model64):
    """Sampled; that greedy prompts do not is part of the test above."""
    warm = Sampling(temperature=1.5, top_p=0.9, seed=3)
    with jax.enable_x64(True):
        together = generate(model64, PROMPTS, max_new_tokens=12, sampling=warm)
        alone = [generate(model64, [prompt], max_new_tokens=12, sampling=warm)[0] for prompt in PROMPTS]
        in_parts = Generator(model64, max_batch=3).generate(PROMPTS, max_new_tokens=12, sampling=warm)
    assert together == alone == in_parts


def test_seeds_reproduce_and_differ_and_equal_prompts_draw_on_their_own(model32):
    def run(seed):
        sampling = Sampling(temperature=2.0, seed=seed)
        return generate(model32, [PROMPTS[1]] * 3 + [PROMPTS[0]], max_new_tokens=12, sampling=sampling)

    first = run(0)
    assert first == run(0)
    assert first != run(1)
    assert len({tuple(output) for output in first}) == 4


def test_temperature_zero_is_greedy_and_so_is_a_tiny_top_p(model32):
    expected = generate(model32, PROMPTS, max_new_tokens=12)
    assert generate(model32, PROMPTS, max_new_tokens=12, sampling=Sampling(temperature=0, seed=9)) == expected
    assert generate(model32, PROMPTS, max_new_tokens=12, sampling=Sampling(temperature=1e-50, seed=9)) == expected
    only_best = Sampling(temperature=1.0, top_p=1e-6)
    assert generate(model32, PROMPTS, max_new_tokens=12, sampling=only_best) == expected


def test_stop_ids_end_a_continuation_and_no_other(model32):
    full = generate(model32, PROMPTS, max_new_tokens=12)
    stops = {full[0][4], full[1][6]}

    def cut(output):
        ends = [i for i, token in enumerate(output) if token in stops]
        return output[: ends[0] + 1] if ends else output

    assert generate(model32, PROMPTS, max_new_tokens=12, stop_ids=stops) == [cut(output) for output in full]
    assert generate(model32, [PROMPTS[0]], max_new_tokens=12, stop_ids=[full[0][0]]) == [[full[0][0]]]


def test_shapes_are_rounded_so_that_few_programs_are_compiled(model32):
    assert [bucket(n) for n in (1, 64, 65, 512, 513, 1025)] == [64, 64, 128, 512, 640, 1280]
    generate(model32, PROMPTS[:3], max_new_tokens=12)
    before = module._prefill._cache_size(), module._decode._cache_size()
    other = lively_model(CONFIG, jnp.float32, seed=1)  # other weights, another prompt count and other lengths
    outputs = generate(other, PROMPTS, max_new_tokens=40)
    assert (module._prefill._cache_size(), module._decode._cache_size()) == before
    assert [len(output) for output in outputs] == [40] * 4
    assert outputs != generate(model32, PROMPTS, max_new_tokens=40)


def test_no_prompts_give_no_outputs(model32):
    assert generate(model32, [], max_new_tokens=3) == []


@pytest.mark.parametrize(
    ("prompts", "new", "stops", "message"),
    [
        ([[1], []], 4, (), r"prompt 1 is empty; begin it with a token, for example the tokenizer's eos_id"),
        ([[1, 53]], 4, (), r"prompt 0 holds token 53, outside the model's vocabulary of 53"),
        ([[-1]], 4, (), r"prompt 0 holds token -1, outside the model's vocabulary of 53"),
        ([[1] * 9], 4, (), r"prompt 0 has 9 tokens and needs 13 with max_new_tokens=4; the capacity is 12"),
        ([[1]], 0, (), r"max_new_tokens must be at least 1, not 0"),
        ([[1]], 4, (99,), r"stop id 99 is outside the model's vocabulary of 53"),
    ],
)
def test_bad_requests_are_one_clear_line(model32, prompts, new, stops, message):
    with pytest.raises(ValueError, match=rf"^{message}$"):
        Generator(model32, capacity=12).generate(prompts, max_new_tokens=new, stop_ids=stops)
