"""How much of its exchanges a compiled program hides: its schedule, replayed with stated speeds.

A compiled program says in which order a device starts each exchange, computes, and waits for it. Given how fast the
device computes, reads memory and sends, that order has a length: one stream computes, the other exchanges, and a wait
that comes too early is *exposed*. It is a model, to compare programs: products run at a stated share of the peak, all
else at the speed of memory, nothing slows anything else down.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import NamedTuple

import numpy as np

from deepseek_jax.planning.compiled import CompiledProgram, Computation, Instruction, flops, product_flops

EXCHANGES = ("all-to-all", "ragged-all-to-all")
"""Those of an MoE layer."""
PERMUTES = ("collective-permute",)
"""Those from stage to stage."""
SUMS = ("all-reduce", "all-gather", "reduce-scatter")
_FREE = frozenset(
    (
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "partition-id",
        "replica-id",
        "domain",
    )
)


@dataclasses.dataclass(frozen=True)
class Speeds:
    """Of a device and its links; the defaults are an H200's, and those of the cluster that trained DeepSeek-V3."""

    flops: float = 989e12
    """Dense BF16 products per second at the peak."""
    efficiency: float = 0.6
    """Of the peak, that products reach."""
    memory: float = 4.8e12
    """Bytes per second."""
    memory_efficiency: float = 0.8
    within_node: float = 160e9
    """Bytes per second that a device sends within its node: NVLink of an H800, as reached."""
    between_nodes: float = 50e9
    """Bytes per second that a device sends to other nodes: one InfiniBand NIC of 400 Gb/s."""
    devices_per_node: int = 8
    fill: float = 2 / 3
    """The part of a buffer of rows for experts that is used, 1 / `parallel.capacity`: how far loops over it go."""


class Span(NamedTuple):
    """What a run of instructions takes, in seconds."""

    total: float
    compute: float
    """The time in which the device computes."""
    exchange: float
    """The time of all exchanges, were each alone."""
    exposed: float
    """The time in which the device waits for exchanges."""

    def times(self, count: float) -> Span:
        """So many of them, one after the other."""
        return Span(*(value * count for value in self))


