"""cuDNN's attention: what it takes on which GPU, what its backward pass keeps, and that it is the reference."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from deepseek_jax import ops
from deepseek_jax.ops import attention_cudnn
from tests.ops.test_attention import inputs, value_and_gradients

HOPPER, BLACKWELL, AMPERE, ROCM = "9.0", "10.0", "8.0", "gfx942"
WIDE = jax.ShapeDtypeStruct((2, 256, 4, 192), jnp.bfloat16)
NARROW = jax.ShapeDtypeStruct((2, 256, 4, 128), jnp.bfloat16)


@pytest.fixture
def gpu(monkeypatch):
    """Makes the default device look like a GPU of a compute capability."""

    def set_capability(capability):
        device = types.SimpleNamespace(compute_capability=capability, device_kind=f"a GPU of {capability}")
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "devices", lambda: [device])

    return set_capability


@pytest.fixture
def traceable(monkeypatch):
    """Tracing and lowering ask the local device for its generation and its cuDNN; this machine may have neither."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)


def test_off_a_gpu_it_says_why():
    q, k, v, _, _ = inputs(8, dtype=jnp.bfloat16)
    if jax.default_backend() == "gpu":
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        ops.attention(q, k, v, scale=1.0, implementation="cudnn")


@pytest.mark.parametrize(
    ("capability", "q", "v", "reason"),
    [
        (HOPPER, WIDE, NARROW, None),
        (HOPPER, WIDE, WIDE, None),
        (BLACKWELL, NARROW, NARROW, None),
        # Values are padded to the queries' width, and Blackwell has no backward pass for equal heads of 192.
        (BLACKWELL, WIDE, NARROW, "heads up to 128 wide on a GPU of 10.0, not 192"),
        ("12.1", WIDE, NARROW, "up to 128 wide"),
        (AMPERE, NARROW, NARROW, "needs Hopper or newer"),
        (ROCM, NARROW, NARROW, "needs an NVIDIA GPU, and the default device is a GPU of gfx942"),
        (None, NARROW, NARROW, "needs an NVIDIA GPU"),
    ],
)
def test_what_each_gpu_takes(gpu, capability, q, v, reason):
    gpu(capability)
    obstacle = attention_cudnn.obstacle(q, q, v, None)
    assert obstacle is None if reason is None else reason in obstacle


def test_it_states_what_arrays_it_does_not_take():
    q, k, v, _, segments = inputs(8, qk=8, value=8, dtype=jnp.bfloat16)
    assert attention_cudnn.shape_obstacle(q, k, v, None) is None
    assert "segment" in attention_cudnn.shape_obstacle(q, k, v, segments)
    assert "float32" in attention_cudnn.shape_obstacle(*(x.astype(jnp.float32) for x in (q, k, v)), None)
    assert "multiple of 8" in attention_cudnn.shape_obstacle(q[..., :5], k[..., :5], v[..., :5], None)


@pytest.mark.parametrize(("capability", "chosen"), [(HOPPER, "cudnn"), (BLACKWELL, "blockwise"), (ROCM, "blockwise")])
def test_none_chooses_cudnn_where_nothing_speaks_against_it(gpu, monkeypatch, capability, chosen):
    gpu(capability)
    monkeypatch.setattr(attention_cudnn, "attention", lambda q, k, v, *, scale: jnp.full_like(v, 7))
    q, k, v, _, _ = inputs(8, qk=192, value=128, dtype=jnp.bfloat16)
    out = ops.attention(q, k, v, scale=0.1)
    assert bool((out == 7).all()) == (chosen == "cudnn")


def loss(q, k, v):
    return attention_cudnn.attention(q, k, v, scale=0.1).astype(jnp.float32).sum()


def test_it_lowers_for_cuda_with_unequal_heads(traceable):
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    text = gradient.trace(WIDE, WIDE, NARROW).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in text
    assert "__cudnn$fmhaSoftmaxBackward" in text


def equations(jaxpr):
    """Every equation of a jaxpr and of those within it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize(("names", "forward_passes"), [(("attention_out", "attention_lse"), 1), ((), 2)])
def test_selective_recomputation_runs_it_once(traceable, names, forward_passes):
    """Of what is kept, the output is as narrow as the values are; queries, keys and values are made again."""
    policy = jax.checkpoint_policies.save_only_these_names(*names)

    def layer(q, k, v):
        return attention_cudnn.attention(q * 2, k * 2, v * 2, scale=0.1)

    def layer_loss(*arrays):
        return jax.checkpoint(layer, policy=policy, prevent_cse=False)(*arrays).astype(jnp.float32).sum()

    jaxpr = jax.make_jaxpr(jax.grad(layer_loss, argnums=(0, 1, 2)))(WIDE, WIDE, NARROW).jaxpr
    found = [e.primitive.name for e in equations(jaxpr)]
    assert found.count("dot_product_attention_fwd_wrapper") == forward_passes
    assert found.count("dot_product_attention_bwd_wrapper") == 1
    (again,) = (e for e in jaxpr.eqns if e.primitive.name == "remat2")
    given = sorted((v.aval.dtype.name, v.aval.shape[-1]) for v in again.invars)
    kept = [("bfloat16", 128), ("float32", 256)] if names else []
    assert given == sorted([("bfloat16", 192), ("bfloat16", 192), ("bfloat16", 128), ("bfloat16", 128), *kept])


def test_its_gradients_are_those_of_the_reference(monkeypatch):
    """With jax's own attention in cuDNN's place: padding and the named residuals change nothing."""
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **k: plain(*a, **k | {"implementation": "xla"}))
    q, k, v, g, _ = inputs(40, dtype=jnp.float32)

    def of_padded(q, k, v):
        out = attention_cudnn.attention(q, k, v, scale=0.4)
        return (out * g).sum(), out

    (_, out), gradients = jax.value_and_grad(of_padded, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    wanted = value_and_gradients("reference", q, k, v, g, None)
    for a, b in zip((out, *gradients), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_it_is_the_reference():
    q, k, v, g, _ = inputs(256, heads=4, qk=192, value=128, dtype=jnp.bfloat16)
    got = value_and_gradients("cudnn", q * 0.1, k, v, g, None)
    wanted = value_and_gradients("reference", *(x.astype(jnp.float32) for x in (q * 0.1, k, v, g)), None)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.05 * float(jnp.abs(b).max()))
