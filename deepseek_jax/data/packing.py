"""Documents into rows of fixed length: concatenated, then split, so that no token is lost and none comes twice.

Grain's packer does the work. Here its output gets this project's names, and its state a form that survives JSON.
"""

from __future__ import annotations

import copy
from typing import Any

import grain
import numpy as np
from grain.experimental import ConcatThenSplitIterDataset

Row = dict[str, np.ndarray]
"""`tokens`, `segment_ids`, `positions`, `loss_mask`: int32 `[S + 1]` each."""


def pack(documents: grain.IterDataset, row_length: int) -> grain.IterDataset:
    """Packs elements `{"tokens": int32 [n]}` into rows of `row_length`; a document may go on in the next row."""
    return ConcatThenSplitIterDataset(documents, length_struct={"tokens": row_length})


def to_row(packed: dict[str, np.ndarray], pad_id: int) -> Row:
    """A packed element as a row.

    `segment_ids` count the documents of the row from 1 and are 0 on padding, `positions` restart at 0 with each segment
    (also where a document goes on from the row before), and `loss_mask` is 1 on what may be a label: all but padding.
    """
    segments = packed["tokens_segment_ids"]
    mask = (segments > 0).astype(np.int32)
    tokens = np.where(mask, packed["tokens"], pad_id).astype(np.int32)
    return {
        "tokens": tokens,
        "segment_ids": segments,
        "positions": packed["tokens_positions"],
        "loss_mask": mask,
    }


def padding_row(row_length: int, pad_id: int) -> Row:
    """A row without any document, for a shard that has come to its end."""
    zeros = np.zeros(row_length, np.int32)
    return {
        "tokens": np.full(row_length, pad_id, np.int32),
        "segment_ids": zeros,
        "positions": zeros,
        "loss_mask": zeros,
    }


def packer_state(state: dict[str, Any]) -> dict[str, Any]:
    """Grain's state from one that went through JSON.

    The packer compares its slices with a tuple; JSON turns them into lists, and then a packer without a remainder
    believes that it has one, and loses a document.
    """
    state = copy.deepcopy(state)
    state["remainder_slices"] = {name: tuple(bounds) for name, bounds in state["remainder_slices"].items()}
    return state
