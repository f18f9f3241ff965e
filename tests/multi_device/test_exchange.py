"""Dispatchers over several devices against the local one, the oracle, on the same tokens."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from deepseek_jax.compat import to_varying
from deepseek_jax.config import MoEConfig
from deepseek_jax.parallel.dispatch import NO_EXPERT, ExpertMesh, LocalDispatcher, dispatchers
from deepseek_jax.parallel.mesh import AXES, mesh_of

EXPERTS, CHOICES, TOKENS, WIDTH = 16, 4, 24, 8
MOE = MoEConfig(num_experts=EXPERTS, experts_per_token=CHOICES, expert_ffn_size=8, num_groups=4, groups_per_token=2)
MESHES = [(1, 8), (2, 4), (4, 2), (1, 2)]
SPLIT = ("node", "expert")


def routing(kind: str, tokens: int, seed: int = 0) -> np.ndarray:
    """Distinct choices int32 `[tokens, CHOICES]`; -1 where a token makes none."""
    rng = np.random.default_rng(seed)
    allowed = {
        "random": range(EXPERTS),
        "skewed": range(CHOICES),  # all on the first devices
        "empty": [0, 3, 5, 6, 11, 13],  # most experts, and whole devices, get nothing
    }[kind]
    chosen = np.stack([rng.permutation(list(allowed))[:CHOICES] for _ in range(tokens)]).astype(np.int32)
    chosen[rng.random(tokens) < 0.2] = NO_EXPERT
    return chosen


@functools.cache
def on_devices(node: int, expert: int, name: str, rung: int):
    """`x, experts, weights, matrices -> outputs, gradients, traffic` on a mesh; None where the ladder ends before."""
    size = node * expert
    ladder = dispatchers(name, MOE, ExpertMesh(node, expert), tokens=TOKENS, slack=1.0, alignment=4)
    if rung >= len(ladder):
        return None
    dispatcher = ladder[rung]
    mesh = mesh_of(np.array(jax.devices()[:size]).reshape(1, 1, node, expert))

    def layer(x, weights, matrices, experts):
        plans, traffic = dispatcher.plan(experts)
        y = jnp.zeros_like(x)
        for plan in plans:
            y += combined(dispatcher, x, weights, matrices, plan)
        return y, traffic

    def device(x, experts, weights, matrices, cotangent):
        x, experts, weights, matrices, cotangent = to_varying((x, experts, weights, matrices, cotangent), SPLIT)

        def loss(*differentiable):
            y, traffic = layer(*differentiable, experts)
            return (y * cotangent).sum(), (y, traffic)

        gradients, (y, traffic) = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, weights, matrices)
        return y, gradients, jax.tree.map(lambda leaf: leaf.reshape(1, -1), traffic)

    split = jax.P(SPLIT)
    mapped = jax.shard_map(device, mesh=mesh, in_specs=(split,) * 5, out_specs=(split, (split,) * 3, split))
    return jax.jit(mapped), dispatcher


def combined(dispatcher, x, weights, matrices, plan):
    """One round with an expert that multiplies by its matrix and the row's weight."""
    inputs = dispatcher.dispatch(x, weights, plan)
    starts = (inputs.group_sizes + dispatcher.alignment - 1) // dispatcher.alignment * dispatcher.alignment
    ends = jnp.cumsum(starts)
    owner = jnp.minimum((jnp.arange(inputs.rows.shape[0])[:, None] >= ends).sum(axis=1), matrices.shape[0] - 1)
    outputs = jnp.einsum("md,mde->me", inputs.rows, matrices[owner]) * inputs.weights[:, None]
    return dispatcher.combine(outputs, inputs.handle)


def oracle(x, experts, weights, matrices, cotangent):
    dispatcher = LocalDispatcher(EXPERTS)

    def loss(x, weights, matrices):
        (plan,), _ = dispatcher.plan(experts)
        y = combined(dispatcher, x, weights, matrices, plan)
        return (y * cotangent).sum(), y

    gradients, y = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, weights, matrices)
    return y, gradients


