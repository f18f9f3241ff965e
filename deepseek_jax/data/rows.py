"""The trainer's end of the data: batches of any size, and a state from which they go on exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from deepseek_jax.config import require
from deepseek_jax.data.errors import DataError
from deepseek_jax.data.packing import Row, packer_state, padding_row, to_row
from deepseek_jax.data.prefetch import Prefetcher

_VERSION = 1


class _Item(NamedTuple):
    """A row on its way to the trainer."""

    shard: int
    row: Row | None
    """None when the shard has ended."""
    state: dict
    """The shard's state after this row."""
    is_last: bool
    """Whether no shard of this host has a row left."""


class RowIterator:
    """Rows of one host, in the order of their global number. A thread prepares the next ones.

    Global row r of the run comes from virtual shard `r mod V`; this host serves the shards with
    `shard mod host_count == host_index`, hence the rows with that remainder. With a finite number of epochs a shard
    that has ended gives rows of padding until the last one has ended.
    """

    def __init__(
        self,
        shards: Mapping[int, grain.DatasetIterator],
        *,
        row_length: int,
        virtual_shards: int,
        pad_id: int,
        host_index: int,
        host_count: int,
        identity: Mapping[str, Any],
    ):
        self._iterators = dict(shards)
        self._virtual_shards = virtual_shards
        self._pad_id = pad_id
        self._padding = padding_row(row_length, pad_id)
        self._host_index = host_index
        self._host_count = host_count
        self._identity = dict(identity)
        self._row = 0
        self._states = {shard: iterator.get_state() for shard, iterator in self._iterators.items()}
        self._exhausted = False
        self._prefetcher: Prefetcher | None = None

    @property
    def rows_seen(self) -> int:
        """Global rows handed out so far, on all hosts together."""
        return self._row

    @property
    def exhausted(self) -> bool:
        """Whether this host has given its last real row. On several hosts, end the run when all of them say so."""
        return self._exhausted

    def next_batch(self, rows: int) -> dict[str, np.ndarray]:
        """The next batch: this host's part of `rows` global rows.

        Args:
            rows: global batch size, a multiple of the number of hosts; it may differ from call to call.

        Returns:
            `tokens`, `segment_ids`, `positions`, `loss_mask`: int32 `[rows / host_count, S + 1]`.

        Raises:
            ConfigError: `rows` is not a multiple of the number of hosts.
            DataError: a document could not be read.
            StopIteration: on a single host, the last epoch is over. On several, `exhausted` tells, and rows of padding
                keep coming, because the others may not have ended.
        """
        require(
            rows > 0 and rows % self._host_count == 0,
            f"the global batch size ({rows}) must be a positive multiple of the number of hosts ({self._host_count})",
        )
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self._produce())
        count = rows // self._host_count
        taken = self._prefetcher.take(count)
        if not taken:
            self._exhausted = True
            raise StopIteration("the last epoch is over")
        self._row += rows
        for item in taken:
            self._states[item.shard] = item.state
        self._exhausted = taken[-1].is_last
        batch = [item.row or self._padding for item in taken]
        batch += [self._padding] * (count - len(taken))
        return {name: np.stack([row[name] for row in batch]) for name in self._padding}

    def get_state(self) -> dict[str, Any]:
        """Where the run is in its data, as plain JSON: it stands after the rows handed out, not those prefetched.

        On several hosts each has the state of its own shards; `merge_states` puts them together.
        """
        return {
            "version": _VERSION,
            "row": self._row,
            "identity": self._identity,
            "shards": {str(shard): state for shard, state in self._states.items()},
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`, which must hold this host's shards; it may come from another number of hosts.

        Raises `DataError` if it is incomplete, or of a run with other data, and says what differs.
        """
        if state.get("version") != _VERSION:
            raise DataError(f"the saved data state has version {state.get('version')}, and this one reads {_VERSION}")
        for name, value in self._identity.items():
            saved = state["identity"].get(name)
            if saved != value:
                raise DataError(
                    f"the saved data state is of another run: {name} was {saved} and is now {value}; "
                    "set it back, or begin a new run in another folder"
                )
        missing = [shard for shard in self._iterators if str(shard) not in state["shards"]]
        if missing:
            raise DataError(f"the saved data state lacks virtual shards {missing}; merge the states of all hosts")
        self._row = state["row"]
        self._exhausted = False
        self._states = {shard: state["shards"][str(shard)] for shard in self._iterators}
        self._rewind()

    def close(self) -> None:
        """Ends the thread. Another `next_batch` starts it again, with the row that comes next."""
        if self._prefetcher is not None:
            self._rewind()

    def _rewind(self) -> None:
        """Puts the shards back from what was prefetched to what was handed out."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None
        for shard, iterator in self._iterators.items():
            iterator.set_state(packer_state(self._states[shard]))

    def _produce(self) -> Iterator[_Item]:
        """This host's rows from where it stands. On a single host it ends after the last row of all shards."""
        # Each shard is one row ahead, so that the last row is known to be the last when it is handed out.
        upcoming = {shard: self._advance(shard) for shard in self._iterators}
        running = sum(row is not None for row, _ in upcoming.values())
        row_number = self._row + self._host_index
        while running or self._host_count > 1:
            shard = row_number % self._virtual_shards
            row, state = upcoming[shard]
            if row is not None:
                upcoming[shard] = self._advance(shard)
                running -= upcoming[shard][0] is None
            yield _Item(shard, row, state, running == 0)
            row_number += self._host_count

    def _advance(self, shard: int) -> tuple[Row | None, dict]:
        """The shard's next row, None at its end, and its state after it."""
        iterator = self._iterators[shard]
        packed = next(iterator, None)
        return None if packed is None else to_row(packed, self._pad_id), iterator.get_state()


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state from those of all hosts of a run. Raises `DataError` unless they were saved at the same row."""
    rows = sorted({state["row"] for state in states})
    if len(rows) != 1:
        raise DataError(f"the hosts' data states were saved at different rows: {rows}")
    merged = dict(states[0])
    merged["shards"] = {shard: value for state in states for shard, value in state["shards"].items()}
    return merged
