"""Which device holds which replicas of which experts: the EPLB algorithm, from loads alone, on the host in NumPy.

DeepSeek-V3 deploys redundant experts: the busiest are held several times, and an expert's tokens are split evenly over
its replicas (section 3.4). `plan_placement` chooses how often and where, layer by layer, as the published balancer
does: the next replica is always of the expert with the highest load per replica; then replicas go to devices, the
busiest first, each to the lightest device with a free slot. Where groups divide evenly among nodes it is
*hierarchical*: groups are packed to nodes first, so that the experts of a group stay on one node, where group-limited
routing wants them; otherwise it is *global*.

It departs from the published balancer in one thing: **no device ever holds an expert twice**, because the second copy
would take memory and balance nothing. So an expert gets at most one replica for each device of its node, and a replica
passes over devices that hold its expert already. Both planners agree wherever the published one makes no such double,
as in its worked example.

Each plan is made afresh; `ExpertPlacement.moved_from` tells what it costs to change to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from deepseek_jax.config import ConfigError, require


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertPlacement:
    """The logical expert in every physical slot. A device holds consecutive slots, a node consecutive devices.

    Raises:
      ConfigError: slots that do not divide among devices, an expert without a slot, or twice on a device.
    """

    physical_to_logical: np.ndarray
    """The expert in each slot: int32 `[layers, replicas]`, read-only."""
    num_experts: int
    """Logical experts of a layer."""
    num_devices: int
    num_nodes: int = 1

    def __post_init__(self):
        table = np.asarray(self.physical_to_logical)
        require(
            table.ndim == 2 and table.dtype.kind in "iu",
            f"a placement is a table of whole numbers [layers, replicas], not {table.dtype} of shape {table.shape}",
        )
        _check_counts(self.num_experts, table.shape[1], self.num_devices, self.num_nodes)
        require(
            not table.size or (table.min() >= 0 and table.max() < self.num_experts),
            f"a placement names experts 0 to {self.num_experts - 1}; this one has others",
        )
        table = table.astype(np.int32)
        table.setflags(write=False)
        object.__setattr__(self, "physical_to_logical", table)
        held = self._held()
        for layer, expert in np.argwhere(held.sum(axis=1) == 0)[:1]:
            raise ConfigError(f"a placement has every expert, but row {layer} of this one lacks expert {expert}")
        for layer, device, expert in np.argwhere(held > 1)[:1]:
            raise ConfigError(
                f"a device holds an expert once, but in row {layer} of this placement device {device} holds expert "
                f"{expert} {held[layer, device, expert]} times"
            )

    @property
    def num_layers(self) -> int:
        """Layers with experts."""
        return self.physical_to_logical.shape[0]

    @property
    def num_replicas(self) -> int:
        """Physical slots of a layer, over all devices."""
        return self.physical_to_logical.shape[1]

    @property
    def slots_per_device(self) -> int:
        """Physical slots of a layer on one device."""
        return self.num_replicas // self.num_devices

    @property
    def replica_counts(self) -> np.ndarray:
        """Slots of each expert: int32 `[layers, experts]`, at least 1."""
        return self._held().sum(axis=1, dtype=np.int32)

    @property
    def logical_to_physical(self) -> np.ndarray:
        """The slots of each expert, ascending, padded with -1: int32 `[layers, experts, most replicas of any]`."""
        counts = self.replica_counts
        slots = np.full((*counts.shape, counts.max(initial=0)), -1, np.int32)
        for layer, row in enumerate(self.physical_to_logical):
            for expert in range(self.num_experts):
                slots[layer, expert, : counts[layer, expert]] = np.flatnonzero(row == expert)
        return slots

    def device_load(self, loads: ArrayLike) -> np.ndarray:
        """Loads of devices, float64 `[layers, devices]`, when experts have `loads` `[layers, experts]`.

        The load of an expert is split evenly over its replicas.
        """
        loads = _checked_loads(loads)
        shape = (self.num_layers, self.num_experts)
        require(loads.shape == shape, f"this placement is for loads of shape {list(shape)}, not {list(loads.shape)}")
        return np.einsum("lde,le->ld", self._held(), loads / self.replica_counts)

    def moved_from(self, before: ExpertPlacement) -> np.ndarray:
        """Slots whose expert's weights were not on their device in `before` and must be sent there: int `[layers]`.

        The order of slots within a device does not count, because it moves nothing.

        Raises:
          ConfigError: `before` has other layers, experts or devices; it may have another number of replicas.
        """
        for name in ("num_layers", "num_experts", "num_devices"):
            ours, theirs = getattr(self, name), getattr(before, name)
            require(
                ours == theirs,
                f"the earlier placement has {theirs} {name.removeprefix('num_')}, this one {ours}: nothing to compare",
            )
        return (self._held() > before._held()).sum(axis=(1, 2))

    def text(self, names: Sequence[str] = ()) -> str:
        """One line per layer: the experts of each device, `|` between devices and `||` between nodes."""
        names = names or [f"row {layer}" for layer in range(self.num_layers)]
        label, number = max(map(len, names), default=0), len(str(self.num_experts - 1))
        lines = []
        for name, row in zip(names, self.physical_to_logical, strict=True):
            devices = [" ".join(f"{e:{number}}" for e in slots) for slots in row.reshape(self.num_devices, -1)]
            size = self.num_devices // self.num_nodes
            nodes = [" | ".join(devices[i : i + size]) for i in range(0, self.num_devices, size)]
            lines.append(f"{name:{label}}: {' || '.join(nodes)}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists for JSON: the fields, `logical_to_physical` and `replica_counts`."""
        tables = {name: getattr(self, name).tolist() for name in _TABLES}
        return {name: getattr(self, name) for name in _NUMBERS} | tables

    @classmethod
    def from_dict(cls, document: Any) -> ExpertPlacement:
        """The placement that `to_dict` wrote; further entries are ignored.

        Raises:
          ConfigError: an entry is missing, or is not what it should be.
        """
        required = (*_NUMBERS, "physical_to_logical")
        missing = [name for name in required if not (isinstance(document, Mapping) and name in document)]
        require(
            not missing, f"a placement in JSON is an object with {', '.join(required)}; this lacks {', '.join(missing)}"
        )
        numbers = {name: document[name] for name in _NUMBERS}
        for name, value in numbers.items():
            require(type(value) is int, f"{name} of a placement must be a whole number, not {value!r}")
        try:
            table = np.array(document["physical_to_logical"])
        except ValueError:
            raise ConfigError("physical_to_logical of a placement must have rows of one length") from None
        return cls(table, **numbers)

    def _held(self) -> np.ndarray:
        """How often each device holds each expert: int `[layers, devices, experts]`."""
        slots = self.physical_to_logical.reshape(self.num_layers, self.num_devices, -1)
        held = np.zeros((self.num_layers, self.num_devices, self.num_experts), np.int32)
        layers, devices, _ = np.indices(slots.shape, sparse=True)
        np.add.at(held, (layers, devices, slots), 1)
        return held


