"""Multi-token prediction: what each depth reads and predicts at every position (equations 21-24)."""

import dataclasses
import functools
import textwrap
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import full, small

from deepseek_jax.model import mtp, staged
from deepseek_jax.model.parameters import RouterBias, parameter_specs
from deepseek_jax.model.staged import staged_model
from deepseek_jax.model.targets import Microbatch, targets
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.pipeline.protocol import LayerStats, LossScales
from deepseek_jax.parallel.pipeline.stage import Occupied, Stage, merge
from deepseek_jax.parallel.vocabulary import WholeVocabulary
from deepseek_jax.tree import map_leaves

CONFIG = small(mtp_depth=2)
SCALES = LossScales(jnp.ones(()), jnp.ones(()), jnp.zeros(()))


def weights(model: Transformer, seed: int = 0):
    """Random values `[layers, ...]` of a model's parameters with its biases, as the pipeline hands them to it."""
    rng = np.random.default_rng(seed)
    depth = {"dense": model.config.num_dense_layers, "moe": model.config.num_moe_layers, "mtp": model.config.mtp_depth}

    def values(specs, std):
        def draw(kind, spec):
            stacked = ((depth[kind],) if kind in depth else ()) + spec.shape
            return jnp.asarray(rng.normal(size=stacked) * std + (spec.initializer == "ones"))

        return {kind: map_leaves(lambda spec, k=kind: draw(k, spec), tree) for kind, tree in specs.items()}

    params, biases = (values(parameter_specs(model, *kind), 0.2) for kind in ((), (RouterBias,)))
    return {kind: merge(tree, biases.get(kind)) for kind, tree in params.items()}


def finish(model: Transformer, params, batch: Microbatch, **options):
    """Runs the whole staged model on one microbatch."""
    run = staged_model(model, **options)
    out, _ = Stage(run)(params, {}, run.embed(params, batch), batch, Occupied())
    return run.finish(params, out.hidden, batch, SCALES)


GOLDEN = """
    i  segment  reads   main: label w within   mtp 1: input label w within   mtp 2: input label w within
    0        1     11            12 1      1             12    13 1      1             13    14 1      1
    1        1     12            13 1      1             13    14 1      1             14    21 1      0
    2        1     13            14 1      1             14    21 1      0             21    22 1      0
    3        1     14            21 1      0             21    22 1      0             22    23 1      0
    4        2     21            22 1      1             22    23 1      1             23     0 0      0
    5        2     22            23 1      1             23     0 0      0              0     0 0      0
    6        2     23             0 0      0              0     0 0      0              -     - -      -
    7        0      0             0 0      0              -     - -      -              -     - -      -
"""


def test_alignment_on_packed_documents():
    """Position i of depth k reads token i + k and predicts token i + k + 1; a dash has neither."""
    row = np.array([[11, 12, 13, 14, 21, 22, 23, 0, 0]], np.int32)
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]], np.int32)
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 0]], np.int32)
    batch = Microbatch(*map(jnp.asarray, (row, segments, positions, (segments > 0).astype(np.int32))))
    model = Transformer(CONFIG)
    params = weights(model)
    # Every row of the embedding is its own index, so that what a module is given shows which tokens it reads.
    numbered = jnp.broadcast_to(jnp.arange(64.0)[:, None], (64, CONFIG.hidden_size))
    params["embedding"]["weight"] = numbered
    seen = []

    def record_embedding(module, hidden, embedding):
        seen.append([np.asarray(embedding[0, :, 0], int)])
        return hidden

    def record_valid(params, x, ctx):
        seen[-1].append(np.asarray(ctx.valid[0]))
        return x, jnp.zeros(()), LayerStats.none()

    run = staged_model(model)
    run = dataclasses.replace(run, ahead=dataclasses.replace(run.ahead, layer=record_valid))
    only_mtp = {name: params[name] for name in ("embedding", "final_norm", "mtp")}
    with mock.patch.object(mtp.MTPModule, "join", record_embedding):
        Stage(run)(only_mtp, {}, run.embed(params, batch), batch, Occupied())

    length = row.shape[1] - 1
    header = "i  segment  reads   main: label w within   mtp 1: input label w within   mtp 2: input label w within"
    lines = [header]
    anywhere = [targets(batch, depth) for depth in range(3)]
    within = [targets(batch, depth, within_documents=True) for depth in range(3)]
    for i in range(length):
        line = f"{i}  {segments[0, i]:7d}  {row[0, i]:5d}"
        for depth in range(3):
            exists = i < length - depth
            cells = [int(t[0, i]) if exists else "-" for t in (anywhere[depth].labels, anywhere[depth].weights)]
            cells.append(int(within[depth].weights[0, i]) if exists else "-")
            if depth:
                read = seen[depth - 1][0][i] if exists else "-"
                line += f"   {read:>12} {cells[0]:>5} {cells[1]} {cells[2]:>6}"
            else:
                line += f"   {cells[0]:>11} {cells[1]} {cells[2]:>6}"
        lines.append(line)
    assert "\n".join(lines) == textwrap.dedent(GOLDEN).strip("\n")
    # The last k positions of depth k have no input and no label: they count nowhere.
    for depth, (_, valid) in enumerate(seen, start=1):
        np.testing.assert_array_equal(valid, np.append(segments[0, depth:length], [0] * depth) > 0)
        for t in (anywhere[depth], within[depth]):
            np.testing.assert_array_equal(t.weights[0, length - depth :], 0)


