"""Which dispatcher a run uses, and with how much room: a ladder of settings, each a compiled step of its own.

Shapes are static and no token is dropped. So a step runs with the room that balanced routing needs, and some slack; if
that was not enough, it changes nothing and the same batch runs again with the next setting. The last one has room for
any routing, in as many rounds as bound its memory by that of a routing `_MOST` times as large as a balanced one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from deepseek_jax.config import MoEConfig, require
from deepseek_jax.parallel.dispatch.exchange import ExchangeDispatcher
from deepseek_jax.parallel.dispatch.hop import Hop
from deepseek_jax.parallel.dispatch.interface import Dispatcher
from deepseek_jax.parallel.dispatch.local import LocalDispatcher, round_up
from deepseek_jax.parallel.dispatch.ragged import RaggedHop

DispatcherName = Literal["local", "all_to_all", "two_hop", "ragged"]

_MOST = 3.0
"""Slack of the settings that have several rounds."""


@dataclasses.dataclass(frozen=True)
class ExpertMesh:
    """How experts are spread: over `node` nodes of `expert` devices each."""

    node: int = 1
    expert: int = 1

    @property
    def size(self) -> int:
        """Devices that share the experts."""
        return self.node * self.expert


def choose_dispatcher(name: DispatcherName | None, mesh: ExpertMesh) -> DispatcherName:
    """The dispatcher that a run gets: the one it names, or the best portable one for its mesh.

    Raises:
      ConfigError: "local" where experts are spread over devices.
    """
    if name is None:
        return "local" if mesh.size == 1 else "two_hop" if mesh.node > 1 and mesh.expert > 1 else "all_to_all"
    require(
        name != "local" or mesh.size == 1,
        f"parallel.dispatcher=local needs all experts on one device, not on node {mesh.node} x expert {mesh.expert}; "
        "set it to all_to_all or two_hop, or to none to let the mesh decide",
    )
    return name


def check_experts(config: MoEConfig, mesh: ExpertMesh, name: DispatcherName) -> None:
    """Raises `ConfigError` where experts or their groups do not split over the mesh."""
    require(
        config.num_experts % mesh.size == 0,
        f"{config.num_experts} experts cannot be split evenly over {mesh.size} devices (node {mesh.node} x expert "
        f"{mesh.expert}); change parallel.node, parallel.expert or model.moe.num_experts",
    )
    limited = config.groups_per_token < config.num_groups
    require(
        name != "two_hop" or not limited or config.num_groups % mesh.node == 0,
        f"model.moe.num_groups ({config.num_groups}) does not map to {mesh.node} nodes (parallel.node): a token's "
        "limit of groups is one of nodes only where each node has whole groups; make the nodes divide the groups",
    )


def dispatchers(
    name: DispatcherName | None,
    config: MoEConfig,
    mesh: ExpertMesh,
    *,
    tokens: int,
    slack: float,
    alignment: int = 1,
    wire: Any = None,
) -> tuple[Dispatcher, ...]:
    """The ladder of dispatchers for microbatches of `tokens` a device, from the least room to room for any routing.

    Args:
      name: which kind; None lets the mesh decide.
      config: experts, choices and groups.
      mesh: how experts are spread.
      tokens: of one device and microbatch.
      slack: room of the first setting, as a multiple of what balanced routing needs.
      alignment: of groups of rows.
      wire: dtype in which rows travel; None: their own.
    """
    name = choose_dispatcher(name, mesh)
    check_experts(config, mesh, name)
    if name == "local":
        return (LocalDispatcher(config.num_experts, alignment),)
    local_experts = config.num_experts // mesh.size
    most_here = min(config.experts_per_token, local_experts)
    pairs = math.ceil(max(slack, _MOST) * tokens * config.experts_per_token)

    def setting(slack: float, rounds: int) -> ExchangeDispatcher:
        hops = _hops(name, config, mesh, tokens, slack)
        room = math.ceil(slack * tokens * config.experts_per_token)
        return ExchangeDispatcher(hops, min(room, hops[-1].received * most_here), rounds, alignment, wire)

    def any_routing() -> ExchangeDispatcher:
        """Rounds so short that even if all rows of all devices came here, each with all experts, there were room."""
        rows = min(max(pairs // (mesh.size * most_here), 1), tokens)
        hops, sent = [], rows
        for hop in _hops(name, config, mesh, tokens, slack):
            hops.append(hop.with_room(sent))
            sent *= hop.size
        return ExchangeDispatcher(tuple(hops), sent * most_here, math.ceil(tokens / rows), alignment, wire)

    more = max(2 * slack, _MOST)
    ladder = [setting(slack, 1), setting(more, 1), any_routing()]
    if ladder[1].hops[0].capacity < tokens:
        ladder.insert(2, setting(more, 2))
    enough = [_holds_any(one, tokens, most_here) for one in ladder]
    return tuple(dict.fromkeys(ladder[: enough.index(True) + 1]))


def _hops(name: DispatcherName, config: MoEConfig, mesh: ExpertMesh, tokens: int, slack: float) -> tuple[Hop, ...]:
    """Hops with room for `slack` times what balanced routing sends to each destination."""
    local_experts = config.num_experts // mesh.size
    choices = config.experts_per_token

    def hop(axes, size, experts, rows, fair) -> Hop:
        capacity = min(round_up(math.ceil(slack * fair), 8), rows)
        return Hop(axes, size, experts, capacity)

    if name == "two_hop":
        nodes = min(mesh.node, choices)
        if config.groups_per_token < config.num_groups:
            nodes = min(nodes, config.groups_per_token)
        first = hop("node", mesh.node, local_experts * mesh.expert, tokens, tokens * nodes / mesh.node)
        # A node's tokens, once for every choice at most.
        fair = min(tokens * choices / mesh.expert, tokens * nodes)
        return first, hop("expert", mesh.expert, local_experts, first.received, fair)
    fair = tokens * min(choices / mesh.size, 1)
    one = hop(("node", "expert"), mesh.size, local_experts, tokens, fair)
    if name == "all_to_all":
        return (one,)
    # A ragged exchange packs what comes, so only the sum over all senders needs room.
    total = min(round_up(math.ceil(slack * fair * mesh.size), 8), tokens * mesh.size)
    return (RaggedHop(one.axes, mesh.size, local_experts, tokens, total),)


def _holds_any(one: ExchangeDispatcher, tokens: int, most_here: int) -> bool:
    """Whether there is room whatever the routing."""
    if one.rounds * one.hops[0].capacity < tokens:
        return False
    sent = min(one.hops[0].capacity, tokens)
    for hop in one.hops:
        if hop.capacity < sent or hop.received < sent * hop.size:
            return False
        sent = hop.received
    return one.pairs >= sent * most_here
