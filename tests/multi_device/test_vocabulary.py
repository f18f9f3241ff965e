"""A vocabulary split over `pipe` gives one device's loss and gradients, and no device holds an array of all of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from small_model import QUICK, packed, small

from deepseek_jax.compat import to_varying
from deepseek_jax.config import ConfigError
from deepseek_jax.model.parameters import RouterBias, abstract_values, parameter_specs
from deepseek_jax.model.staged import staged_model
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.mesh import AXES, BATCH_AXES, mesh_of
from deepseek_jax.parallel.pipeline.executor import pipeline
from deepseek_jax.parallel.pipeline.generators import one_rank
from deepseek_jax.parallel.pipeline.protocol import LossScales
from deepseek_jax.parallel.placement import KINDS
from deepseek_jax.parallel.sharding import BATCH_SPEC, partition_spec, sum_over
from deepseek_jax.parallel.vocabulary import ShardedVocabulary, WholeVocabulary, check_vocabulary
from deepseek_jax.tree import flatten, map_leaves

VOCAB, WIDTH, TOKENS = 52, 6, 74
EMBEDDING, HEAD = partition_spec(("vocab", "embed")), partition_spec(("embed", "vocab"))


def mesh(pipe: int, data: int = 1):
    return mesh_of(np.array(jax.devices()[: pipe * data]).reshape(pipe, data, 1, 1))


def assert_equal(got, wanted, what, tolerance=1e-12):
    """To `tolerance` of the largest element."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape, what
    assert np.abs(got - wanted).max(initial=0) <= tolerance * np.abs(wanted).max(initial=0), what


def equations(jaxpr):
    """Every equation of a program and of the programs in it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else (value,):
                inner = getattr(inner, "jaxpr", inner)  # a closed one
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


# --- lookup and cross entropy ---


def both_ends(vocabulary, chunk, embedding, head, shift, tokens, labels, weights):
    """A loss through both ends; the gradient of `shift` is that of the hidden states, the loss's cotangent is not 1."""
    hidden = jnp.tanh(3 * vocabulary.lookup(embedding, tokens)) + shift
    return 0.37 * vocabulary.cross_entropy_sum(hidden, head, labels, weights, chunk=chunk)


def whole(chunk, *arguments):
    """On one device: the loss, the loss without differentiation, the gradients."""
    loss = functools.partial(both_ends, WholeVocabulary(), chunk)
    return *jax.value_and_grad(loss, argnums=(0, 1, 2))(*arguments), loss(*arguments)


def sharded(on, chunk):
    """The same per rank of `pipe`: what must be equal along it has a leading dimension of its size."""

    def per_device(*arguments):
        arguments = to_varying(arguments, AXES)
        loss = functools.partial(both_ends, ShardedVocabulary(), chunk)
        value, (embedding, head, shift) = jax.value_and_grad(loss, argnums=(0, 1, 2))(*arguments)
        values = [sum_over(x, BATCH_AXES)[None] for x in (value, loss(*arguments))]
        shift = lax.psum(shift, ("node", "expert"))  # of size 1: nothing but the type
        return values[0], (sum_over(embedding, BATCH_AXES), sum_over(head, BATCH_AXES), shift[None]), values[1]

    per_rank = P("pipe")
    return jax.shard_map(
        per_device,
        mesh=on,
        in_specs=(EMBEDDING, HEAD, P("data"), P("data"), P("data"), P("data")),
        out_specs=(per_rank, (EMBEDDING, HEAD, P("pipe", "data")), per_rank),
    )


