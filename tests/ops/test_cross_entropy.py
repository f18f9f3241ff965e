"""`ops.cross_entropy`, its sum and `ops.vocab_partials`: exact, in shards or whole, without `[T, V]`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import ops


def problem(tokens, vocab, *, labels_below=None, width=6, dtype=jnp.float64):
    rng = np.random.default_rng(0)
    hidden, head, g = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((tokens, width), (width, vocab), (tokens,)))
    return hidden, head, jnp.asarray(rng.integers(0, labels_below or vocab, tokens), jnp.int32), g


def value_and_gradients(f, hidden, head, g):
    def loss(hidden, head):
        nll = f(hidden, head)
        return (nll * g).sum(), nll

    (_, nll), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(hidden, head)
    return nll, *gradients


def assert_equal(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("vocab_size", [None, 41])
@pytest.mark.parametrize(("tokens", "chunk"), [(77, 16), (77, None), (1, 4), (64, 64)])
def test_chunked_is_the_reference(tokens, chunk, vocab_size):
    with jax.enable_x64(True):
        hidden, head, labels, g = problem(tokens, 50, labels_below=41)

        def run(name):
            def f(hidden, head):
                return ops.cross_entropy(hidden, head, labels, vocab_size=vocab_size, chunk=chunk, implementation=name)

            return value_and_gradients(f, hidden, head, g)

        got = run("chunked")
        assert_equal(got, run("reference"))
        if vocab_size is not None:
            assert not np.asarray(got[2])[:, vocab_size:].any(), "padding columns get no gradient"


@pytest.mark.parametrize("vocab_size", [None, 41])
@pytest.mark.parametrize(("tokens", "chunk"), [(77, 16), (77, None), (1, 4), (64, 64)])
def test_sum_with_gradients_from_its_forward_pass_is_the_reference(tokens, chunk, vocab_size):
    """Also where the sum's cotangent is not 1, and where labels without weight are padding."""
    with jax.enable_x64(True):
        hidden, head, labels, weights = problem(tokens, 50, labels_below=41)
        weights, labels = weights.at[::5].set(0), labels.at[::5].set(49)

        def whole(hidden, head):
            nll = ops.cross_entropy(hidden, head, labels % 41, vocab_size=vocab_size, implementation="reference")
            return jnp.sin((nll * weights).sum())

        def chunked(hidden, head):
            return jnp.sin(ops.cross_entropy_sum(hidden, head, labels, weights, vocab_size=vocab_size, chunk=chunk))

        wanted, gradients = jax.jit(jax.value_and_grad(whole, argnums=(0, 1)))(hidden, head)
        got = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(hidden, head)
        assert_equal((got[0], *got[1]), (wanted, *gradients))
        assert_equal((jax.jit(chunked)(hidden, head),), (wanted,))


@pytest.mark.parametrize("policy", [(), ("cross_entropy_gradients",)])
def test_sum_under_recomputation_makes_logits_once_if_its_gradients_are_kept(policy):
    hidden, head, labels, weights = problem(32, 50, dtype=jnp.float32)
    keep = jax.checkpoint_policies.save_only_these_names(*policy)
    loss = jax.checkpoint(lambda h, w: ops.cross_entropy_sum(h, w, labels, weights, chunk=8), policy=keep)
    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(hidden, head).as_text()
    assert len(re.findall(r"dot_general.*->\s*tensor<8x50xf32>", program)) == (1 if policy else 2)


@pytest.mark.parametrize("shards", [2, 4])
def test_shards_of_the_vocabulary_equal_the_whole(shards):
    with jax.enable_x64(True):
        hidden, head, labels, g = problem(33, 48, labels_below=35)
        size = head.shape[1] // shards

        def joined(hidden, head):
            parts = []
            for start in range(0, head.shape[1], size):  # of four, the last shard is nothing but padding
                shard = head[:, start : start + size]
                parts.append(ops.vocab_partials(hidden, shard, labels, jnp.int32(start), vocab_size=35, chunk=8))
            tops, sums, label_logits = (jnp.stack(p) for p in zip(*parts, strict=True))
            top = jax.lax.stop_gradient(tops.max(0))
            return jnp.log((sums * jnp.exp(tops - top)).sum(0)) + top - label_logits.sum(0)

        def whole(hidden, head):
            return ops.cross_entropy(hidden, head, labels, vocab_size=35, implementation="reference")

        assert_equal(value_and_gradients(joined, hidden, head, g), value_and_gradients(whole, hidden, head, g))


def join_over_shards(top, total, label):
    """What `parallel.vocabulary` does over a mesh axis, here over a mapped one."""
    highest = jax.lax.pmax(top, "shards")
    return highest, *jax.lax.psum((total * jnp.exp(top - highest), label), "shards")


