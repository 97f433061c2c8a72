"""Rows of a plan as the arrays that a model takes, in two steps.

`look_up` finds where the tokens and targets of many rows lie: with whole arrays, which costs about as much for a
thousand samples as for one. `Assembler` copies the rows of one micro-batch, piece by piece, which costs less than an
index of all their tokens, into memory that was used before, which costs less than memory that the system has to clear.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, repeat
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data.store.packing import RowPlan
from trainer.data.store.reader import TokenStore
from trainer.data.store.shards import take_parts

# The target of a position that predicts nothing; torch's losses ignore it by default.
IGNORED = -100
LENGTH_MULTIPLE = 16
EMPTY_ROW = -1
Columns = list[list[int]]


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


class BatchLayout(NamedTuple):
    """What one micro-batch is made of. Tokens are counted from the begin of its first row, row after row.

    Each is some lists of one length: `pieces` (shard, begin in its ids, begin, end), `targets` (begin, end) of what is
    to be predicted, `samples` (begin, end), and `tails` (begin, end) of the padding of each row that has some.
    """

    rows: int
    row_length: int
    pieces: Columns
    targets: Columns
    samples: Columns
    tails: Columns


def look_up(store: TokenStore, plan: RowPlan, batches: NDArray[np.int64]) -> list[BatchLayout]:
    """The layout of each micro-batch; `batches` are rows of the plan, or EMPTY_ROW, [micro-batches, rows of each].

    Opens the shards that these rows come from. Raises as `TokenStore.shard`.
    """
    wanted = batches.reshape(-1)
    filled = np.flatnonzero(wanted != EMPTY_ROW)
    chosen = take_parts(plan.row_offsets, wanted[filled])
    samples = plan.row_samples[chosen]
    counts = (plan.row_offsets[wanted[filled] + 1] - plan.row_offsets[wanted[filled]]).astype(np.int64)
    # Every column below has a value for each sample, and `row` is the index of its row in `wanted`.
    row = np.repeat(filled, counts)
    start, stop, first_target, head = (
        getattr(plan, name)[samples].astype(np.int64) for name in ("start", "stop", "first_target", "head")
    )
    shard, local = store.locate(plan.document[samples])
    size = head + stop - start
    ends = np.cumsum(size)
    used = np.zeros(len(wanted), dtype=np.int64)
    used[filled] = np.diff(ends[np.cumsum(counts) - 1], prepend=0)
    lengths = _row_lengths(plan, used.reshape(batches.shape))
    row_begin = (np.arange(batches.shape[1]) * lengths[:, None]).reshape(-1)
    # Samples of a row follow each other; `ends` counts as if all rows did, without padding.
    at = ends - size + (row_begin - (np.cumsum(used) - used))[row]
    origin, owner, spans = _from_shards(store, shard, local)

    begin = np.maximum(spans[0], first_target[owner])
    end = np.minimum(spans[1], stop[owner])
    inside = begin < end
    owner = owner[inside]
    shift = (at + head - start)[owner]

    batch = row // batches.shape[1]
    piece_batch = batch
    pieces = [shard, origin + start, at + head, at + size]
    if head.any():
        heads = np.flatnonzero(head)
        pinned = (shard, origin, at, at + head)
        piece_batch = np.concatenate([batch, batch[heads]])
        in_order = np.argsort(piece_batch, kind="stable")
        piece_batch = piece_batch[in_order]
        pieces = [np.concatenate([body, each[heads]])[in_order] for body, each in zip(pieces, pinned, strict=True)]
    row_end = row_begin + np.repeat(lengths, batches.shape[1])
    short = np.flatnonzero(row_begin + used < row_end)
    count = len(batches)
    return list(
        map(
            BatchLayout,
            repeat(batches.shape[1]),
            lengths.tolist(),
            _by_batch(piece_batch, pieces, count),
            _by_batch(batch[owner], [begin[inside] + shift, end[inside] + shift], count),
            _by_batch(batch, [at, at + size], count),
            _by_batch(short // batches.shape[1], [(row_begin + used)[short], row_end[short]], count),
        )
    )


def _row_lengths(plan: RowPlan, used: NDArray[np.int64]) -> NDArray[np.int64]:
    """Length of the rows of each micro-batch, from the tokens of its rows.

    Packed rows have the plan's sequence length. Unpacked rows are padded to the longest of them, rounded up to a
    multiple of 16 and never beyond the sequence length.
    """
    if plan.spec.packing:
        return np.full(len(used), plan.sequence_length, dtype=np.int64)
    longest = np.maximum(used.max(axis=1), 1)
    rounded: NDArray[np.int64] = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    return np.minimum(rounded, plan.sequence_length)


def _from_shards(
    store: TokenStore, shard: NDArray[np.int64], local: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Where each document begins in its shard's ids; of all supervised spans the owner, ascending, and [2, spans]."""
    origin = np.empty(len(shard), dtype=np.int64)
    if not len(shard):
        return origin, origin, np.empty((2, 0), dtype=np.int64)
    owners, spans = [], []
    by_shard = np.argsort(shard, kind="stable")
    numbers, first = np.unique(shard[by_shard], return_index=True)
    for number, mine in zip(numbers.tolist(), np.split(by_shard, first[1:]), strict=True):
        arrays = store.shard(number)
        inside = local[mine]
        origin[mine] = arrays["document_offsets"][inside]
        offsets = arrays["span_offsets"]
        counts = (offsets[inside + 1] - offsets[inside]).astype(np.int64)
        owners.append(np.repeat(mine, counts))
        spans.append(arrays["loss_spans"][take_parts(offsets, inside)])
    owner = np.concatenate(owners)
    in_order = np.argsort(owner, kind="stable")
    edges = np.ascontiguousarray(np.concatenate(spans).T, dtype=np.int64)
    return origin, owner[in_order], edges[:, in_order]