_NUMBERS = ("num_experts", "num_devices", "num_nodes")
_TABLES = ("physical_to_logical", "logical_to_physical", "replica_counts")


def contiguous_placement(layers: int, experts: int, devices: int, *, nodes: int = 1) -> ExpertPlacement:
    """Each expert once, in their own order: how expert parallelism lays them out without a plan."""
    return ExpertPlacement(np.tile(np.arange(experts), (layers, 1)), experts, devices, nodes)


def is_hierarchical(groups: int, nodes: int) -> bool:
    """Whether `plan_placement` keeps the experts of a group on one node: where groups divide evenly among nodes."""
    return groups % nodes == 0


def plan_placement(
    loads: ArrayLike, replicas: int, *, devices: int, nodes: int = 1, groups: int = 1
) -> ExpertPlacement:
    """Replicates and places the experts of every layer so that devices get about the same load.

    A heuristic: the same loads always give the same plan, ties going to the lower index, but there may be a better one.
    With replicas = experts, the loads of two devices of a node differ by at most the load of one expert.

    Args:
      loads: `[layers, experts]`, tokens or shares of each expert; only their ratios within a layer count.
      replicas: physical slots of a layer; at least one per expert, equally many on each device.
      devices: devices that share the experts.
      nodes: nodes that the devices stand in, equally many in each.
      groups: consecutive groups of experts that routing is limited by (`moe.num_groups`).

    Raises:
      ConfigError: loads that are no loads, or numbers that do not go together.
    """
    loads = _checked_loads(loads)
    experts = loads.shape[1]
    _check_counts(experts, replicas, devices, nodes)
    require(groups > 0, f"groups must be positive, not {groups}")
    require(experts % groups == 0, f"{experts} experts do not divide into {groups} groups")
    # Where groups do not go evenly into nodes, the cluster is planned as one node that holds one group.
    hierarchical = is_hierarchical(groups, nodes)
    plan_nodes, plan_groups = (nodes, groups) if hierarchical else (1, 1)
    slots, held = replicas // devices, experts // plan_nodes
    require(
        slots <= held,
        f"{replicas} replicas give each of {devices} devices {slots} slots, but only {held} different experts are on "
        f"its node; at most {held * devices} replicas are of use",
    )
    table = [_plan_layer(row, replicas, devices, plan_nodes, plan_groups) for row in loads]
    return ExpertPlacement(np.array(table, np.int32).reshape(-1, replicas), experts, devices, nodes)


