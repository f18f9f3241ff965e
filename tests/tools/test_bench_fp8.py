"""What FP8 training keeps of a token at DeepSeek-V3's sizes, off the arrays that the pipeline's rings hold."""

import collections

import pytest

from deepseek_jax.precision.policy import BF16, V3_FP8
from tools.bench.fp8_kept import INPUTS, by_meaning, kept
from tools.bench.pipeline_memory import bytes_of


@pytest.fixture(scope="module")
def arrays():
    return kept(BF16), kept(V3_FP8)


def test_inputs_of_linear_layers_and_of_swiglu_take_057_of_bfloat16(arrays):
    before, after = (sum(bytes_of(by_meaning(found)[what]) for what in INPUTS.values()) for found in arrays)
    assert after / before < 0.57


def test_a_whole_layer_takes_065_of_bfloat16(arrays):
    before, after = map(bytes_of, arrays)
    assert after / before < 0.65


def test_what_is_kept_has_the_dtypes_of_the_policy(arrays):
    """E4M3 but for attention's output, which is E5M6, and what no linear layer reads; no output of an expert."""
    dtypes = {what: collections.Counter(a.dtype.name for a in of) for what, of in by_meaning(arrays[1]).items()}
    for name in ("dispatched", "gate_up", "shared"):
        assert dtypes[INPUTS[name]] in ({"float8_e4m3fn": 1, "float32": 1}, {"uint8": 1, "float32": 1})
    assert dtypes[INPUTS["attention"]] == {"uint8": 1, "float32": 1}
    assert {name for name in dtypes["everything else"] if name != "int32"} <= {"bfloat16", "float32"}