@pytest.mark.parametrize(("shards", "chunk"), [(1, 8), (2, 8), (4, None), (4, 33)])
def test_sums_of_shards_that_are_joined_equal_the_whole(shards, chunk):
    """Every shard gives the whole sum and its columns of the head's gradient; the parts of hidden's gradient add up.

    The last of four shards is nothing but padding; labels without weight are anywhere, also in no shard.
    """
    with jax.enable_x64(True):
        hidden, head, labels, weights = problem(33, 48, labels_below=35)
        offsets = jnp.arange(shards, dtype=jnp.int32) * (48 // shards)
        weights = weights.at[::5].set(0)
        anywhere = labels.at[::5].set(jnp.asarray([-1, 47, 48, 36, 0, 11, 12], jnp.int32))

        def of_shard(shard, offset):
            def loss(hidden, shard):
                total = ops.cross_entropy_sum(
                    hidden, shard, anywhere, weights, offset, join=join_over_shards, vocab_size=35, chunk=chunk
                )
                return jnp.sin(total)

            return loss(hidden, shard), jax.value_and_grad(loss, argnums=(0, 1))(hidden, shard)

        def whole(hidden, head):
            nll = ops.cross_entropy(hidden, head, labels, vocab_size=35, implementation="reference")
            return jnp.sin((nll * weights).sum())

        columns = head.reshape(head.shape[0], shards, -1).swapaxes(0, 1)
        alone, (losses, (dhidden, dhead)) = jax.jit(jax.vmap(of_shard, axis_name="shards"))(columns, offsets)
        wanted, gradients = jax.jit(jax.value_and_grad(whole, argnums=(0, 1)))(hidden, head)
        assert_equal((alone, losses), (jnp.full(shards, wanted),) * 2)
        assert_equal((dhidden.sum(0), dhead.swapaxes(0, 1).reshape(head.shape)), gradients)


def test_partials_are_what_their_names_say():
    with jax.enable_x64(True):
        hidden, head, labels, _ = problem(20, 30)
        top, total, label = ops.vocab_partials(hidden, head[:, 10:20], labels, 10, chunk=7)
        logits = np.asarray(hidden @ head)
        np.testing.assert_allclose(top, logits[:, 10:20].max(1), rtol=1e-12)
        np.testing.assert_allclose(total, np.exp(logits[:, 10:20] - np.asarray(top)[:, None]).sum(1), rtol=1e-12)
        inside = (labels >= 10) & (labels < 20)
        np.testing.assert_allclose(label, np.where(inside, logits[np.arange(20), labels], 0), rtol=1e-12)


def test_a_token_without_weight_gives_no_gradient():
    hidden, head, labels, g = problem(20, 30, dtype=jnp.float32)
    labels, g = labels.at[:5].set(-1), g.at[:5].set(0)
    _, dhidden, dhead = value_and_gradients(lambda h, w: ops.cross_entropy(h, w, labels), hidden, head, g)
    assert not np.asarray(dhidden)[:5].any()
    without = value_and_gradients(lambda h, w: ops.cross_entropy(h, w, labels[5:]), hidden[5:], head, g[5:])
    np.testing.assert_allclose(dhead, without[2], rtol=1e-4, atol=1e-5)


def test_bfloat16_gives_a_float32_loss():
    hidden, head, labels, g = problem(64, 50, dtype=jnp.bfloat16)
    nll, dhidden, dhead = value_and_gradients(lambda h, w: ops.cross_entropy(h, w, labels, chunk=16), hidden, head, g)
    assert (nll.dtype, dhidden.dtype, dhead.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    wanted = ops.cross_entropy(hidden, head, labels, implementation="reference")
    np.testing.assert_allclose(nll, wanted, rtol=1e-4, atol=1e-4)

    weights = g.astype(jnp.float32)
    loss = lambda h, w: ops.cross_entropy_sum(h, w, labels, weights, chunk=16)  # noqa: E731
    total, gradients = jax.value_and_grad(loss, argnums=(0, 1))(hidden, head)
    assert (total.dtype, *(x.dtype for x in gradients)) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_allclose(total, (wanted * weights).sum(), rtol=1e-4)
    for got, two_passes in zip(gradients, (dhidden, dhead), strict=True):
        scale = jnp.abs(two_passes).max().astype(jnp.float32)
        np.testing.assert_allclose(got.astype(jnp.float32), two_passes.astype(jnp.float32), atol=0.02 * float(scale))


@pytest.mark.parametrize("op", [ops.cross_entropy, ops.cross_entropy_sum])
@pytest.mark.parametrize("tokens", [4096, 4099])
def test_logits_never_exist_whole(op, tokens):
    vocab = 3001
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((tokens, 16), (16, vocab))]
    labels = jax.ShapeDtypeStruct((tokens,), jnp.int32)

    def one(h, w, labels):
        if op is ops.cross_entropy_sum:
            return op(h, w, labels, jnp.ones(tokens), chunk=256)
        return op(h, w, labels, chunk=256).sum()

    loss = jax.grad(one, argnums=(0, 1))
    program = jax.jit(loss).lower(*shapes, labels).compile()
    for shape in re.findall(r"\w\d+\[([\d,]+)\]", program.as_text()):
        assert np.prod([int(s) for s in shape.split(",")]) < tokens * vocab / 8, shape
    assert program.memory_analysis().temp_size_in_bytes < tokens * vocab * 4 / 2


def test_bad_arguments_say_what_would_be_valid():
    hidden, head, labels, _ = problem(8, 10, dtype=jnp.float32)
    with pytest.raises(ValueError, match="chunked, reference"):
        ops.cross_entropy(hidden, head, labels, implementation="fused")
    with pytest.raises(ValueError, match=r"labels \[T\]"):
        ops.cross_entropy(hidden, head, labels[:3])
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        ops.vocab_partials(hidden, head, labels, chunk=0)
    with pytest.raises(ValueError, match="a weight per label"):
        ops.cross_entropy_sum(hidden, head, labels, jnp.ones(3))