def _plan_layer(loads: np.ndarray, replicas: int, devices: int, nodes: int, groups: int) -> list[int]:
    """The expert in each slot of one layer, from its loads `[experts]`."""
    members = np.arange(len(loads)).reshape(groups, -1)
    placed: list[int] = []
    for node_groups in _pack(loads[members].sum(axis=1), np.arange(groups), nodes):
        experts = members[node_groups].ravel()
        copies, counts = _replicate(loads[experts], replicas // nodes, most=devices // nodes)
        for device in _pack((loads[experts] / counts)[copies], copies, devices // nodes):
            placed += experts[copies[device]].tolist()
    return placed


def _replicate(loads: np.ndarray, replicas: int, *, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The expert of each replica `[replicas]`, first all of them once, and the number of each `[experts]`.

    The next replica is of the expert with the highest load per replica among those with fewer than `most`.
    """
    counts = np.ones(len(loads), np.int64)
    copies = list(range(len(loads)))
    while len(copies) < replicas:
        expert = int(np.argmax(np.where(counts < most, loads / counts, -1)))
        counts[expert] += 1
        copies.append(expert)
    return np.array(copies), counts


def _pack(loads: np.ndarray, experts: np.ndarray, packs: int) -> list[list[int]]:
    """Deals items out to packs of equal size: the heaviest first, each to the lightest pack that may take it.

    A pack may take an item while it has room and none of the same expert. Where no pack with room may, the item goes to
    a full one that has none of its expert, in exchange for an item that moves to a pack with room; while no expert has
    more items than there are packs, there always is such a pair: the full pack has more different experts.

    Returns:
      The items in each pack, in the order in which they came.
    """
    size = len(loads) // packs
    if size == 1:  # nothing to balance: in the order of the items
        return [[item] for item in range(packs)]
    packed: list[list[int]] = [[] for _ in range(packs)]
    has: list[set[int]] = [set() for _ in range(packs)]
    total = np.zeros(packs)
    for item in np.argsort(-loads, kind="stable").tolist():
        expert = int(experts[item])
        roomy = [pack for pack in range(packs) if len(packed[pack]) < size]
        pack = min((p for p in roomy if expert not in has[p]), key=total.__getitem__, default=None)
        if pack is None:
            exchanges = [
                (max(total[full] - loads[old] + loads[item], total[room] + loads[old]), full, place, room)
                for full in range(packs)
                if expert not in has[full]
                for place, old in enumerate(packed[full])
                for room in roomy
                if experts[old] not in has[room]
            ]
            _, full, place, pack = min(exchanges)  # the pair that ends up lightest
            old, packed[full][place] = packed[full][place], item
            total[full] += loads[item] - loads[old]
            has[full] ^= {expert, int(experts[old])}
            item = old
        packed[pack].append(item)
        total[pack] += loads[item]
        has[pack].add(int(experts[item]))
    return packed


def _checked_loads(loads: ArrayLike) -> np.ndarray:
    """`loads` as float64 `[layers, experts]`."""
    try:
        array = np.asarray(loads, np.float64)
    except (ValueError, TypeError):
        raise ConfigError("loads must be numbers in rows of one length, [layers, experts]") from None
    require(array.ndim == 2 and array.shape[1] > 0, f"loads must be [layers, experts], not of shape {array.shape}")
    for bad in np.argwhere(~(np.isfinite(array) & (array >= 0)))[:1]:
        raise ConfigError(f"loads must be finite and not negative; row {bad[0]}, expert {bad[1]} has {array[*bad]}")
    return array


def _check_counts(experts: int, replicas: int, devices: int, nodes: int) -> None:
    for name, value in (("experts", experts), ("replicas", replicas), ("devices", devices), ("nodes", nodes)):
        require(value > 0, f"{name} must be positive, not {value}")
    require(devices % nodes == 0, f"{devices} devices do not divide among {nodes} nodes")
    require(
        replicas >= experts, f"{replicas} replicas do not hold {experts} experts; take at least one replica per expert"
    )
    require(
        replicas % devices == 0,
        f"{replicas} replicas do not divide among {devices} devices; {-(-replicas // devices) * devices} would",
    )
