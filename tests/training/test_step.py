"""The train step: what its losses, gradients and bias are, whatever the batch is split into."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_model import abstract_state, full, hyperparameters, initial_state, packed, run_step, small, trainer

from deepseek_jax.config import ConfigError
from deepseek_jax.model.parameters import RouterBias
from deepseek_jax.model.targets import Microbatch
from deepseek_jax.parallel.pipeline.stage import merge
from deepseek_jax.tree import flatten

CONFIG = small(num_layers=2, num_dense_layers=0, mtp_depth=2)
LENGTH = 12
BALANCE = 0.01
DOCUMENTS = [[13], [5, 8], [4, 4], [3, 10], [13], [6]]
BATCH = packed(CONFIG, DOCUMENTS, length=LENGTH)
HYPER = functools.partial(hyperparameters, dtype=jnp.float64)


def rows(batch: Microbatch, which) -> Microbatch:
    return Microbatch(*(leaf[which] for leaf in batch))


def padded(batch: Microbatch, count: int) -> Microbatch:
    """The batch with empty rows at the end."""
    return Microbatch(*(np.pad(leaf, ((0, count), (0, 0))) for leaf in batch))


@pytest.fixture(scope="module")
def stepped():
    """`stepped(batch, **options)`: the state after one step of gradient descent in float64, and its metrics."""

    @functools.cache
    def make(**changes):
        options = {"compute_dtype": jnp.float64, "balance_weight": BALANCE, "clip_norm": 1e9}
        return trainer(CONFIG, **options | changes)

    def run(batch, **changes):
        with jax.enable_x64(True):
            runner = make(**changes)
            before = initial_state(runner, jnp.float64)
            state, metrics = run_step(runner, before, batch, HYPER())
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params)), "the state is donated"
            return jax.tree.map(np.asarray, (state, metrics))

    return run


@pytest.fixture(scope="module")
def whole(stepped):
    return stepped(BATCH)


def assert_same(one, other):
    """States and metrics agree as far as float64 lets sums in another order; integers and biases exactly."""
    (state, metrics), (expected_state, expected) = one, other
    for name, value in flatten(expected_state.params).items():
        np.testing.assert_allclose(flatten(state.params)[name], value, rtol=1e-9, atol=1e-12, err_msg=name)
    for name, value in flatten(expected_state.router_bias).items():
        np.testing.assert_array_equal(flatten(state.router_bias)[name], value, err_msg=name)
    np.testing.assert_array_equal(metrics.load, expected.load)
    for name in ("loss", "loss_main", "loss_mtp", "loss_balance", "grad_norm"):
        np.testing.assert_allclose(getattr(metrics, name), getattr(expected, name), rtol=1e-9, err_msg=name)


def test_accumulating_gradients_equals_one_big_batch(stepped, whole):
    assert_same(stepped(BATCH, microbatch_rows=1), whole)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_recomputing_activations_changes_nothing(stepped, whole, recompute):
    assert_same(stepped(BATCH, microbatch_rows=3, recompute=recompute), whole)


def test_unrolled_layers_change_nothing():
    """Of three layers one by one, two in the first iteration and one left over, and all, though more are allowed."""
    config = dataclasses.replace(CONFIG, num_layers=3, mtp_depth=0)

    def step(unroll_layers):
        runner = trainer(config, compute_dtype=jnp.float64, unroll_layers=unroll_layers)
        return jax.tree.map(np.asarray, run_step(runner, initial_state(runner, jnp.float64), BATCH, HYPER()))

    with jax.enable_x64(True):
        one_by_one = step(1)
        for unroll_layers in (2, 8):
            assert_same(step(unroll_layers), one_by_one)


def test_a_short_last_microbatch_is_padded_with_empty_rows(stepped, whole):
    # Five rows in microbatches of three: the sixth row is empty.
    five = padded(rows(BATCH, slice(5)), 1)
    in_threes = stepped(five, microbatch_rows=3, recompute="full")
    assert_same(in_threes, stepped(five))
    turned = padded(rows(BATCH, [4, 3, 2, 1, 0]), 1)
    assert_same(in_threes, stepped(turned, microbatch_rows=3, recompute="full"))
    assert in_threes[1].load.sum() < whole[1].load.sum()


def test_empty_rows_change_nothing(stepped, whole):
    # Only shapes differ: the mean is over labels and over non-empty sequences.
    twice = Microbatch(*(np.concatenate([leaf, np.zeros_like(leaf)]) for leaf in rows(BATCH, slice(3))))
    once = rows(BATCH, [0, 1, 2, 0, 1, 2])
    (_, metrics), (_, doubled) = stepped(twice), stepped(once)
    for name in ("loss", "loss_main", "loss_mtp", "loss_balance", "grad_norm"):
        np.testing.assert_allclose(getattr(metrics, name), getattr(doubled, name), rtol=1e-9, err_msg=name)
    np.testing.assert_array_equal(2 * metrics.load, doubled.load)


def test_masked_documents_learn_as_if_they_stood_alone(stepped):
    """With `mask_documents` neither attention, positions nor labels cross from one packed document to the next."""
    together = packed(CONFIG, [[5, 8], []], length=LENGTH)
    apart = jax.tree.map(np.zeros_like, together)
    for name in Microbatch._fields:
        source, target = getattr(together, name), getattr(apart, name)
        target[0, :5], target[1, :8] = source[0, :5], source[0, 5:]
    options = {"mask_documents": True, "balance_weight": 0.0}
    (state, metrics), (expected_state, expected) = (stepped(batch, **options) for batch in (together, apart))
    for name in ("loss", "loss_main", "loss_mtp", "grad_norm"):
        np.testing.assert_allclose(getattr(metrics, name), getattr(expected, name), rtol=1e-9, err_msg=name)
    for name, value in flatten(expected_state.params).items():
        np.testing.assert_allclose(flatten(state.params)[name], value, rtol=1e-9, atol=1e-12, err_msg=name)


def test_the_loss_is_main_plus_lambda_mtp_plus_alpha_balance(whole):
    metrics = whole[1]
    np.testing.assert_allclose(
        metrics.loss, metrics.loss_main + 0.3 * metrics.loss_mtp + BALANCE * metrics.loss_balance, rtol=1e-7
    )
    # Σ f_i P_i is about 1 per layer, and 2 MoE layers and 2 MTP modules have one each.
    assert 3.9 < metrics.loss_balance < 6


def test_every_mtp_depth_is_divided_by_the_labels_of_the_main_model(whole):
    """Equations 24 and 25: each depth's sum over T of the main model, then the mean over depths."""
    labels = [sum(max(sum(lengths) - 1 - depth, 0) for lengths in DOCUMENTS) for depth in range(3)]
    # New weights predict nothing: each label costs about ln 64.
    expected = np.log(64) * (labels[1] + labels[2]) / (2 * labels[0])
    np.testing.assert_allclose(whole[1].loss_mtp, expected, rtol=0.05)