def _by_batch(batch: NDArray[np.int64], columns: Sequence[NDArray[np.int64]], count: int) -> list[Columns]:
    """The columns, cut into those of each of `count` micro-batches; `batch`, ascending, says whose a value is."""
    edges = np.searchsorted(batch, np.arange(count + 1)).tolist()
    lists = [column.tolist() for column in columns]
    return [[column[begin:end] for column in lists] for begin, end in pairwise(edges)]


class Assembler:
    """Copies rows of a plan into micro-batches.

    A micro-batch's arrays are its own as long as anybody holds one of them, or a view or a tensor over one.
    """

    def __init__(self, store: TokenStore, plan: RowPlan) -> None:
        self._store = store
        self._padding_id = store.padding_id
        self._count_up = np.arange(plan.sequence_length).data
        self._memory = _Memory()
        # Ids as narrow as the store keeps them; made when it is known how narrow.
        self._narrow: NDArray[Any] = np.empty(0, dtype=np.uint32)

    def assemble(self, layout: BatchLayout) -> MicroBatch:
        """The micro-batch of this layout."""
        total = layout.rows * layout.row_length
        input_ids, targets, position_ids = (self._memory.take(total) for _ in range(3))
        input_ids[:] = self._ids(layout, total)
        targets.fill(IGNORED)
        # A slice of a memory view is copied in half the time that a slice of an array takes.
        ids, predicted, positions, count_up = input_ids.data, targets.data, position_ids.data, self._count_up
        # What stands at p is predicted at p - 1.
        for begin, end in zip(*layout.targets, strict=True):
            predicted[begin - 1 : end - 1] = ids[begin:end]
        for segments in (layout.samples, layout.tails):
            for begin, end in zip(*segments, strict=True):
                positions[begin:end] = count_up[: end - begin]
        shape = (layout.rows, layout.row_length)
        return MicroBatch(input_ids.reshape(shape), targets.reshape(shape), position_ids.reshape(shape))

    def _ids(self, layout: BatchLayout, total: int) -> NDArray[Any]:
        """Ids of the rows, one after another; overwritten by the next call."""
        arrays = {number: self._store.shard(number)["ids"] for number in set(layout.pieces[0])}
        for ids in arrays.values():
            if self._narrow.dtype != ids.dtype:
                self._narrow = np.empty(0, dtype=ids.dtype)
        if len(self._narrow) < total:
            self._narrow = np.empty(total, dtype=self._narrow.dtype)
        found = self._narrow[:total]
        views = {number: ids.data for number, ids in arrays.items()}
        target = found.data
        for shard, source, begin, end in zip(*layout.pieces, strict=True):
            target[begin:end] = views[shard][source : source + end - begin]
        for begin, end in zip(*layout.tails, strict=True):
            found[begin:end] = self._padding_id
        return found


def make_micro_batch(store: TokenStore, plan: RowPlan, rows: Sequence[int] | NDArray[np.int64]) -> MicroBatch:
    """One micro-batch by itself; who makes many keeps an `Assembler`. Raises as `TokenStore.shard`."""
    (layout,) = look_up(store, plan, np.asarray(rows, dtype=np.int64)[None])
    return Assembler(store, plan).assemble(layout)


class _Memory:
    """Blocks of int64, given out again when nobody holds them: clearing new memory costs more than filling it twice."""

    def __init__(self) -> None:
        # The first is never given out: a block with as many references as this one is free.
        self._blocks = [np.empty(0, dtype=np.int64)]

    def take(self, size: int) -> NDArray[np.int64]:
        """An array [size] of any content."""
        references = [sys.getrefcount(block) for block in self._blocks]
        for count, block in zip(references[1:], self._blocks[1:], strict=True):
            if count == references[0] and len(block) >= size:
                return block[:size]
        self._blocks.append(np.empty(size, dtype=np.int64))
        return self._blocks[-1][:size]
