"""What a step sends: tokens to experts and back, activations from stage to stage, weights and gradients at its ends.

Bytes are those that one device sends. Routing is taken to be balanced: each token chooses `groups_per_token` groups and
then `experts_per_token` of their experts, all equally often.
"""

from __future__ import annotations

import dataclasses
import math

from deepseek_jax.config import MoEConfig
from deepseek_jax.planning.devices import Device
from deepseek_jax.planning.job import Job


def expected_places(moe: MoEConfig, places: int) -> float:
    """How many of `places`, between which the experts are split evenly, have an expert of a token, on average."""
    group, chosen = moe.experts_per_group, moe.groups_per_token
    here = moe.num_experts / places
    pool = chosen * group
    if here <= group:
        reached = chosen / moe.num_groups
        missed = reached * _none_of(pool, round(here), moe.experts_per_token) + 1 - reached
        return places * (1 - missed)
    groups = round(here / group)  # of the place
    missed = 0.0
    for count in range(min(groups, chosen) + 1):
        rest = moe.num_groups - groups
        if chosen - count > rest:
            continue
        ways = math.comb(groups, count) * math.comb(rest, chosen - count) / math.comb(moe.num_groups, chosen)
        missed += ways * _none_of(pool, count * group, moe.experts_per_token)
    return places * (1 - missed)


def _none_of(pool: int, marked: int, draws: int) -> float:
    """The chance that none of `marked` among `pool` is drawn."""
    return math.comb(pool - marked, draws) / math.comb(pool, draws)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One dispatch or one combine of an MoE layer, of all tokens of a microbatch on one device."""

    network: float
    """Bytes to or from nodes, the device's own included, as microbenchmarks count them."""
    node: float
    """Bytes to or from devices of a node."""

    def seconds(self, device: Device) -> float:
        """Both links work at once, so the slower one counts."""
        efficiency = device.efficiency
        return max(
            self.network / (device.network_bandwidth * efficiency.network),
            self.node / (device.node_bandwidth * efficiency.node) if self.node else 0.0,
        )


def exchanges(job: Job) -> tuple[Exchange, Exchange]:
    """(dispatch, combine) of one layer and microbatch; nothing where all experts are on one device.

    A token goes once to each node that has an expert of it, and within the node once to each such device. On the way
    back outputs are summed in each node first. In the backward pass a combine is dispatched back, and a dispatch
    combined.
    """
    moe, parallel = job.model.moe, job.parallel
    devices = parallel.node * parallel.expert
    if devices == 1:
        return Exchange(0.0, 0.0), Exchange(0.0, 0.0)
    nodes = expected_places(moe, parallel.node) if parallel.node > 1 else 0.0
    within = expected_places(moe, devices) if parallel.expert > 1 else 0.0
    numbers = job.tokens * job.model.hidden_size * job.busiest
    return (
        Exchange(nodes * numbers * job.wire, within * numbers * job.wire),
        Exchange(nodes * numbers * job.width, within * numbers * job.width),
    )


def stage_transfer_bytes(job: Job) -> float:
    """What goes from stage to stage: hidden states, and in this library the tokens' embeddings for MTP beside them."""
    arrays = 2 if job.model.mtp_depth and job.execution == "lock_step" else 1
    return arrays * job.tokens * job.model.hidden_size * job.width if job.parallel.pipe > 1 else 0.0


def stages_share_a_node(job: Job, device: Device) -> bool:
    """Whether the whole mesh is in one node, so that nothing is sent over the network."""
    return job.devices <= device.devices_per_node


def transfer_seconds(job: Job, device: Device) -> float:
    """Of one activation, or one of its gradients, from stage to stage."""
    link = device.node_bandwidth if stages_share_a_node(job, device) else device.network_bandwidth
    return stage_transfer_bytes(job) / (link * device.efficiency.collectives)


@dataclasses.dataclass(frozen=True)
class WeightTraffic:
    """Bytes that one device sends at the two ends of a step."""

    gathered: float
    """Of weights, at the step's start: ZeRO-1 has each part once."""
    reduced: float
    """Of gradients, scattered at the step's end; summed everywhere without ZeRO."""
    mirrored: float
    """Between the two ranks that hold a stage, in a bidirectional schedule: weights there, gradients back."""

    @property
    def total(self) -> float:
        """All three."""
        return self.gathered + self.reduced + self.mirrored


def weight_traffic(job: Job, dense: float, experts: float) -> WeightTraffic:
    """What weights and gradients cost between devices.

    Args:
      job: the layout.
      dense: parameters of one device that all devices of a stage have.
      experts: parameters of its experts, which only data replicas have.
    """
    parallel = job.parallel
    shares = [(dense, parallel.batch_shards), (experts, parallel.data)]
    spread = sum(count * (copies - 1) / copies for count, copies in shares)
    both = job.stage_map.copies - 1
    return WeightTraffic(
        gathered=job.width * spread if parallel.zero else 0.0,
        reduced=4 * spread * (1 if parallel.zero else 2),
        mirrored=both * (job.width + 4) * (dense + experts),
    )


def weight_seconds(job: Job, device: Device, dense: float, experts: float) -> float:
    """Seconds of the same. Sums over a stage go within nodes first, so that the network sees each node's share once;
    data replicas of experts, and mirrored stages, are in other nodes unless one node has the whole mesh."""
    parallel = job.parallel
    share = device.efficiency.collectives
    near = device.node_bandwidth * share
    far = near if stages_share_a_node(job, device) else device.network_bandwidth * share
    within = min(parallel.batch_shards, device.devices_per_node)
    nodes = parallel.batch_shards / within
    of_dense = (within - 1) / within / near + (nodes - 1) / nodes / within / far
    seconds = 0.0
    each = (job.width if parallel.zero else 0) + 4 * (1 if parallel.zero else 2)
    seconds += each * dense * of_dense
    seconds += each * experts * (parallel.data - 1) / parallel.data / far
    return seconds + weight_traffic(job, dense, experts).mirrored / far
