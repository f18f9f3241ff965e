"""Measures of balance, with numbers worked by hand: what stands in `metrics.jsonl` besides `load` and `max_vio`."""

from __future__ import annotations

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.training.balance import max_violation as device_max_violation
from deepseek_jax.training.load_metrics import (
    LOAD_BINS,
    dead_experts,
    load_entropy,
    load_histogram,
    load_metrics,
    max_violation,
)
from deepseek_jax.training.metrics import MetricsWriter, read_metrics

EVEN, HALVES, ONE, NOTHING = [3, 3, 3, 3], [6, 0, 6, 0], [0, 12, 0, 0], [0, 0, 0, 0]
LOADS = np.array([EVEN, HALVES, ONE, NOTHING], np.int32)


def test_max_violation_is_the_busiest_over_the_mean_less_one():
    """Equation of arXiv 2408.15664: means of 3, busiest 3, 6 and 12; nothing routed is no violation."""
    np.testing.assert_array_equal(max_violation(LOADS), [0, 1, 3, 0])


def test_max_violation_is_that_of_the_step():
    loads = np.random.default_rng(0).integers(0, 1000, (5, 16)).astype(np.int32)
    np.testing.assert_allclose(max_violation(loads), device_max_violation(jnp.asarray(loads)), rtol=1e-5)


def test_entropy_is_one_where_even_and_zero_where_one_expert_takes_all():
    """Two of four experts with half each: log 2 / log 4."""
    np.testing.assert_allclose(load_entropy(LOADS), [1, 0.5, 0, 1], atol=1e-12)
    assert not np.signbit(load_entropy(LOADS)).any()  # -0.0 would be written so
    share = np.array([0.5, 0.25, 0.25])  # 1.5 bits of log2(3)
    np.testing.assert_allclose(load_entropy(share * 8), 1.5 / math.log2(3))
    np.testing.assert_array_equal(load_entropy(np.array([[7], [0]])), [1, 1])


def test_dead_experts_have_no_token():
    np.testing.assert_array_equal(dead_experts(LOADS), [0, 2, 3, 4])


def test_the_histogram_counts_experts_by_load_over_mean():
    """Ten experts with a mean of 8 tokens: each stands at the upper end of its bin, or one token above it."""
    assert LOAD_BINS == (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 4)
    ends = np.array([0, 2, 4, 6, 8, 10, 12, 16, 22, 0])
    assert ends.mean() == 8
    np.testing.assert_array_equal(load_histogram(ends), [2, 1, 1, 1, 1, 1, 1, 1, 1, 0])
    above = np.array([1, 3, 5, 7, 9, 11, 13, 17, 14, 0])
    assert above.mean() == 8
    np.testing.assert_array_equal(load_histogram(above), [1, 1, 1, 1, 1, 1, 1, 2, 1, 0])
    busy = np.array([41, 4, 0, 0, 5, 0, 0, 0, 0, 0])  # 8.2, 0.8 and 1 times the mean
    np.testing.assert_array_equal(load_histogram(busy), [7, 0, 0, 0, 2, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(load_histogram(LOADS)[3], [4] + 9 * [0])


def test_the_histogram_is_exact_and_counts_every_expert_once():
    """At the counts of a full batch too, where a float32 could not tell a token from its neighbour."""
    mean = 2**28
    loads = np.array([[mean, mean + 1, mean - 1, mean], [2 * mean, 2 * mean, 0, 0]], np.int32)
    np.testing.assert_array_equal(load_histogram(loads)[0], [0, 0, 0, 0, 3, 1, 0, 0, 0, 0])
    random = np.random.default_rng(1).integers(0, 60, (40, 3, 16))
    histogram = load_histogram(random)
    assert histogram.shape == (40, 3, 10)
    assert (histogram >= 0).all()
    np.testing.assert_array_equal(histogram.sum(axis=-1), 16)
    np.testing.assert_array_equal(histogram[..., 0], dead_experts(random))


def test_the_metrics_of_a_step_have_their_names():
    devices = np.array([[6, 6], [6, 6], [12, 0], [0, 0]], np.int32)
    metrics = load_metrics(LOADS, devices)
    expected = {
        "load_entropy": [1, 0.5, 0, 1],
        "dead_experts": [0, 2, 3, 4],
        "load_histogram": load_histogram(LOADS),
        "device_load": [[0.5, 0.5], [0.5, 0.5], [1, 0], [0, 0]],
        "device_load_max": [1, 1, 2, 1],
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, atol=1e-12, err_msg=name)
    thirds = load_metrics(np.array([[1, 1, 1]]), np.array([[2, 1]]))
    assert thirds["device_load"].tolist() == [[0.666667, 0.333333]]


@pytest.mark.parametrize("layers", [0, 2])
def test_the_metrics_can_be_written_and_read(tmp_path, layers):
    """A dense model has no layer with experts, and no loads."""
    metrics = load_metrics(np.full((layers, 4), 3, np.int32), np.full((layers, 2), 6, np.int32))
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, metrics, tokens=12)
    (record,) = read_metrics(tmp_path)
    assert record["dead_experts"] == [0] * layers
    assert record["device_load"] == [[0.5, 0.5]] * layers
    json.dumps(record, allow_nan=False)
