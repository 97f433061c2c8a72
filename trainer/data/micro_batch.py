"""Rows of a plan as the arrays that a model takes.

All samples of a micro-batch are looked up at once, which one by one would cost more than copying them, and then copied
one by one, which costs less than indexing all their elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from trainer.data.store.packing import RowPlan
from trainer.data.store.reader import TokenStore
from trainer.data.store.shards import Arrays

# The target of a position that predicts nothing; torch's losses ignore it by default.
IGNORED = -100
LENGTH_MULTIPLE = 16
EMPTY_ROW = -1
_NOTHING = np.empty(0, dtype=np.uint32)


@dataclass(frozen=True)
class MicroBatch:
    """One rank's rows of one micro-batch; three int64 arrays [micro_batch, length].

    `targets[i, t]` is the id that position t must predict (already shifted), or IGNORED. A target never crosses the
    border of a sample. `position_ids` restart at 0 with every sample, and in the padded tail, which is a segment of its
    own.
    """

    input_ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    position_ids: NDArray[np.int64]


def make_micro_batch(store: TokenStore, plan: RowPlan, rows: Sequence[int] | NDArray[np.int64]) -> MicroBatch:
    """Assemble rows (EMPTY_ROW for an empty one).

    Packed rows have the plan's sequence length. Unpacked rows are padded to the longest of them, rounded up to a
    multiple of 16 and never beyond the sequence length.
    """
    length = _row_length(plan, rows)
    total = len(rows) * length
    # Half as wide as the result: what is written twice stays in the processor's cache.
    steps = np.arange(length, dtype=np.uint32)
    ids = np.full(total, store.padding_id, dtype=np.uint32)
    positions = np.empty(total, dtype=np.uint32)
    is_target = np.zeros(total, dtype=np.bool_)
    of_row = [plan.samples_of(int(row)) if row != EMPTY_ROW else _NOTHING for row in rows]
    numbers = np.concatenate(of_row) if of_row else _NOTHING
    samples = _columns(store, plan, numbers)
    opened: dict[int, _Shard] = {}
    for row, mine in enumerate(of_row):
        at, end = row * length, (row + 1) * length
        for shard_number, local, start, stop, first_target, head in islice(samples, len(mine)):
            shard = opened.get(shard_number)
            if shard is None:
                shard = opened[shard_number] = _Shard(store.shard(shard_number))
            origin = shard.offsets[local]
            body = at + head
            size = head + stop - start
            if head:
                ids[at:body] = shard.ids[origin : origin + head]
            ids[body : at + size] = shard.ids[origin + start : origin + stop]
            positions[at : at + size] = steps[:size]
            # Document position t stands at body - start + t, and is predicted one before.
            shift = body - start - 1
            for span in range(shard.span_offsets[local], shard.span_offsets[local + 1]):
                begin, after = max(shard.spans[span, 0], first_target), min(shard.spans[span, 1], stop)
                if begin < after:
                    is_target[begin + shift : after + shift] = True
            at += size
        positions[at:end] = steps[: end - at]
    input_ids = ids.astype(np.int64)
    targets = np.empty(total, dtype=np.int64)
    # Position p of the batch predicts what stands at p + 1, and never anything of another sample.
    targets[:-1] = np.where(is_target[:-1], input_ids[1:], IGNORED)
    targets[-1] = IGNORED
    shape = (len(rows), length)
    return MicroBatch(input_ids.reshape(shape), targets.reshape(shape), positions.astype(np.int64).reshape(shape))


class _Shard:
    """The arrays of a shard as they are read fastest: ids by slice, the others element by element."""

    def __init__(self, arrays: Arrays) -> None:
        self.ids = arrays["ids"]
        # An element of a memory view is a Python integer at once.
        self.offsets, self.span_offsets, self.spans = (
            arrays[name].data for name in ("document_offsets", "span_offsets", "loss_spans")
        )


def _columns(store: TokenStore, plan: RowPlan, numbers: NDArray[np.uint32]) -> Iterator[tuple[int, ...]]:
    """Shard, number in the shard, start, stop, first target and head of every sample."""
    shard, local = store.locate(plan.document[numbers])
    columns = (getattr(plan, name)[numbers] for name in ("start", "stop", "first_target", "head"))
    return zip(shard.tolist(), local.tolist(), *(column.tolist() for column in columns), strict=True)


def _row_length(plan: RowPlan, rows: Sequence[int] | NDArray[np.int64]) -> int:
    if plan.spec.packing:
        return plan.sequence_length
    longest = max((int(plan.tokens[row]) for row in rows if row != EMPTY_ROW), default=1)
    return min(-(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, plan.sequence_length)
