"""Named architectures: what they share with the published ones, and where they must differ."""

import math

import pytest

from deepseek_jax import zoo

PUBLISHED = {"v3": zoo.deepseek_v3, "v2_lite": zoo.deepseek_v2_lite}


@pytest.mark.parametrize("make", PUBLISHED.values(), ids=PUBLISHED)
def test_yarn_comes_with_long_context_only(make):
    """Pre-training at 4K uses no YaRN; the extension, and with it the released weights, stretch 4K by 40."""
    assert make().attention.yarn is None
    yarn = make(long_context=True).attention.yarn
    assert (yarn.factor, yarn.original_length, yarn.beta_fast, yarn.beta_slow) == (40, 4096, 32, 1)


def test_v2_lite_has_a_temperature_of_its_own():
    yarn = zoo.deepseek_v2_lite(long_context=True).attention.yarn
    assert (yarn.mscale, yarn.mscale_all_dim) == (0.707, 0.707)


@pytest.mark.parametrize("make", PUBLISHED.values(), ids=PUBLISHED)
def test_published_models_start_from_the_papers_deviation(make):
    assert make().init_std == 0.006


@pytest.mark.parametrize("make", [zoo.tiny, zoo.small])
def test_small_models_start_with_the_papers_ratio_of_output_to_input(make):
    """A matrix of D rows multiplies the size of its input by std · sqrt(D): docs/design.md, "Initial weights"."""
    config, paper = make(), zoo.deepseek_v3()
    ratio, wanted = (c.init_std * math.sqrt(c.hidden_size) for c in (config, paper))
    assert ratio == pytest.approx(wanted, rel=2e-3)
    assert config.init_std == 0.0367
