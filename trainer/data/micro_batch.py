"""Rows of a plan as the arrays that a model takes.

All samples of a micro-batch are looked up at once, and then copied piece by piece: a copy of a slice costs less than
indexing its elements, and looking samples up one by one would cost more than copying them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data.store.packing import RowPlan
from trainer.data.store.reader import TokenStore
from trainer.data.store.shards import Arrays, take_parts

# The target of a position that predicts nothing; torch's losses ignore it by default.
IGNORED = -100
LENGTH_MULTIPLE = 16
EMPTY_ROW = -1


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


@dataclass(frozen=True)
class _Samples:
    """Columns of the samples of a micro-batch; `at` is where each begins in the flat batch. int64 [samples]."""

    document: NDArray[np.int64]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    first_target: NDArray[np.int64]
    head: NDArray[np.int64]
    at: NDArray[np.int64]

    def of(self, chosen: NDArray[np.int64]) -> _Samples:
        """Some of them."""
        return _Samples(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


def make_micro_batch(store: TokenStore, plan: RowPlan, rows: Sequence[int] | NDArray[np.int64]) -> MicroBatch:
    """Assemble rows (EMPTY_ROW for an empty one).

    Packed rows have the plan's sequence length. Unpacked rows are padded to the longest of them, rounded up to a
    multiple of 16 and never beyond the sequence length.
    """
    length = _row_length(plan, rows)
    total = len(rows) * length
    steps = np.arange(length, dtype=np.int64)
    ids = np.full(total, store.padding_id, dtype=np.uint32)
    is_target = np.zeros(total, dtype=np.bool_)
    position_ids = np.empty(total, dtype=np.int64)
    samples, ends = _look_up(plan, rows, length)
    for row, end in enumerate(ends):
        position_ids[end : (row + 1) * length] = steps[: (row + 1) * length - end]
    for at, size in zip(samples.at.tolist(), (samples.head + samples.stop - samples.start).tolist(), strict=True):
        position_ids[at : at + size] = steps[:size]
    for arrays, chosen, local in store.by_shard(samples.document):
        mine = samples if len(chosen) == len(samples.at) else samples.of(chosen)
        _copy_ids(arrays, local, mine, ids)
        _mark_targets(arrays, local, mine, is_target)
    input_ids = ids.astype(np.int64)
    targets = np.full(total, IGNORED, dtype=np.int64)
    # Position p of the batch predicts what stands at p + 1, and never anything of another sample.
    np.copyto(targets[:-1], input_ids[1:], where=is_target[:-1])
    shape = (len(rows), length)
    return MicroBatch(input_ids.reshape(shape), targets.reshape(shape), position_ids.reshape(shape))


def _row_length(plan: RowPlan, rows: Sequence[int] | NDArray[np.int64]) -> int:
    if plan.spec.packing:
        return plan.sequence_length
    longest = max((int(plan.tokens[row]) for row in rows if row != EMPTY_ROW), default=1)
    return min(-(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, plan.sequence_length)


def _look_up(plan: RowPlan, rows: Sequence[int] | NDArray[np.int64], length: int) -> tuple[_Samples, list[int]]:
    """The samples of all rows, and where the padded tail of each row begins in the flat batch."""
    of_row = [plan.samples_of(int(row)) if row != EMPTY_ROW else np.empty(0, dtype=np.uint32) for row in rows]
    numbers = np.concatenate(of_row) if of_row else np.empty(0, dtype=np.uint32)
    names = ("document", "start", "stop", "first_target", "head")
    document, start, stop, first_target, head = (getattr(plan, name)[numbers].astype(np.int64) for name in names)
    size = head + stop - start
    counts = [len(part) for part in of_row]
    before = np.cumsum(size) - size
    last = np.cumsum(counts)
    filled = np.concatenate([before, [size.sum()]])[np.concatenate([[0], last])]
    row_begins = np.arange(len(rows), dtype=np.int64) * length
    at = before + np.repeat(row_begins - filled[:-1], counts)
    ends: list[int] = (row_begins + np.diff(filled)).tolist()
    return _Samples(document, start, stop, first_target, head, at), ends


def _copy_ids(arrays: Arrays, local: NDArray[np.int64], samples: _Samples, ids: NDArray[np.uint32]) -> None:
    """Copy head and slice of every sample; `local` are the documents' numbers in the shard."""
    stored = arrays["ids"]
    origin = arrays["document_offsets"][local].astype(np.int64)
    if samples.head.any():
        for at, begin, size in zip(samples.at.tolist(), origin.tolist(), samples.head.tolist(), strict=True):
            ids[at : at + size] = stored[begin : begin + size]
    places = (samples.at + samples.head).tolist()
    begins, sizes = (origin + samples.start).tolist(), (samples.stop - samples.start).tolist()
    for at, begin, size in zip(places, begins, sizes, strict=True):
        ids[at : at + size] = stored[begin : begin + size]


def _mark_targets(arrays: Arrays, local: NDArray[np.int64], samples: _Samples, is_target: NDArray[np.bool_]) -> None:
    """Mark the positions that predict a supervised token of their sample."""
    offsets = arrays["span_offsets"]
    spans = arrays["loss_spans"][take_parts(offsets, local)].astype(np.int64)
    counts = (offsets[local + 1] - offsets[local]).astype(np.int64)
    begins = np.maximum(spans[:, 0], np.repeat(samples.first_target, counts))
    ends = np.minimum(spans[:, 1], np.repeat(samples.stop, counts))
    # Document position t stands at (at + head - start) + t and is predicted one before.
    shift = np.repeat(samples.at + samples.head - samples.start - 1, counts)
    for begin, end in zip((shift + begins).tolist(), (shift + ends).tolist(), strict=True):
        if begin < end:
            is_target[begin:end] = True
