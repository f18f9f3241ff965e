"""Expert placement: the published example, what every plan keeps, what it gains, and clear words for bad input."""

from __future__ import annotations

import json

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from deepseek_jax.config import ConfigError
from deepseek_jax.planning.expert_placement import (
    ExpertPlacement,
    contiguous_placement,
    is_hierarchical,
    plan_placement,
)

LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PUBLISHED = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


@pytest.fixture(scope="module")
def published() -> ExpertPlacement:
    return plan_placement(LOADS, 16, devices=8, nodes=2, groups=4)


def _devices(placement: ExpertPlacement) -> np.ndarray:
    """Experts `[layers, devices, slots]`."""
    table = placement.physical_to_logical
    return table.reshape(placement.num_layers, placement.num_devices, -1)


def _eplb_pack(loads, packs):
    """The published greedy packing: sorted by load, into the lightest pack with room."""
    size = len(loads) // packs
    if size == 1:
        return [[item] for item in range(packs)]
    packed, total = [[] for _ in range(packs)], [0.0] * packs
    for item in np.argsort(-loads, kind="stable"):
        pack = min((p for p in range(packs) if len(packed[p]) < size), key=total.__getitem__)
        packed[pack].append(item)
        total[pack] += loads[item]
    return packed


def _eplb(loads, replicas, devices, nodes, groups):
    """The published algorithm for one layer, which may put an expert twice on a device."""
    if groups % nodes:
        nodes = groups = 1
    members, slots = np.arange(len(loads)).reshape(groups, -1), []
    for packed in _eplb_pack(loads[members].sum(axis=1), nodes):
        experts = members[packed].ravel()
        counts, copies = np.ones(len(experts)), list(range(len(experts)))
        while len(copies) < replicas // nodes:
            copies.append(int(np.argmax(loads[experts] / counts)))
            counts[copies[-1]] += 1
        for device in _eplb_pack((loads[experts] / counts)[copies], devices // nodes):
            slots += [int(experts[copies[item]]) for item in device]
    return slots


@st.composite
def problems(draw, *, redundant: bool = True):
    """Loads and the numbers of a plan; the loads are few enough to tie, be zero, and differ a thousandfold."""
    nodes, per_node = draw(st.sampled_from([(1, 1), (1, 2), (1, 4), (1, 5), (2, 1), (2, 3), (3, 2)]))
    devices = nodes * per_node
    groups = draw(st.sampled_from([1, 2, 4, 6]))
    experts = groups * draw(st.integers(1, 4))
    if not redundant:
        experts *= devices
    on_node = experts // nodes if is_hierarchical(groups, nodes) else experts
    fewest = -(-experts // devices)
    slots = draw(st.integers(fewest, max(fewest, on_node))) if redundant else fewest
    load = st.one_of(st.integers(0, 5), st.sampled_from([10, 100, 1000]))
    loads = draw(st.lists(st.lists(load, min_size=experts, max_size=experts), min_size=1, max_size=2))
    return np.array(loads), {"replicas": slots * devices, "devices": devices, "nodes": nodes, "groups": groups}


def test_the_published_example_comes_out_exactly(published):
    """EPLB's worked example: 12 experts in 4 groups, 16 replicas, 2 nodes, 8 devices."""
    assert published.physical_to_logical.tolist() == PUBLISHED
    assert published.replica_counts.tolist() == [
        [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1],
        [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1],
    ]
    slots = published.logical_to_physical
    assert slots.shape == (2, 12, 2)
    assert slots[0, 5].tolist() == [0, 2]
    assert slots[0, 6].tolist() == [1, -1]
    # Device 0 holds half of expert 5 and all of expert 6, device 4 half of expert 10 and all of expert 9.
    load = published.device_load(LOADS)
    assert load.shape == (2, 8)
    assert load[0, 0] == 165 / 2 + 39
    assert load[0, 4] == 183 / 2 + 56


@settings(max_examples=300, deadline=None)
@given(problem=problems())
def test_every_plan_keeps_the_rules(problem):
    """Every expert has a slot and no device has it twice, devices have equally many, nothing of the load is lost."""
    loads, numbers = problem
    placement = plan_placement(loads, **numbers)
    layers, experts = loads.shape
    devices, slots = numbers["devices"], numbers["replicas"] // numbers["devices"]
    held = _devices(placement)
    assert held.shape == (layers, devices, slots)
    assert all(len(set(device)) == slots for layer in held.tolist() for device in layer)
    counts = placement.replica_counts
    assert counts.min() >= 1
    np.testing.assert_array_equal(counts.sum(axis=1), numbers["replicas"])
    np.testing.assert_allclose(placement.device_load(loads).sum(axis=1), loads.sum(axis=1))
    for layer, expert in np.ndindex(layers, experts):
        slots_of = placement.logical_to_physical[layer, expert]
        expected = [s for s, e in enumerate(placement.physical_to_logical[layer]) if e == expert]
        assert [s for s in slots_of.tolist() if s >= 0] == expected
        assert len(expected) == counts[layer, expert]
    if is_hierarchical(numbers["groups"], numbers["nodes"]):
        # Each group of experts is on one node, and every node has equally many groups.
        groups = held.reshape(layers, numbers["nodes"], -1) // (experts // numbers["groups"])
        for layer in groups.tolist():
            sets = [set(node) for node in layer]
            assert {len(groups) for groups in sets} == {numbers["groups"] // numbers["nodes"]}
            assert len(set.union(*sets)) == numbers["groups"]
    np.testing.assert_array_equal(plan_placement(loads, **numbers).physical_to_logical, placement.physical_to_logical)


@settings(max_examples=300, deadline=None)
@given(problem=problems())
def test_a_plan_is_the_published_one_wherever_that_holds_no_expert_twice_on_a_device(problem):
    loads, numbers = problem
    placement = plan_placement(loads, **numbers)
    for layer, row in enumerate(loads):
        table = np.array(_eplb(row, **numbers))
        devices = table.reshape(numbers["devices"], -1).tolist()
        if all(len(set(device)) == len(device) for device in devices):
            np.testing.assert_array_equal(placement.physical_to_logical[layer], table)


def test_no_device_gets_the_second_copy_of_an_expert():
    """The published planner gives expert 0 three replicas on two devices, and one of them two thirds of its load."""
    loads = np.array([60, 5, 4, 3])
    table = _eplb(loads, 6, 2, 1, 1)
    assert table.count(0) == 3
    placement = plan_placement([loads], 6, devices=2)
    assert placement.replica_counts.tolist() == [[2, 2, 1, 1]]
    assert [sorted(device) for device in _devices(placement)[0].tolist()] == [[0, 1, 2], [0, 1, 3]]
    assert placement.device_load([loads]).max() == 60 / 2 + 5 / 2 + 4


def test_an_item_is_exchanged_where_only_devices_with_its_expert_have_room():
    """Four replicas of load 2: experts 0 and 2 fill device 0, and both copies of expert 1 would be left to device 1."""
    loads = np.array([2, 4, 2])
    assert _eplb(loads, 4, 2, 1, 1) == [0, 2, 1, 1]
    placement = plan_placement([loads], 4, devices=2)
    assert placement.physical_to_logical.tolist() == [[1, 2, 1, 0]]
    assert placement.device_load([loads]).tolist() == [[4, 4]]


@settings(max_examples=300, deadline=None)
@given(problem=problems(redundant=False))
def test_without_redundant_experts_devices_differ_by_one_expert_at_most(problem):
    """Of greedy packing into packs of equal size, items in falling order.

    Let p be the heavier pack. When its j-th item came, p was the lightest with room: either the other pack was full, of
    items no lighter, or its load was that of p's first j - 1 items at least. So p without its first item weighs no more
    than the other pack.
    """
    loads, numbers = problem
    nodes = numbers["nodes"] if is_hierarchical(numbers["groups"], numbers["nodes"]) else 1
    load = plan_placement(loads, **numbers).device_load(loads).reshape(len(loads), nodes, -1)
    spread = (load.max(axis=2) - load.min(axis=2)).max(axis=1)
    assert (spread <= loads.max(axis=1)).all()


def test_a_plan_is_not_always_better_than_none():
    """Greedy packing is a heuristic: 3 + 3 against 2 + 2 + 2 is even, and it makes 3 + 2 + 2 of it."""
    loads = [[3, 3, 0, 2, 2, 2]]
    assert contiguous_placement(1, 6, 2).device_load(loads).tolist() == [[6, 6]]
    assert plan_placement(loads, 6, devices=2).device_load(loads).tolist() == [[7, 5]]


def test_groups_that_do_not_divide_among_nodes_are_planned_globally():
    """Three groups on two nodes: the same plan as for one node, over all devices."""
    assert is_hierarchical(4, 2)
    assert not is_hierarchical(3, 2)
    table = plan_placement(LOADS, 16, devices=8, nodes=2, groups=3).physical_to_logical
    np.testing.assert_array_equal(table, plan_placement(LOADS, 16, devices=8).physical_to_logical)
    assert (table != PUBLISHED).any()


def test_ties_go_to_the_lower_index():
    assert plan_placement(np.ones((1, 4)), 6, devices=2).physical_to_logical.tolist() == [[2, 0, 1, 3, 1, 0]]
    assert plan_placement(np.zeros((1, 4)), 4, devices=2).physical_to_logical.tolist() == [[0, 1, 2, 3]]


def test_more_replicas_even_out_what_one_expert_takes():
    """Half of the load on one of 8 experts: 4 devices get it evenly once it has a replica on each."""
    loads = np.array([[70, 10, 10, 10, 10, 10, 10, 10]])
    before = contiguous_placement(1, 8, 4).device_load(loads)
    after = plan_placement(loads, 12, devices=4)
    assert before.max() == 80
    assert after.replica_counts[0, 0] == 4
    assert after.device_load(loads).max() == 70 / 4 + 20


def test_moved_slots_are_those_whose_device_lacked_the_expert():
    """The order within a device moves nothing; a new replica does."""
    before = contiguous_placement(1, 4, 2)
    assert before.moved_from(before).tolist() == [0]
    assert ExpertPlacement(np.array([[1, 0, 3, 2]]), 4, 2).moved_from(before).tolist() == [0]
    assert ExpertPlacement(np.array([[0, 2, 1, 3]]), 4, 2).moved_from(before).tolist() == [2]
    assert ExpertPlacement(np.array([[0, 1, 2, 3, 2, 0]]), 4, 2).moved_from(before).tolist() == [2]
    for other, difference in (
        (contiguous_placement(2, 4, 2), "2 layers, this one 1"),
        (contiguous_placement(1, 8, 2), "8 experts, this one 4"),
        (contiguous_placement(1, 4, 4), "4 devices, this one 2"),
    ):
        with pytest.raises(ConfigError, match=f"the earlier placement has {difference}"):
            before.moved_from(other)


def test_the_text_shows_devices_and_nodes(published):
    first, second = published.text(["layer 4", "MTP 1"]).splitlines()
    assert first == "layer 4:  5  6 |  5  7 |  8  4 |  3  4 || 10  9 | 10  2 |  0  1 | 11  1"
    assert second.startswith("MTP 1  :  7 10 |")
    assert published.text().startswith("row 0: ")


def test_a_placement_is_written_and_read_as_json(published):
    document = json.loads(json.dumps(published.to_dict()))
    assert document["physical_to_logical"] == PUBLISHED
    assert document["replica_counts"] == published.replica_counts.tolist()
    assert document["logical_to_physical"] == published.logical_to_physical.tolist()
    again = ExpertPlacement.from_dict(document | {"run": "mine"})
    np.testing.assert_array_equal(again.physical_to_logical, PUBLISHED)
    assert (again.num_experts, again.num_devices, again.num_nodes) == (12, 8, 2)
    with pytest.raises(ValueError, match="read-only"):
        again.physical_to_logical[0, 0] = 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"physical_to_logical": [[0, 1], [0]]}, "rows of one length"),
        ({"physical_to_logical": [[0.5, 1]]}, r"whole numbers \[layers, replicas\], not float64"),
        ({"physical_to_logical": [[0, 2, 1, 3]]}, "names experts 0 to 2; this one has others"),
        ({"physical_to_logical": [[0, -1, 1, 2]]}, "names experts 0 to 2; this one has others"),
        ({"physical_to_logical": [[0, 1, 1, 0]]}, "row 0 of this one lacks expert 2"),
        ({"physical_to_logical": [[0, 0, 1, 2]]}, "in row 0 of this placement device 0 holds expert 0 2 times"),
        ({"physical_to_logical": [[0, 1, 2]]}, "3 replicas do not divide among 2 devices; 4 would"),
        ({"num_devices": "2"}, "num_devices of a placement must be a whole number, not '2'"),
        ({"num_nodes": True}, "num_nodes of a placement must be a whole number, not True"),
    ],
)
def test_a_broken_placement_is_one_line(change, message):
    document = {"physical_to_logical": [[0, 1, 2, 0]], "num_experts": 3, "num_devices": 2, "num_nodes": 1}
    ExpertPlacement.from_dict(document)
    with pytest.raises(ConfigError, match=message) as error:
        ExpertPlacement.from_dict(document | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("document", [[1], {}, {"num_experts": 3, "num_devices": 1, "num_nodes": 1}])
def test_a_document_that_is_no_placement_is_one_line(document):
    with pytest.raises(ConfigError, match="a placement in JSON is an object with num_experts, num_devices, num_nodes"):
        ExpertPlacement.from_dict(document)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loads": [1, 2, 3, 4]}, r"loads must be \[layers, experts\], not of shape \(4,\)"),
        ({"loads": [[]]}, r"loads must be \[layers, experts\], not of shape \(1, 0\)"),
        ({"loads": [[1, 2], [3]]}, "rows of one length"),
        ({"loads": [[1, 2, "many", 4]]}, "loads must be numbers"),
        ({"loads": [[1, 2, 3, 4], [1, float("nan"), 3, 4]]}, "finite and not negative; row 1, expert 1 has nan"),
        ({"loads": [[1, 2, float("inf"), 4]]}, "finite and not negative; row 0, expert 2 has inf"),
        ({"loads": [[1, 2, 3, -4]]}, "finite and not negative; row 0, expert 3 has -4"),
        ({"replicas": 2}, "2 replicas do not hold 4 experts"),
        ({"replicas": 5}, "5 replicas do not divide among 2 devices; 6 would"),
        ({"replicas": 10}, "10 replicas give each of 2 devices 5 slots, but only 4 .* at most 8 replicas are of use"),
        ({"replicas": 6, "nodes": 2}, "devices 3 slots, but only 2 different experts .* at most 4 replicas"),
        ({"devices": 0}, "devices must be positive, not 0"),
        ({"nodes": -1}, "nodes must be positive, not -1"),
        ({"groups": 0}, "groups must be positive, not 0"),
        ({"nodes": 3}, "2 devices do not divide among 3 nodes"),
        ({"groups": 3}, "4 experts do not divide into 3 groups"),
    ],
)
def test_bad_input_is_one_line(change, message):
    arguments = {"loads": [[1, 2, 3, 4]], "replicas": 4, "devices": 2, "nodes": 1, "groups": 2}
    plan_placement(**arguments)
    with pytest.raises(ConfigError, match=message) as error:
        plan_placement(**(arguments | change))
    assert "\n" not in str(error.value)


def test_the_size_of_deepseek_v3_takes_no_time():
    """58 layers of 256 experts, 32 redundant ones, 32 devices on 4 nodes: the paper's prefill deployment."""
    loads = np.random.default_rng(0).dirichlet(np.ones(256), 58)
    placement = plan_placement(loads, 288, devices=32, nodes=4, groups=8)
    load = placement.device_load(loads)
    before = contiguous_placement(58, 256, 32).device_load(loads)
    assert load.max() * 32 < 1.2
    assert before.max() * 32 > 1.5
