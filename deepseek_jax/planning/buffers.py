"""What the temporary memory of a compiled program holds, from the compiler's own plan of it.

XLA gives every temporary a place in one piece of memory, and places are used again. Here the piece is explained by the
largest arrays that ever lie in each part of it: `largest_buffers`. The plan and the program come as protocol buffers
(`xla/service/hlo.proto`, xla_data.proto), of which the few fields that are needed are read here, by their numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

_VARINT, _EIGHT_BYTES, _TEXT, _FOUR_BYTES = 0, 1, 2, 5
"""How a field is written."""


class Buffer(NamedTuple):
    """An array in a piece of memory."""

    name: str
    """Of the instruction that makes it."""
    op_name: str
    """Where that comes from: jax's stack of names."""
    offset: int
    """Bytes from the piece's beginning."""
    size: int
    """Bytes."""

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + self.size


def largest_buffers(compiled, count: int | None = None) -> list[Buffer]:
    """The arrays that explain the temporary memory of a compiled jax program, the largest first.

    Of arrays that lie in the same bytes at different times only the largest is among them, so their sizes add up to no
    more than the memory.

    Args:
      compiled: `jax.stages.Compiled`.
      count: how many; None: all.

    Raises:
      ValueError: the compiler says nothing of its plan here.
    """
    plan = getattr(compiled.memory_analysis(), "serialized_buffer_assignment_proto", b"")
    if not plan:
        raise ValueError("this compiler does not say where it places arrays")
    modules = compiled.runtime_executable().hlo_modules()
    names = {key: value for module in modules for key, value in _names(module.as_serialized_hlo_module_proto())}
    placed = sorted(_largest_temporary(plan, names), key=lambda one: (-one.size, one.offset, one.name))
    chosen: list[Buffer] = []
    for one in placed:
        if all(one.end <= other.offset or other.end <= one.offset for other in chosen):
            chosen.append(one)
        if len(chosen) == count:
            break
    return chosen


def _largest_temporary(plan: bytes, names: dict[int, tuple[str, str]]) -> list[Buffer]:
    """What lies in the largest piece of memory that is neither an argument nor a result nor a constant."""
    made_by: dict[int, int] = {}
    pieces: list[tuple[int, list[tuple[int, int, int]]]] = []
    for number, value in _fields(plan):
        if number == 1:  # LogicalBufferProto: id 1, defined_at 3, whose instruction_id is 4.
            logical = dict(_fields(value))
            made_by[logical[1]] = dict(_fields(logical.get(3, b""))).get(4, 0)
        elif number == 3:  # BufferAllocationProto: size 2, is_thread_local 3, parameter 5, result 7, constant 12.
            piece = list(_fields(value))
            if not {3, 5, 7, 12} & {key for key, _ in piece}:
                # logical_buffer_id 1, offset 2, size 3
                assigned = [dict(_fields(inner)) for key, inner in piece if key == 9]
                pieces.append((dict(piece).get(2, 0), [(at[1], at.get(2, 0), at.get(3, 0)) for at in assigned]))
    _, places = max(pieces, default=(0, []))
    return [Buffer(*names.get(made_by[logical], ("", "")), offset, size) for logical, offset, size in places]


def _names(module: bytes) -> Iterator[tuple[int, tuple[str, str]]]:
    """(id, (name, op_name)) of every instruction of a HloModuleProto."""
    for number, computation in _fields(module):
        if number != 3:
            continue
        for inner, instruction in _fields(computation):
            if inner == 2:
                fields = dict(_fields(instruction))
                op_name = dict(_fields(fields.get(7, b""))).get(2, b"")
                yield fields.get(35, 0), (bytes(fields[1]).decode(), bytes(op_name).decode())


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a message: an int, or the bytes of a text or an inner message."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        number, written = divmod(varint(), 8)
        if written == _VARINT:
            yield number, varint()
            continue
        size = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}.get(written) or (varint() if written == _TEXT else 0)
        if not size and written != _TEXT:
            raise ValueError(f"field {number} of a protocol buffer is written in a way that is not known: {written}")
        yield number, message[at : at + size]
        at += size
