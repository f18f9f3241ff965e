"""Named architectures: what they share with the published ones, and where they must differ."""

import math

import numpy as np
import pytest

from deepseek_jax import zoo
from deepseek_jax.model.rope import rope_frequencies
from deepseek_jax.planning.parameters import total_parameters

EXTENDED = {"v3": zoo.deepseek_v3, "v2": zoo.deepseek_v2, "v2_lite": zoo.deepseek_v2_lite, "kimi_k2": zoo.kimi_k2}
PUBLISHED = EXTENDED | {"moonlight": zoo.moonlight_16b_a3b}


@pytest.mark.parametrize(
    ("name", "millions"),
    [("v3", 671_026), ("v2", 235_741), ("v2_lite", 15_706), ("moonlight", 15_960), ("kimi_k2", 1_026_408)],
)
def test_published_totals(name, millions):
    assert round(total_parameters(PUBLISHED[name](), mtp=False) / 1e6) == millions


@pytest.mark.parametrize("long_context", [False, True])
def test_base_r1_and_v3_1_are_v3(long_context):
    for make in (zoo.deepseek_v3_base, zoo.deepseek_r1, zoo.deepseek_v3_1):
        assert make(long_context=long_context) == zoo.deepseek_v3(long_context=long_context)
    assert zoo.deepseek_v3().mtp_depth == 1


@pytest.mark.parametrize("make", EXTENDED.values(), ids=EXTENDED)
def test_yarn_comes_with_long_context_only(make):
    """Pre-training at 4K uses no YaRN; the extension, and with it the released weights, stretch 4K by 40 or 32."""
    assert make().attention.yarn is None
    yarn = make(long_context=True).attention.yarn
    factor, fast = (32, 1) if make is zoo.kimi_k2 else (40, 32)
    assert (yarn.factor, yarn.original_length, yarn.beta_fast, yarn.beta_slow) == (factor, 4096, fast, 1)


@pytest.mark.parametrize("make", [zoo.deepseek_v2, zoo.deepseek_v2_lite])
def test_v2_has_a_temperature_of_its_own(make):
    yarn = make(long_context=True).attention.yarn
    assert (yarn.mscale, yarn.mscale_all_dim) == (0.707, 0.707)


def test_kimi_k2_goes_from_fast_to_slow_frequencies_within_one_step():
    """Both betas are 1, so the ramp is one index wide: 20 of its 32 frequencies stay and 12 are divided."""
    plain, extended = (rope_frequencies(zoo.kimi_k2(long_context=long).attention) for long in (False, True))
    np.testing.assert_allclose(plain / extended, [1] * 20 + [32] * 12, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "router"),
    [
        ("v3", ("sigmoid", "top2_sum", 8, 4, True, 2.5, True)),
        ("v2", ("softmax", "max", 8, 3, False, 16.0, False)),
        ("v2_lite", ("softmax", "max", 1, 1, False, 1.0, False)),
        ("moonlight", ("sigmoid", "top2_sum", 1, 1, True, 2.446, True)),
        ("kimi_k2", ("sigmoid", "top2_sum", 1, 1, True, 2.827, True)),
    ],
)
def test_published_routers(name, router):
    moe = PUBLISHED[name]().moe
    groups = (moe.group_score, moe.num_groups, moe.groups_per_token)
    assert (moe.score_function, *groups, moe.normalize_weights, moe.routed_scale, moe.use_bias) == router


def test_what_moonshot_changed_outside_the_router():
    moonlight, kimi = zoo.moonlight_16b_a3b(), zoo.kimi_k2()
    assert (moonlight.rms_norm_eps, kimi.rms_norm_eps) == (1e-5, 1e-6)
    for config in (moonlight, kimi):
        assert (config.attention.rope_theta, config.mtp_depth, config.num_dense_layers) == (50_000, 0, 1)


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
