"""A compiled program read back from its text: its computations, loops, conditionals, copies, collectives and FLOPs.

`compiled.as_text()` is the program that a device runs, after every optimization: what the compiler made of a step can
be counted there, and nowhere else. Instructions come in the order in which they are scheduled.

    program = read_program(compiled.as_text())
    flops(program)
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

DTYPE_BYTES = {
    **{"pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8},
    **{"f16": 2, "bf16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16},
    **{"f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3": 1, "f8e8m0fnu": 1, "f8e4m3b11fnuz": 1, "f8e5m2fnuz": 1, "f8e4m3fnuz": 1},
}

COLLECTIVES = ("all-to-all", "ragged-all-to-all", "all-gather", "reduce-scatter", "all-reduce", "collective-permute")


class Array(NamedTuple):
    """One array of a shape."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.dims) * DTYPE_BYTES.get(self.dtype, 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """One line of a program."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    """Its result's; of a tuple all of them, nested ones too."""
    operands: tuple[str, ...]
    """Names of instructions of the same computation."""
    attributes: str
    """What follows the operands, as text."""
    number: int = 0
    """Of a parameter, its place."""
    is_root: bool = False

    @property
    def bytes(self) -> int:
        """Of its result."""
        return sum(array.bytes for array in self.arrays)

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Computations that it runs: a loop's condition and body, branches, what a fusion or a call holds."""
        found = re.findall(
            r"\b(?:condition|body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", self.attributes
        )
        for group in re.findall(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}", self.attributes):
            found += re.findall(r"[\w.\-]+", group)
        return tuple(found)

    @functools.cached_property
    def trips(self) -> int | None:
        """How often a `while` turns; None where the compiler does not know."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', self.attributes)
        return int(found[1]) if found else None

    @property
    def op_name(self) -> str:
        """Where it comes from: jax's stack of names."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def kind(self) -> str:
        """The opcode, without whether it starts or ends something asynchronous."""
        return re.sub(r"-(start|done|update)$", "", self.opcode)


@dataclasses.dataclass(frozen=True, eq=False)
class Computation:
    """Instructions in the order in which they run."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        """Its instructions."""
        return {one.name: one for one in self.instructions}

    def operands(self, one: Instruction) -> list[Instruction]:
        """The instructions whose results one of them reads."""
        return [self.by_name[name] for name in one.operands if name in self.by_name]

    def reach(self, start: Instruction) -> set[str]:
        """Names of the instructions that need the result of `start`, directly or not."""
        reached = {start.name}
        for one in self.instructions:
            if any(name in reached for name in one.operands):
                reached.add(one.name)
        return reached - {start.name}


@dataclasses.dataclass(frozen=True, eq=False)
class CompiledProgram:
    """All computations of a program."""

    computations: Mapping[str, Computation]
    entry: str

    def inside(self, name: str) -> Iterator[tuple[Computation, Instruction]]:
        """The instructions of a computation and of all that it calls, at any depth, each once."""
        seen, waiting = set(), [name]
        while waiting:
            if (here := waiting.pop()) in seen or here not in self.computations:
                continue
            seen.add(here)
            for one in self.computations[here].instructions:
                yield self.computations[here], one
                waiting += one.called

    def holds(self, one: Instruction, kinds: tuple[str, ...]) -> bool:
        """Whether an instruction is of these kinds, or runs one that is."""
        return one.kind in kinds or any(inner.kind in kinds for name in one.called for _, inner in self.inside(name))

    @property
    def instructions(self) -> int:
        """Of all computations."""
        return sum(len(one.instructions) for one in self.computations.values())

    @functools.cached_property
    def loops(self) -> tuple[Instruction, ...]:
        """Every `while`."""
        return tuple(i for c in self.computations.values() for i in c.instructions if i.opcode == "while")

    def body(self, loop: Instruction) -> str:
        """The name of a loop's body."""
        found = re.search(r"\bbody=%?([\w.\-]+)", loop.attributes)
        assert found, f"{loop.name} has no body"
        return found[1]


_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\]")


def read_program(text: str) -> CompiledProgram:
    """The program of a compiled module's text.

    Raises:
      ValueError: it has no entry.
    """
    computations: dict[str, Computation] = {}
    entry = name = ""
    lines: list[Instruction] = []
    for line in text.splitlines():
        if not line.startswith(" ") and (head := _HEAD.match(line)):
            name, lines = head[2], []
            entry = name if head[1] else entry
        elif line == "}" and name:
            computations[name] = Computation(name, tuple(lines))
            name = ""
        elif name and (found := _LINE.match(line)):
            lines.append(_instruction(found[2], found[3], is_root=bool(found[1])))
    if not entry:
        raise ValueError("no entry computation: this is not the text of a compiled program")
    return CompiledProgram(computations, entry)