class Replay:
    """A program, replayed."""

    def __init__(self, program: CompiledProgram, speeds: Speeds | None = None):
        self.program, self.speeds = program, speeds or Speeds()

    @functools.cache  # noqa: B019
    def span(self, computation: str) -> Span:
        """Of one run of a computation."""
        here = self.program.computations[computation]
        now = compute = exchange = exposed = 0.0
        free: dict[str, float] = {}  # per kind of link, when it is done with what was started
        ends: dict[str, float] = {}
        for one in here.instructions:
            if one.kind in EXCHANGES + PERMUTES + SUMS or self._wraps(one):
                if one.opcode.endswith(("-done", "-update")):
                    wait = max(ends.get(self._start(here, one), now) - now, 0.0)
                    now, exposed = now + wait, exposed + wait
                    continue
                seconds, link = self.exchange_seconds(here, one)
                free[link] = ends[one.name] = max(free.get(link, 0.0), now) + seconds
                exchange += seconds
                if not one.opcode.endswith("-start"):
                    exposed, now = exposed + ends[one.name] - now, ends[one.name]
                continue
            inner = self._inner(here, one)
            now, compute = now + inner.total, compute + inner.compute
            exchange, exposed = exchange + inner.exchange, exposed + inner.exposed
            if inner.exchange:  # what it started it also waited for
                free = {link: max(until, now) for link, until in free.items()}
        return Span(now, compute, exchange, exposed)

    def _wraps(self, one: Instruction) -> bool:
        return one.kind == "async" and self.program.holds(one, EXCHANGES + PERMUTES + SUMS)

    def _start(self, here: Computation, done: Instruction) -> str:
        """The start that an end waits for."""
        while not done.opcode.endswith("-start"):
            done = here.by_name[done.operands[0]]
        return done.name

    def _inner(self, here: Computation, one: Instruction) -> Span:
        if one.opcode == "while":
            body, turns = self.program.body(one), self._turns(one)
            if one.trips is None and not self._is_work(body) and self._blocks(body, rows=True) is None:
                # Attention, block by block: as one kernel does it, with no scores in memory.
                seconds = turns * flops(self.program, body) / (self.speeds.flops * self.speeds.efficiency)
                return Span(seconds, seconds, 0.0, 0.0)
            return self.span(body).times(turns)
        if one.opcode == "conditional":
            return max((self.span(name) for name in one.called), key=lambda span: span.total)
        if one.opcode == "call" or (one.kind == "async" and one.opcode.endswith("-start")):
            return self.span(one.called[0])
        seconds = self.compute_seconds(here, one)
        return Span(seconds, seconds, 0.0, 0.0)

    def _turns(self, loop: Instruction) -> float:
        """How often a loop turns.

        One whose number of turns only the data says, and that holds loops, branches or exchanges, is work that a table
        may leave out: it turns once. Any other goes over blocks. Those of a buffer of rows for experts: as far as that
        is filled, and evenly for each turn of the loop around it, which is over experts; of loops over blocks of
        several sizes, the largest do it all. Those of a sequence's keys: half of them, since attention is causal.
        """
        if loop.trips is not None:
            return loop.trips
        body = self.program.body(loop)
        if self._is_work(body):
            return 1.0
        rows, keys = self._blocks(body, rows=True), self._blocks(body, rows=False)
        if rows is None:
            return 1.0 if keys is None else keys[0] / keys[1] / 2
        around, here = self._around[body]
        others = (self._blocks(self.program.body(one), rows=True) for one in here.instructions if one.opcode == "while")
        if any(other and other[0] == rows[0] and other[1] > rows[1] for other in others):
            return 0.0
        return self.speeds.fill * rows[0] / rows[1] / around

    def _is_work(self, body: str) -> bool:
        """Whether a loop's body holds loops, branches or exchanges."""
        kinds = ("while", "conditional", *EXCHANGES, *PERMUTES, *SUMS)
        return any(one.kind in kinds for _, one in self.program.inside(body))

    def _blocks(self, body: str, *, rows: bool) -> tuple[int, int] | None:
        """Length of the largest array that a loop reads or writes a block of in each turn, and the block's: of rows
        (matrices), or of anything else."""
        found = []
        for here, one in self.program.inside(body):
            if one.opcode in ("dynamic-slice", "dynamic-update-slice"):
                operands = here.operands(one)
                part = one if one.opcode == "dynamic-slice" else operands[1]
                sizes = operands[0].arrays[0].dims, part.arrays[0].dims
                if (len(sizes[0]) == 2) == rows and sizes[0] and sizes[0][0] > sizes[1][0]:
                    found.append((sizes[0][0], sizes[1][0]))
        return max(found, default=None)

    @functools.cached_property
    def _around(self) -> dict[str, tuple[int, Computation]]:
        """Per computation the turns of the nearest loop around it whose number is known, and the caller."""
        found: dict[str, tuple[int, Computation]] = {}

        def walk(name: str, turns: int) -> None:
            here = self.program.computations[name]
            for one in here.instructions:
                for inner in one.called:
                    if inner in self.program.computations and inner not in found:
                        known = one.trips if one.opcode == "while" and one.trips is not None else turns
                        found[inner] = (known, here)
                        walk(inner, known)

        walk(self.program.entry, 1)
        return found

    def compute_seconds(self, here: Computation, one: Instruction) -> float:
        """Of an instruction that does not communicate."""
        if one.opcode in _FREE or one.opcode.endswith(("-done", "-update")):
            return 0.0
        speeds = self.speeds
        products = product_flops(here, one) + sum(flops(self.program, name) for name in one.called)
        moved = self._bytes(here, one)
        return max(products / (speeds.flops * speeds.efficiency), moved / (speeds.memory * speeds.memory_efficiency))

    def _bytes(self, here: Computation, one: Instruction) -> float:
        """Read and written. A fusion that reads a slice of an array, or updates one in place, moves the slice."""
        inner = [i for name in one.called for _, i in self.program.inside(name)] if one.opcode == "fusion" else [one]
        sliced = [i for i in inner if i.opcode in ("dynamic-slice", "dynamic-update-slice", "gather", "slice")]
        if not sliced:
            return one.bytes + sum(operand.bytes for operand in here.operands(one))
        in_place = any(i.opcode == "dynamic-update-slice" for i in inner)
        if not in_place:
            small = [operand.bytes for operand in here.operands(one)]
            return one.bytes + sum(min(size, one.bytes) for size in small)
        whole = max(one.arrays, key=lambda array: array.bytes).bytes
        rest = [operand.bytes for operand in here.operands(one) if operand.bytes < whole]
        return 2 * max(rest, default=0) + one.bytes - whole

    def exchange_seconds(self, here: Computation, one: Instruction) -> tuple[float, str]:
        """Of one collective, were it alone; and which links it takes, "node" or "network"."""
        inner = one
        if one.kind == "async":
            inner = next(
                i for name in one.called for _, i in self.program.inside(name) if i.kind in EXCHANGES + PERMUTES + SUMS
            )
        sent = sum(operand.bytes for operand in here.operands(one))
        node = self.speeds.devices_per_node
        if inner.kind in PERMUTES:
            pairs = re.findall(r"\{(\d+),(\d+)\}", inner.attributes)
            crosses = any(int(a) // node != int(b) // node for a, b in pairs)
            speed = self.speeds.between_nodes if crosses else self.speeds.within_node
            return sent / speed, "network" if crosses else "node"
        group = replica_group(inner.attributes)
        if group is None or len(group) < 2:
            return 0.0, "node"
        near = max(sum(other // node == rank // node for other in group) for rank in group)
        share, far = 1 / len(group), len(group) - near
        times = {"all-reduce": 2, "all-gather": len(group)}.get(inner.kind, 1)
        within = times * sent * share * (near - 1) / self.speeds.within_node
        between = times * sent * share * far / self.speeds.between_nodes
        return max(within, between), "network" if far else "node"


def replica_group(attributes: str) -> tuple[int, ...] | None:
    """The devices of the first group of a collective."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(int(n) for n in found[1].split(","))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        groups, dims, order = (tuple(int(n) for n in part.split(",")) if part else None for part in found.groups())
        assert groups is not None
        assert dims is not None
        devices = np.arange(math.prod(dims)).reshape(dims)
        devices = devices if order is None else devices.transpose(order)
        return tuple(int(n) for n in devices.reshape(groups)[0])
    return None
