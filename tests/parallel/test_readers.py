"""Which rows each of several processes reads: those of its devices' batch shards, whatever their pipeline stages."""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from deepseek_jax.config import ConfigError
from deepseek_jax.parallel.mesh import AXES
from deepseek_jax.parallel.readers import Reader, reader_of


def mesh(*shape, processes):
    """A mesh of the four axes whose devices lie on processes in turn, as `jax.devices()` lists them."""
    count = int(np.prod(shape))
    devices = np.empty(count, object)
    devices[:] = [types.SimpleNamespace(process_index=i * processes // count) for i in range(count)]
    return types.SimpleNamespace(devices=devices.reshape(shape))


def readers(of):
    numbers = sorted({device.process_index for device in of.devices.flat})
    return [(r.index, r.count, r.shards, r.first) for r in (reader_of(of, number) for number in numbers)]


def test_without_a_pipeline_every_process_reads_a_part_of_its_own():
    of = mesh(1, 2, 1, 4, processes=2)
    assert readers(of) == [(0, 2, (0, 1, 2, 3), True), (1, 2, (4, 5, 6, 7), True)]


def test_processes_of_different_stages_read_the_same_rows():
    """And one of them, the first, says where they are in the data."""
    assert readers(mesh(2, 2, 1, 2, processes=2)) == [(0, 1, (0, 1, 2, 3), True), (0, 1, (0, 1, 2, 3), False)]
    assert readers(mesh(2, 2, 1, 2, processes=4)) == [
        (0, 2, (0, 1), True),
        (1, 2, (2, 3), True),
        (0, 2, (0, 1), False),
        (1, 2, (2, 3), False),
    ]


def test_a_process_that_holds_whole_stages_reads_every_row():
    assert readers(mesh(4, 1, 1, 2, processes=2)) == [(0, 1, (0, 1), True), (0, 1, (0, 1), False)]
    assert readers(mesh(4, 1, 1, 2, processes=1)) == [(0, 1, (0, 1), True)]


def test_shares_that_overlap_in_part_are_refused_in_one_line():
    """Six parts of a batch over processes of four devices: the second has the last two and the first two."""
    with pytest.raises(ConfigError) as error:
        reader_of(mesh(2, 3, 1, 2, processes=3), 0)
    assert str(error.value) == (
        "processes cannot share the rows of a batch: of its 6 parts they have 0-3, 0,1,4,5, 2-5, and two must have the "
        "same parts or none in common, and as many: let parallel.data x node x expert be a multiple or a divisor of "
        "each process's devices"
    )
    uneven = mesh(1, 4, 1, 1, processes=2)
    uneven.devices.flat[1].process_index = 1
    with pytest.raises(ConfigError, match=r"of its 4 parts they have 0, 1-3, and two must"):
        reader_of(uneven, 0)


def test_rows_reach_the_devices_of_their_shards():
    """On one device, and for a reader whose shards lie apart: its rows follow the order of its shards."""
    one = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 4)
    rows = np.arange(12).reshape(4, 3)
    np.testing.assert_array_equal(reader_of(one).place(rows), rows)
    placed = {}

    def callback(shape, sharding, piece):
        placed.update({start: piece((slice(start, start + 2), slice(None))) for start in (2, 6)})
        return shape

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "make_array_from_callback", callback)
        assert Reader(1, 2, (1, 3), True, one).place(rows) == (8, 3)
    np.testing.assert_array_equal(placed[2], rows[:2])
    np.testing.assert_array_equal(placed[6], rows[2:])