def cases():
    """(name, tokens, labels, weights): wherever tokens and labels lie, also where no weight is."""
    rng = np.random.default_rng(1)
    anywhere = [rng.integers(0, VOCAB, TOKENS) for _ in range(2)]
    last, first = (rng.integers(low, low + 13, TOKENS) for low in (39, 0))
    weights = rng.uniform(0.5, 2, TOKENS)
    some = np.where(np.arange(TOKENS) % 3 == 0, 0, weights)
    nowhere = np.where(some == 0, np.where(np.arange(TOKENS) % 2, -1, VOCAB + 5), anywhere[1])
    yield "anywhere", anywhere[0], anywhere[1], weights
    yield "labels in the last shard", anywhere[0], last, weights
    yield "tokens in the first shard, labels in the last", first, last, weights
    yield "all in the first shard", first, first, weights
    yield "one token, one label", np.full(TOKENS, 13), np.full(TOKENS, 12), weights
    yield "labels outside the vocabulary without weight", anywhere[0], nowhere, some
    yield "no weight on the second data rank", anywhere[0], anywhere[1], np.where(np.arange(TOKENS) < 37, weights, 0)


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize(("pipe", "data"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_loss_and_gradients_are_those_of_one_device(pipe, data, chunk):
    """Every rank has the whole loss, the whole gradient of hidden, and its share of the two others."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        shapes = ((VOCAB, WIDTH), (WIDTH, VOCAB), (TOKENS, WIDTH))
        arrays = [jnp.asarray(rng.normal(size=shape)) for shape in shapes]
        one, many = jax.jit(functools.partial(whole, chunk)), jax.jit(sharded(mesh(pipe, data), chunk))
        for name, tokens, labels, weights in cases():
            data_arrays = (jnp.asarray(tokens, jnp.int32), jnp.asarray(labels, jnp.int32), jnp.asarray(weights))
            loss, (embedding, head, hidden), alone = one(*arrays, *data_arrays)
            losses, gradients, alones = jax.block_until_ready(many(*arrays, *data_arrays))
            assert_equal(losses, np.full(pipe, loss), f"{name}: loss")
            assert_equal(alones, np.full(pipe, alone), f"{name}: loss without differentiation")
            assert_equal(gradients[0], embedding, f"{name}: embedding")
            assert_equal(gradients[1], head, f"{name}: head")
            assert_equal(gradients[2], np.broadcast_to(hidden, (pipe, *hidden.shape)), f"{name}: hidden")


def test_bfloat16_looks_up_exactly_and_sums_gradients_in_float32():
    """So that four ranks are as exact as one. (XLA's CPU backend sums in float32 anyway, so the program is read.)"""
    rng = np.random.default_rng(0)
    shapes = ((VOCAB, WIDTH), (WIDTH, VOCAB), (TOKENS, WIDTH))
    wide = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16).astype(jnp.float32) for shape in shapes]
    narrow = [x.astype(jnp.bfloat16) for x in wide]
    _, tokens, labels, weights = next(cases())
    data = [jnp.asarray(tokens, jnp.int32), jnp.asarray(labels, jnp.int32), jnp.asarray(weights, jnp.float32)]
    loss, gradients, _ = jax.jit(functools.partial(whole, 16))(*narrow, *data)
    losses, shard_gradients, _ = jax.jit(sharded(mesh(4), 16))(*narrow, *data)
    _, exact, _ = jax.jit(functools.partial(whole, 16))(*wide, *data)
    assert losses.dtype == jnp.float32
    assert_equal(losses, np.full(4, loss), "loss", tolerance=1e-5)
    shard_gradients = *shard_gradients[:2], shard_gradients[2][-1]
    for name, got, one, wanted in zip(("embedding", "head", "hidden"), shard_gradients, gradients, exact, strict=True):
        assert got.dtype == jnp.bfloat16, name
        error, error_of_one = (np.abs(np.asarray(x, np.float64) - wanted).max() for x in (got, one))
        assert error <= 1.5 * error_of_one, (name, error, error_of_one)

    def sums_of(f, *arguments):
        found = [e.invars[0].aval for e in equations(jax.make_jaxpr(f)(*arguments).jaxpr) if "psum" in e.primitive.name]
        return {(x.shape, x.dtype.name) for x in found}

    def lookup(weight, tokens):
        return ShardedVocabulary().lookup(weight, tokens)[None]

    lookup = jax.shard_map(lookup, mesh=mesh(4), in_specs=(EMBEDDING, P()), out_specs=P("pipe"))
    looked_up = lookup(narrow[0], data[0])
    np.testing.assert_array_equal(looked_up, np.broadcast_to(narrow[0][tokens], looked_up.shape))
    assert sums_of(lookup, narrow[0], data[0]) == {((TOKENS, WIDTH), "bfloat16")}, "exact: one rank's part is not zero"

    def hidden_gradient(head, hidden):
        loss = lambda x: ShardedVocabulary().cross_entropy_sum(x, head, *data[1:], chunk=16)  # noqa: E731
        return jax.grad(loss)(to_varying(hidden, "pipe"))[None]

    hidden_gradient = jax.shard_map(hidden_gradient, mesh=mesh(4), in_specs=(HEAD, P()), out_specs=P("pipe"))
    sums = sums_of(hidden_gradient, narrow[1], narrow[2])
    assert sums == {((16,), "float32"), ((TOKENS, WIDTH), "float32")}, "the joins of 16 tokens, and the gradient"


def test_arrays_that_do_not_vary_over_the_axis_are_refused():
    """The gradient of a cast within what is differentiated would be summed once more."""
    arguments = (jnp.ones((4, VOCAB)), jnp.ones((3, 4)), jnp.zeros(3, jnp.int32))

    def run(per_device):
        per_rank = jax.shard_map(per_device, mesh=mesh(2), in_specs=(HEAD, P(), P()), out_specs=P("pipe"))
        return jax.eval_shape(per_rank, *arguments)

    def cross_entropy(cast, head, hidden, labels):
        hidden = to_varying(hidden, "pipe") if cast else hidden
        return ShardedVocabulary().cross_entropy_sum(hidden, head, labels, jnp.ones(3))[None]

    run(functools.partial(cross_entropy, True))
    with pytest.raises(ValueError, match="hidden must vary over 'pipe'"):
        run(functools.partial(cross_entropy, False))
    with pytest.raises(ValueError, match="embedding must vary over 'pipe'"):
        run(lambda head, hidden, labels: ShardedVocabulary().lookup(hidden, labels))


def test_a_vocabulary_that_the_axis_does_not_divide_is_one_clear_line():
    check_vocabulary(129_280, 16)
    with pytest.raises(ConfigError, match=r"^model.vocab_size=129280 .* parallel.pipe=24.*model.vocab_size=129288 .*$"):
        check_vocabulary(129_280, 24)


# --- the whole model ---

CONFIG = small(vocab_size=2 * 53)  # no other dimension is 106 or 53


@functools.cache
def model(tied: bool) -> Transformer:
    return Transformer(dataclasses.replace(CONFIG, tie_embeddings=tied))


def values(tree, seed: int):
    """Arbitrary values of every parameter, layers stacked as `[layers, ...]`."""
    rng = np.random.default_rng(seed)
    return map_leaves(lambda like: jnp.asarray(0.1 * rng.normal(size=like.shape)), tree)


def run_of(model, vocabulary, per_device=lambda x: x):
    """`value_and_grad` of the whole model over two microbatches of two rows, layers the same on every rank."""
    staged = staged_model(model, compute_dtype=jnp.float64, vocabulary=vocabulary)
    run = pipeline(staged, one_rank(2), recompute="selective")

    def value_and_grad(params, state, batch):
        scales = LossScales(*(jnp.asarray(x, jnp.float64) for x in (0.02, 0.01, 0.1)))
        outputs, gradients = run.value_and_grad(*per_device((params, state, batch)), scales)
        return outputs, gradients, run.evaluate(*per_device((params, state, batch)), scales).loss

    return value_and_grad


def on_two_ranks(model, vocabulary, ends):
    """The same on `pipe` = 2, everything with a leading dimension of ranks, but gradients of what `ends` splits."""

    def split(name, spec):
        return partition_spec(spec.axes) if name in ends else None

    specs = {name: map_leaves(lambda s, n=name: split(n, s), t) for name, t in parameter_specs(model).items()}
    is_leaf = lambda x: x is None or isinstance(x, P)  # noqa: E731
    into = jax.tree.map(lambda spec: spec or P(), specs, is_leaf=is_leaf)
    out = jax.tree.map(lambda spec: spec or P("pipe"), specs, is_leaf=is_leaf)
    run = run_of(model, vocabulary, lambda x: to_varying(x, AXES))

    def per_rank(params, state, batch):
        outputs, gradients, evaluated = jax.tree.map(lambda x: sum_over(x, BATCH_AXES), run(params, state, batch))
        gradients = jax.tree.map(lambda spec, g: g if spec else g[None], specs, gradients, is_leaf=is_leaf)
        return *jax.tree.map(lambda x: x[None], (outputs, evaluated)), gradients

    return jax.shard_map(
        per_rank, mesh=mesh(2), in_specs=(into, P(), P(None, *BATCH_SPEC)), out_specs=(P("pipe"), P("pipe"), out)
    )


def problem(tied: bool):
    batch = packed(CONFIG, [[13], [5, 8], [4, 4], [3, 10]], length=12)
    batch = jax.tree.map(lambda x: jnp.asarray(x.reshape(2, 2, *x.shape[1:])), batch)
    params = values(abstract_values(model(tied)), 0)
    assert set(params) >= {"embedding", *KINDS}
    assert ("head" in params) != tied
    return params, values(abstract_values(model(tied), RouterBias), 1), batch


@pytest.mark.parametrize("tied", [False, True])
def test_the_whole_model_on_two_ranks_is_that_of_one_device(tied):
    """Embedding, layers, head and MTP; every rank has the whole loss and gradients, and its share of both ends'."""
    with jax.enable_x64(True):
        arguments = problem(tied)
        outputs, gradients, evaluated = compiled(run_of(model(tied), WholeVocabulary()), arguments)
        ranks = on_two_ranks(model(tied), ShardedVocabulary(), ("embedding", "head"))
        rank_outputs, rank_evaluated, rank_gradients = compiled(ranks, arguments)
    assert_equal(rank_evaluated, np.full(2, evaluated), "loss without differentiation")
    assert min(outputs.sums["loss_main"], outputs.sums["loss_mtp"]) > 100
    for (path, value), got in zip(jax.tree.leaves_with_path(outputs), jax.tree.leaves(rank_outputs), strict=True):
        exact = value.dtype.kind in "ib"
        assert_equal(got, np.stack([value] * 2), jax.tree_util.keystr(path), 0 if exact else 1e-12)
    rank_gradients = flatten(rank_gradients)
    assert np.abs(gradients["embedding"]["weight"]).max() > 0
    for name, value in flatten(gradients).items():
        value = value if name.split(".")[0] in ("embedding", "head") else np.broadcast_to(value, (2, *value.shape))
        assert_equal(rank_gradients[name], value, name, 1e-11)


def compiled(f, arguments):
    results = jax.jit(f).lower(*arguments).compile(compiler_options=QUICK)(*arguments)
    return jax.tree.map(np.asarray, results)


# --- what a device holds ---


def shapes_on_a_device(f, arguments) -> set[tuple[int, ...]]:
    """Shapes of all arrays of the per-device program, inside `shard_map`."""
    program = jax.make_jaxpr(f)(*arguments).jaxpr
    (mapped,) = (e for e in equations(program) if e.primitive.name == "shard_map")
    inside = mapped.params["jaxpr"]
    variables = [*inside.invars, *inside.constvars]
    for equation in equations(inside):
        variables += [*equation.invars, *equation.outvars]
    return {tuple(v.aval.shape) for v in variables if hasattr(v.aval, "shape")}


@pytest.mark.parametrize("tied", [False, True])
def test_no_array_of_a_device_has_the_whole_vocabulary(tied):
    """Neither logits nor a gradient of the head or of the embedding; the check finds them where nothing is split."""
    vocab, width = CONFIG.vocab_size, CONFIG.hidden_size
    with jax.enable_x64(True):
        arguments = problem(tied)
        shapes = shapes_on_a_device(on_two_ranks(model(tied), ShardedVocabulary(), ("embedding", "head")), arguments)
        unsplit = shapes_on_a_device(on_two_ranks(model(tied), WholeVocabulary(), ()), arguments)
    tokens = 24  # two rows of 12
    for size, found, absent in ((vocab // 2, shapes, vocab), (vocab, unsplit, vocab // 2)):
        assert {(tokens, size), (size, width), (width, size)} <= found, "logits and gradients are found where they are"
        assert not [shape for shape in found if absent in shape]
