"""Lining up rows for a hop, and the bytes that DeepSeek-V3's routing sends over each kind of link: no mesh needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import ConfigError, MoEConfig
from deepseek_jax.model.router import balanced_experts, select_experts
from deepseek_jax.parallel.dispatch import ExpertMesh, Hop, LocalDispatcher, RaggedHop, choose_dispatcher, dispatchers

V3 = MoEConfig()
TOKENS = 4096
BF16 = 2 * 7168
"""Bytes of a token or an output of V3's width."""


@pytest.fixture(scope="module")
def choices():
    """What V3's router chooses for random scores, int32 `[TOKENS, 8]`."""
    scores = jax.random.uniform(jax.random.key(0), (TOKENS, V3.num_experts))
    return select_experts(scores, None, V3)


def test_rows_are_lined_up_by_destination_in_the_order_of_their_tokens():
    """By hand: 4 devices of 2 experts, room for 2 rows each; rows 0, 2 and 3 go to device 0."""
    experts = jnp.asarray([[0, 1, 7], [2, 4, -1], [1, 5, 6], [0, -1, -1]], jnp.int32)
    hop = Hop("expert", size=4, experts=2, capacity=2)
    queue = hop.queue(experts)
    assert queue.counts.tolist() == [3, 1, 2, 2]
    first, second = hop.leg(queue, 0), hop.leg(queue, 1)
    assert first.rows.tolist() == [0, 2, 1, 4, 1, 2, 0, 2]  # 4 is an empty slot
    assert second.rows.tolist() == [3, *[4] * 7]
    assert [sorted(slots) for slots in first.slots.tolist()] == [[0, 6, 8], [2, 4, 8], [1, 5, 7], [8, 8, 8]]
    assert hop.left(queue, rounds=1) == 1
    assert hop.left(queue, rounds=2) == 0


@pytest.mark.parametrize("devices", [2, 64], ids=["fewer devices than choices", "more"])
def test_a_row_has_one_slot_per_destination_whatever_the_number_of_devices(choices, devices):
    hop = Hop("expert", devices, V3.num_experts // devices, capacity=TOKENS)
    queue = hop.queue(choices)
    wanted = np.zeros((TOKENS, devices), bool)
    np.put_along_axis(wanted, np.asarray(choices) // hop.experts, True, axis=1)
    np.testing.assert_array_equal(queue.counts, wanted.sum(axis=0))
    leg = hop.leg(queue)
    rows = np.asarray(leg.rows).reshape(devices, TOKENS)
    for device in range(devices):
        np.testing.assert_array_equal(rows[device][rows[device] < TOKENS], np.flatnonzero(wanted[:, device]))
    np.testing.assert_array_equal((np.asarray(leg.slots) < devices * TOKENS).sum(axis=1), wanted.sum(axis=1))


def test_a_token_of_v3_crosses_to_at_most_four_nodes(choices):
    """Section 3.2.2: out and back over the network at most 4 times 14,336 bytes in BF16, here and there half of that
    for FP8; and a node's devices get 2 experts of the token, less than the 3.2 that NVLink carries meanwhile.
    """
    (first, second) = dispatchers("two_hop", V3, ExpertMesh(8, 8), tokens=TOKENS, slack=1.5)[0].hops
    assert (first.size, first.experts, second.size, second.experts) == (8, 32, 8, 4)
    visits = first.queue(choices).position >= 0
    per_token = np.asarray(visits.sum(axis=1))
    assert per_token.max() == 4
    assert per_token.max() * BF16 == 57_344
    # What arrives at one node, and fans out there, if every node had these tokens.
    fanned = sum(
        int(second.queue(jnp.where(choices // 32 == node, choices % 32, -1)).counts.sum()) for node in range(8)
    )
    crossed = int(per_token.sum())
    assert 1.5 < fanned / crossed <= 2 < 3.2
    one_hop = dispatchers("all_to_all", V3, ExpertMesh(8, 8), tokens=TOKENS, slack=1.5)[0].hops[0]
    assert int(one_hop.queue(choices).counts.sum()) == fanned, "in one hop each of these crosses by itself"


def test_forced_balance_is_even_and_within_the_limit_of_nodes():
    experts = np.asarray(balanced_experts(TOKENS, V3))
    np.testing.assert_array_equal(np.bincount(experts.ravel(), minlength=256), TOKENS * 8 / 256)
    assert all(len(set(row)) == 8 for row in experts.tolist())
    assert {len(set(row)) for row in (experts // 32).tolist()} == {4}


# --- the ladder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["all_to_all", "two_hop", "ragged"])
def test_the_ladder_ends_with_room_for_any_routing_in_bounded_memory(name):
    """V3 on 64 devices: no setting's buffers are larger than three times those of balanced routing, but for slack."""
    ladder = dispatchers(name, V3, ExpertMesh(8, 8), tokens=TOKENS, slack=1.5)
    worst = ladder[-1]
    assert worst.rounds * worst.hops[0].capacity >= TOKENS
    sent = worst.hops[0].capacity
    for hop in worst.hops:
        assert hop.capacity >= sent
        assert hop.received == sent * hop.size
        sent = hop.received
    assert worst.pairs >= 4 * sent, "each of these rows may have all four experts of the device"
    for one in ladder:
        assert one.pairs <= 3 * TOKENS * 8 + 8
        assert all(hop.received <= 3.1 * TOKENS * 8 for hop in one.hops)
    demand = [np.array([*[hop.capacity * one.rounds for hop in one.hops], one.pairs * one.rounds]) for one in ladder]
    for one, need in zip(ladder, demand, strict=True):
        assert name == "ragged" or one.fits(need)
        assert not one.fits(need + 1)


def test_a_mesh_gets_the_dispatcher_that_its_devices_need():
    meshes = {(1, 1): "local", (1, 8): "all_to_all", (8, 1): "all_to_all", (2, 4): "two_hop"}
    assert {mesh: choose_dispatcher(None, ExpertMesh(*mesh)) for mesh in meshes} == meshes
    assert dispatchers(None, V3, ExpertMesh(), tokens=64, slack=1.5) == (LocalDispatcher(256),)
    (hop,) = dispatchers("ragged", V3, ExpertMesh(1, 8), tokens=64, slack=1.5)[0].hops
    assert isinstance(hop, RaggedHop)
    with pytest.raises(ConfigError, match="256 experts cannot be split evenly over 6 devices"):
        dispatchers(None, V3, ExpertMesh(1, 6), tokens=64, slack=1.5)