def case(kind: str, devices: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    tokens = TOKENS * devices
    return (
        rng.normal(size=(tokens, WIDTH)),
        routing(kind, tokens, seed),
        rng.random((tokens, CHOICES)),
        rng.normal(size=(EXPERTS, WIDTH, WIDTH)),
        rng.normal(size=(tokens, WIDTH)),
    )


@pytest.mark.parametrize("name", ["all_to_all", "two_hop"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_outputs_and_gradients_equal_those_of_one_device(mesh, name):
    """Every setting with room gives float64 results of one device to 1e-12; one without says so. The last has room."""
    seen_loss = False
    with jax.enable_x64(True):
        for kind in ("random", "skewed", "empty"):
            arguments = case(kind, mesh[0] * mesh[1])
            y, gradients = oracle(*map(jnp.asarray, arguments))
            for rung in range(8):
                if (found := on_devices(*mesh, name, rung)) is None:
                    break
                got, got_gradients, traffic = found[0](*arguments)
                lost = int(traffic.lost.sum())
                seen_loss |= lost > 0
                if not lost:
                    np.testing.assert_allclose(got, y, rtol=1e-12, atol=1e-12)
                    jax.tree.map(
                        functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), got_gradients, gradients
                    )
            assert lost == 0, f"{kind}: the last setting of the ladder loses {lost} rows"
            assert int(traffic.received.sum()) == (arguments[1] >= 0).sum()
    assert seen_loss or mesh[0] * mesh[1] == 2, "no setting was ever too small, so nothing was learnt of overflow"


# --- packed rows ------------------------------------------------------------------------------------------------------


def packed_exchange(operand, output, from_row, send_rows, to_row, receive_rows, *, axis_name):
    """What `lax.ragged_all_to_all` means, in collectives that a CPU has; it checks what each side says of the other."""
    tables = [jax.lax.all_gather(x, axis_name) for x in (operand, from_row, send_rows, to_row, receive_rows)]
    operands, from_rows, sends, to_rows, receives = tables
    me = jax.lax.axis_index(axis_name)
    rows = jnp.arange(output.shape[0])
    for device in range(sends.shape[0]):
        begin, count = to_rows[device, me], sends[device, me]
        count = jnp.where(receives[me, device] == count, count, -1_000)  # a disagreement loses the rows
        index = from_rows[device, me] + rows - begin
        mine = (rows >= begin) & (rows < begin + count)
        taken = jnp.take(operands[device], jnp.clip(index, 0, operand.shape[0] - 1), axis=0)
        output = jnp.where(mine.reshape(-1, *(1,) * (output.ndim - 1)), taken, output)
    return output


@pytest.mark.parametrize("mesh", [(1, 8), (2, 2)], ids=str)
def test_packed_rows_equal_those_of_one_device(monkeypatch, mesh):
    """The tables of `RaggedHop`, with the exchange itself emulated: XLA's CPU backend has none."""
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", packed_exchange)
    lost = []
    with jax.enable_x64(True):
        for kind in ("random", "skewed", "empty"):
            arguments = case(kind, mesh[0] * mesh[1])
            y, gradients = oracle(*map(jnp.asarray, arguments))
            for rung in range(8):
                if (found := on_devices(*mesh, "ragged", rung)) is None:
                    break
                got, got_gradients, traffic = found[0](*arguments)
                lost.append(int(traffic.lost.sum()))
                if not lost[-1]:
                    np.testing.assert_allclose(got, y, rtol=1e-12, atol=1e-12)
                    jax.tree.map(
                        functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), got_gradients, gradients
                    )
            assert lost[-1] == 0
    assert any(lost)


def test_packed_rows_lower_to_a_ragged_all_to_all_on_a_gpu():
    """Forward and backward, for 64 devices of 8 nodes, of which none is here."""
    moe = MoEConfig(expert_ffn_size=64)
    (dispatcher, *_) = dispatchers("ragged", moe, ExpertMesh(8, 8), tokens=512, slack=1.5, wire=jnp.bfloat16)
    mesh = jax.sharding.AbstractMesh((1, 1, 8, 8), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)

    def device(x, experts, weights):
        x, experts, weights = to_varying((x, experts, weights), SPLIT)

        def loss(x, weights):
            (plan,), _ = dispatcher.plan(experts)
            inputs = dispatcher.dispatch(x, weights, plan)
            return (dispatcher.combine(inputs.rows * inputs.weights[:, None].astype(x.dtype), inputs.handle) ** 2).sum()

        return jax.grad(loss, argnums=(0, 1))(x, weights)

    split = jax.P(SPLIT)
    mapped = jax.jit(jax.shard_map(device, mesh=mesh, in_specs=(split,) * 3, out_specs=(split, split)))
    tokens = 64 * 512
    shapes = [((tokens, 128), jnp.bfloat16), ((tokens, 8), jnp.int32), ((tokens, 8), jnp.float32)]
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, split)) for shape, dtype in shapes
    ]
    text = mapped.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    # Choices, rows and weights out, outputs back; the gradient of outputs out, those of rows and weights back.
    assert text.count("ragged_all_to_all") == 7