def test_every_label_is_counted_once(whole):
    """The main loss is the mean of -log p(next token) over the labels, from the model's plain forward pass."""
    runner = trainer(CONFIG)
    with jax.enable_x64(True):
        initial = initial_state(runner, jnp.float64)
        params, biases = jax.tree.map(np.asarray, (initial.params, initial.router_bias))
        merged = {kind: merge(tree, biases.get(kind)) for kind, tree in params.items()}
        merged = {
            kind: jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), tree) if kind in ("dense", "moe", "mtp") else tree
            for kind, tree in merged.items()
        }
        graphdef = nnx.graphdef(runner.model)
        logits = jax.jit(lambda values, tokens: nnx.merge(graphdef, values)(tokens))(merged, BATCH.tokens[:, :-1])
        log_p = np.asarray(jax.nn.log_softmax(logits))
    total, count = 0.0, 0
    for row in range(len(DOCUMENTS)):
        for i in range(LENGTH):
            if BATCH.loss_mask[row, i + 1]:
                total -= log_p[row, i, BATCH.tokens[row, i + 1]]
                count += 1
    assert count == sum(sum(lengths) - 1 for lengths in DOCUMENTS)
    np.testing.assert_allclose(whole[1].loss_main, total / count, rtol=1e-7)


def test_loads_count_every_choice_of_every_real_token(whole):
    real = sum(min(sum(lengths), LENGTH) for lengths in DOCUMENTS)
    # MTP module k has no token to read at the last k positions of a row's documents.
    mtp = [sum(min(sum(lengths), LENGTH) - depth for lengths in DOCUMENTS) for depth in (1, 2)]
    k = CONFIG.moe.experts_per_token
    assert whole[1].load.sum(axis=1).tolist() == [k * real, k * real, k * mtp[0], k * mtp[1]]