@pytest.fixture(scope="module")
def hidden_of_weights():
    """A jitted function of weights and tokens `[B, S + 1]`: what depths 0, 1, 2 hand to the head, `[B, S, D]` each."""
    model = Transformer(CONFIG)

    @jax.jit
    def run(params, tokens):
        ones = jnp.ones_like(tokens)
        batch = Microbatch(tokens, ones, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), ones)
        seen = []

        class Recording(WholeVocabulary):
            def cross_entropy_sum(self, hidden, head, labels, weights, *, chunk=None):
                seen.append(hidden.reshape(tokens.shape[0], -1, hidden.shape[-1]))
                return jnp.zeros(())

        finish(model, params, batch, vocabulary=Recording())
        return seen

    return run


@pytest.fixture(scope="module")
def hidden_by_depth(hidden_of_weights):
    """The same of tokens alone."""
    return functools.partial(hidden_of_weights, weights(Transformer(CONFIG)))


@pytest.mark.parametrize("changed", [0, 4, 7])
def test_depth_k_sees_exactly_the_tokens_up_to_i_plus_k(hidden_by_depth, changed):
    tokens = np.asarray(full(CONFIG, 1, 8).tokens)
    other = tokens.copy()
    other[0, changed] = (other[0, changed] + 1) % CONFIG.vocab_size
    length = tokens.shape[1] - 1
    for depth, (before, after) in enumerate(zip(hidden_by_depth(tokens), hidden_by_depth(other), strict=True)):
        moved = np.abs(np.asarray(before) - np.asarray(after)).max(axis=(0, 2)) > 1e-6
        expected = [i + depth >= changed for i in range(length - depth)]
        assert moved[: length - depth].tolist() == expected, f"depth {depth}"


def test_the_last_token_is_read_by_no_depth(hidden_by_depth):
    tokens = np.asarray(full(CONFIG, 1, 8).tokens)
    other = tokens.copy()
    other[0, -1] = (other[0, -1] + 1) % CONFIG.vocab_size
    for before, after in zip(hidden_by_depth(tokens), hidden_by_depth(other), strict=True):
        np.testing.assert_array_equal(before, after)


def test_the_projection_takes_the_embedding_first():
    """The released weights' order [embedding; hidden]: with the first half of the projection zero, tokens vanish."""
    model = Transformer(CONFIG)
    params = weights(model)
    projection = params["mtp"]["projection"]["weight"]
    hidden = jnp.ones((1, 4, CONFIG.hidden_size))
    embeddings = jax.random.normal(jax.random.key(0), (2, 1, 4, CONFIG.hidden_size))

    @jax.jit
    def run(projection, embedding):
        layer = jax.tree.map(lambda leaf: leaf[0], params["mtp"] | {"projection": {"weight": projection}})
        return staged._bind(model.mtp, layer).join(hidden, embedding)

    no_embedding = projection.at[:, : CONFIG.hidden_size].set(0)
    np.testing.assert_array_equal(*(run(no_embedding, e) for e in embeddings))
    no_hidden = projection.at[:, CONFIG.hidden_size :].set(0)
    assert (run(no_hidden, embeddings[0]) != run(no_hidden, embeddings[1])).any()


UNEVEN = np.linspace(0.5, 2, CONFIG.hidden_size)


def test_each_depth_ends_with_its_own_norm(hidden_of_weights):
    """Equation 23 as the released weights have it (`shared_head.norm`): depth 1's scale multiplies what its head reads,
    and depth 2 goes on from there; the main model does not see it."""
    params, tokens = weights(Transformer(CONFIG)), full(CONFIG, 1, 8).tokens
    before = hidden_of_weights(params, tokens)
    scale = params["mtp"]["final_norm"]["scale"]
    params["mtp"]["final_norm"]["scale"] = scale.at[0].multiply(UNEVEN)
    after = hidden_of_weights(params, tokens)
    np.testing.assert_array_equal(after[0], before[0])
    np.testing.assert_allclose(after[1], before[1] * UNEVEN, rtol=1e-5)
    assert np.abs(after[2] - before[2]).max() > 0.1


def test_depth_1_reads_what_the_main_norm_gives_and_does_not_end_with_it(hidden_of_weights):
    """Equation 21 as the released weights have it: h is taken after the final norm, so that its scale changes depth 1.

    An even factor is undone by the module's own norm of its input: depth 1 does not pass the main norm afterwards.
    """
    params, tokens = weights(Transformer(CONFIG)), full(CONFIG, 1, 8).tokens
    scale = params["final_norm"]["scale"]

    def scaled(factor):
        return hidden_of_weights(params | {"final_norm": {"scale": scale * factor}}, tokens)

    before, uneven, even = scaled(1), scaled(UNEVEN), scaled(2)
    for got, factor in ((uneven, UNEVEN), (even, 2)):
        np.testing.assert_allclose(got[0], before[0] * factor, rtol=1e-5)
    assert np.abs(uneven[1] - before[1]).max() > 0.1
    np.testing.assert_allclose(even[1], before[1], atol=1e-3)


def test_a_model_without_moe_layers_has_modules_all_the_same():
    config = small(num_layers=2, num_dense_layers=2, mtp_depth=1)
    model, batch = Transformer(config), full(config, 1, 8)
    params = weights(model)
    loss, sums = jax.jit(lambda params: finish(model, params, jax.tree.map(jnp.asarray, batch)))(params)
    assert np.isfinite(loss)
    assert sums["loss_mtp"] > 1