def _instruction(name: str, rest: str, *, is_root: bool) -> Instruction:
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 1
    return Instruction(
        name=name,
        opcode=opcode,
        arrays=tuple(_arrays(shape)),
        operands=tuple(re.findall(r"%([\w.\-]+)", rest[:end])),
        attributes=rest[end + 1 :],
        number=int(rest[:end]) if opcode == "parameter" else 0,
        is_root=is_root,
    )


def _arrays(shape: str) -> Iterator[Array]:
    for dtype, dims in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape)):
        yield Array(dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n))


def _closing(text: str) -> int:
    """The place of the parenthesis that closes the first one."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place
    raise ValueError(f"parentheses do not close: {text[:80]}")


# --- what it costs ----------------------------------------------------------------------------------------------------

Shares = Callable[[Instruction], list[float]]
"""How often each branch of a conditional runs, per time that the conditional does."""


def most_expensive(conditional: Instruction) -> list[float]:
    """Every branch in full: since one of them is usually nothing, the most that a conditional can cost."""
    return [1.0] * len(conditional.called)


def flops(program: CompiledProgram, computation: str | None = None, shares: Shares = most_expensive) -> float:
    """Of all matrix products that one run of a computation (default: the program) does; a multiply-add is two."""
    return total(program, product_flops, computation, shares)


def total(
    program: CompiledProgram,
    cost: Callable[[Computation, Instruction], float],
    computation: str | None = None,
    shares: Shares = most_expensive,
) -> float:
    """The cost of every instruction that one run of a computation (default: the program) does.

    A loop counts as often as it turns, once where the compiler does not know (grouped products on a CPU, whose number
    of blocks depends on the data).
    """

    @functools.cache
    def of(name: str) -> float:
        here = program.computations.get(name)
        if here is None:
            return 0.0
        return sum(cost(here, one) + called(one) for one in here.instructions)

    def called(one: Instruction) -> float:
        if not one.called:
            return 0.0
        if one.opcode == "while":
            return (1 if one.trips is None else one.trips) * of(program.body(one))
        if one.opcode == "conditional":
            return sum(share * of(name) for share, name in zip(shares(one), one.called, strict=True))
        return sum(of(name) for name in one.called)

    return of(computation or program.entry)


def product_flops(here: Computation, one: Instruction) -> float:
    """Of one matrix product; 0 for any other instruction."""
    if one.opcode == "dot":
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
    elif one.opcode == "custom-call" and re.search(r'custom_call_target="__cu(blas|dnn)', one.attributes):
        found = re.search(r'"lhs_contracting_dimensions":\[([\d,"]*)\]', one.attributes)
    else:
        return 0.0
    if not found or not one.operands or one.operands[0] not in here.by_name:
        return 0.0
    lhs = here.by_name[one.operands[0]].arrays[0].dims
    contracted = math.prod(lhs[int(d)] for d in found[1].replace('"', "").split(",") if d)
    return 2.0 * contracted * math.prod(one.arrays[0].dims)


# --- what should not be there -----------------------------------------------------------------------------------------


def count_collectives(program: CompiledProgram) -> dict[str, int]:
    """How many of each kind of collective are in a program; a loop's body counts once, a start with its end once."""
    found = dict.fromkeys(COLLECTIVES, 0)
    for computation in program.computations.values():
        for one in computation.instructions:
            if one.kind in found and not one.opcode.endswith(("-done", "-update")):
                found[one.kind] += 1
    return {name: count for name, count in found.items() if count}


def collective_bytes(program: CompiledProgram) -> dict[str, float]:
    """Bytes of the results of every kind of collective in one run of a program, on one device: at most, see `total`.

    What a device keeps for itself counts, and every branch of a conditional.
    """

    def of_kind(kind: str) -> Callable[[Computation, Instruction], float]:
        # The result of one that starts and ends is that of its end.
        return lambda _, one: float(one.bytes) if one.opcode in (kind, f"{kind}-done") else 0.0

    found = {kind: total(program, of_kind(kind)) for kind in COLLECTIVES}
    return {kind: moved for kind, moved in found.items() if moved}


def copies_of(program: CompiledProgram, computation: str, shapes: set[Array]) -> list[Instruction]:
    """Copies of arrays of these shapes in a computation and what it calls."""
    return [
        one
        for _, one in program.inside(computation)
        if one.kind == "copy" and not one.opcode.endswith("-done") and any(array in shapes for array in one.arrays)
    ]