def test_every_bias_moves_by_the_rate_against_its_load(whole):
    state, metrics = whole
    moved = state.router_bias["moe"]["ffn"], state.router_bias["mtp"]["block"]["ffn"]
    biases = np.concatenate([ffn["router"]["bias"][0] for ffn in moved])
    load = metrics.load.astype(float)
    np.testing.assert_allclose(biases, 1e-3 * np.sign(load.mean(axis=1, keepdims=True) - load), rtol=1e-12)
    assert (biases > 0).any()
    assert (biases < 0).any()
    np.testing.assert_allclose(metrics.max_vio, load.max(axis=1) / load.mean(axis=1) - 1, rtol=1e-5)


def test_a_tied_head_adds_its_gradient_to_the_embedding():
    """The same weights tied and untied: the tied one moves by both gradients."""
    config = dataclasses.replace(CONFIG, tie_embeddings=True)
    tied, untied = trainer(config, clip_norm=1e9), trainer(CONFIG, clip_norm=1e9)
    with jax.enable_x64(True):
        start = initial_state(tied, jnp.float64)
        before = np.asarray(start.params["embedding"]["weight"])
        params = jax.tree.map(jnp.copy, start.params) | {"head": {"weight": jnp.asarray(before.T)}}
        apart, _ = run_step(
            untied,
            untied.fresh_state(params, jax.tree.map(jnp.copy, start.router_bias)),
            BATCH,
            hyperparameters(dtype=jnp.float64),
        )
        together, _ = run_step(tied, start, BATCH, hyperparameters(dtype=jnp.float64))
        moved = np.asarray(together.params["embedding"]["weight"]) - before
        expected = np.asarray(apart.params["embedding"]["weight"]) - before
        expected += (np.asarray(apart.params["head"]["weight"]) - before.T).T
    assert np.abs(moved).max() > 1e-6
    np.testing.assert_allclose(moved, expected, rtol=1e-9, atol=1e-15)
    assert "head" not in together.params


def test_a_step_counts_one(whole):
    assert whole[0].step == 1


def test_the_bias_is_no_parameter():
    runner = trainer(CONFIG)
    names = set(flatten(runner.params_layout.specs))
    assert not any(name.endswith("bias") for name in names)
    assert set(flatten(runner.bias_layout.specs)) == {"moe.ffn.router.bias", "mtp.block.ffn.router.bias"}
    assert issubclass(RouterBias, nnx.Variable)
    assert not issubclass(RouterBias, nnx.Param)


def test_the_step_does_not_grow_with_depth():
    """Layers of one kind are scanned: more of them give the same program but for the sizes in it."""

    def lines(layers):
        runner = trainer(dataclasses.replace(CONFIG, num_layers=layers))
        batch = full(CONFIG, 2, 8)
        lowered = runner.lower(abstract_state(runner), batch, hyperparameters())
        return len(lowered.as_text().splitlines())

    # Not to the line: helper functions of equal shapes are shared.
    few, many = lines(4), lines(13)
    assert abs(many - few) < 0.01 * few


def test_evaluation_sums_the_main_loss(whole):
    runner = trainer(CONFIG, microbatch_rows=2)
    total, labels = runner.evaluate(initial_state(runner), BATCH)
    assert labels == sum(sum(lengths) - 1 for lengths in DOCUMENTS)
    np.testing.assert_allclose(total / labels, whole[1].loss_main, rtol=1e-5)


def test_bfloat16_keeps_float32_masters_and_losses():
    runner = trainer(CONFIG, compute_dtype=jnp.bfloat16, microbatch_rows=3)
    state, metrics = runner.lower(abstract_state(runner), BATCH, hyperparameters()).out_info
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.router_bias))} == {jnp.dtype("float32")}
    assert metrics.loss.dtype == metrics.grad_norm.dtype == jnp.float32


def test_rows_that_do_not_split_are_an_error():
    runner = trainer(CONFIG, microbatch_rows=4)
    with pytest.raises(ConfigError, match=r"a batch of 6 rows does not split over 1 devices .* pad it to 8 rows"):
        runner.lower(abstract_state(runner), BATCH, hyperparameters())