# --- what every routing must keep -------------------------------------------------------------------------------------


@st.composite
def routings(draw):
    """Choices of 4 tokens on each of 8 devices, within a limit of two groups of four, as a router makes them."""
    rows = []
    for _ in range(8 * 4):
        groups = draw(st.permutations(range(4)))[:2]
        members = [4 * g + m for g in groups for m in range(4)]
        rows.append(draw(st.permutations(members))[:CHOICES] if draw(st.integers(0, 9)) else [NO_EXPERT] * CHOICES)
    return np.array(rows, np.int32)


@functools.cache
def there_and_back(name: str):
    """`x, experts -> (x there and back with weights of one, what each device computed), traffic` on 4 nodes of 2."""
    *_, dispatcher = dispatchers(name, MOE, ExpertMesh(4, 2), tokens=4, slack=1.0)
    mesh = mesh_of(np.array(jax.devices()).reshape(1, 1, 4, 2))

    def device(x, experts):
        x, experts = to_varying((x, experts), SPLIT)
        plans, traffic = dispatcher.plan(experts)
        y, seen = jnp.zeros_like(x), jnp.zeros(32 * EXPERTS, jnp.int32)
        for plan in plans:
            inputs = dispatcher.dispatch(x, jnp.ones(experts.shape, x.dtype), plan)
            y += dispatcher.combine(inputs.rows * inputs.weights[:, None], inputs.handle)
            group = (jnp.arange(inputs.rows.shape[0])[:, None] >= jnp.cumsum(inputs.group_sizes)).sum(axis=1)
            expert = jax.lax.axis_index(SPLIT) * (EXPERTS // 8) + group
            token = inputs.rows[:, 0].astype(jnp.int32) - 1  # tokens are numbered from 1 in their first column
            index = jnp.where(group < EXPERTS // 8, token * EXPERTS + expert, seen.size)
            seen = seen.at[index].add(1, mode="drop")
        traffic = jax.tree.map(lambda leaf: leaf.reshape(1, -1), traffic)
        return y, seen[None], traffic

    split = jax.P(SPLIT)
    return jax.jit(jax.shard_map(device, mesh=mesh, in_specs=(split, split), out_specs=(split, split, split)))


@settings(max_examples=25, deadline=None)
@given(experts=routings(), name=st.sampled_from(["all_to_all", "two_hop"]))
def test_no_token_is_lost_and_none_computed_twice(experts, name):
    """Dispatch, then combine with unit weights, is K times the input, and each expert sees each of its tokens once."""
    tokens = np.arange(1.0, 33.0, dtype=np.float32)
    x = np.stack([tokens, 2 * tokens], axis=1)
    y, seen, traffic = there_and_back(name)(x, experts)
    np.testing.assert_array_equal(y, (experts >= 0).sum(axis=1, keepdims=True) * x)
    wanted = np.zeros((32, EXPERTS), int)
    for token, chosen in enumerate(experts):
        wanted[token, chosen[chosen >= 0]] = 1
    np.testing.assert_array_equal(np.asarray(seen).sum(axis=0).reshape(32, EXPERTS), wanted)
    assert int(traffic.lost.sum()) == 0
    # Crossings between nodes: each token once to each other node that has an expert of it, here at most two of four.
    node = np.repeat(np.arange(4), 8)
    visited = np.stack([wanted[:, 4 * n : 4 * n + 4].any(axis=1) for n in range(4)], axis=1)
    visited[np.arange(32), node] = False
    if name == "two_hop":
        assert int(traffic.crossed[:, 0].sum()) == visited.sum()
        assert np.asarray(traffic.crossed)[:, 0].max() <= 2 * 4, "four tokens of a device, to two nodes each"
