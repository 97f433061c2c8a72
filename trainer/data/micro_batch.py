"""Rows of a plan as the arrays that a model takes, in two steps.

`look_up` finds where the tokens and targets of many rows lie: with whole arrays, which costs about as much for a
thousand samples as for one. `Assembler` copies the rows of one micro-batch, piece by piece, which costs less than an
index of all their tokens, into memory that was used before, which costs less than memory that the system has to clear.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainer.data.store.packing import RowPlan
from trainer.data.store.reader import TokenStore
from trainer.data.store.shards import take_parts

# The target of a position that predicts nothing; torch's losses ignore it by default.
IGNORED = -100
LENGTH_MULTIPLE = 16
EMPTY_ROW = -1
Part = TypeVar("Part")


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


class RowLayout(NamedTuple):
    """What one row is made of; all numbers but those of shards are counted in tokens.

    `pieces` are (shard, begin in its ids, begin in the row, end in the row), `targets` (begin, end) in the row of what
    is to be predicted, and `samples` the size of each sample, one after another from the begin of the row.
    """

    pieces: Sequence[tuple[int, int, int, int]] = ()
    targets: Sequence[tuple[int, int]] = ()
    samples: Sequence[int] = ()


def look_up(store: TokenStore, plan: RowPlan, rows: Sequence[int] | NDArray[np.int64]) -> list[RowLayout]:
    """The layout of every row (EMPTY_ROW: of an empty one). Opens the shards that these rows come from.

    Raises as `TokenStore.shard`.
    """
    wanted = np.asarray(rows, dtype=np.int64)
    filled = np.flatnonzero(wanted != EMPTY_ROW)
    if not len(filled):
        return [RowLayout()] * len(wanted)
    chosen = take_parts(plan.row_offsets, wanted[filled])
    samples = plan.row_samples[chosen]
    counts = plan.row_offsets[wanted[filled] + 1] - plan.row_offsets[wanted[filled]]
    # Every column below has a value for each sample, and `row` is the index of its row in `rows`.
    row = np.repeat(filled, counts)
    start, stop, first_target, head = (
        getattr(plan, name)[samples].astype(np.int64) for name in ("start", "stop", "first_target", "head")
    )
    shard, local = store.locate(plan.document[samples])
    size = head + stop - start
    ends = np.cumsum(size)
    at = ends - size
    at -= np.repeat(at[np.cumsum(counts) - counts], counts)
    origin, owner, spans = _from_shards(store, shard, local)

    begin = np.maximum(spans[0], first_target[owner])
    end = np.minimum(spans[1], stop[owner])
    inside = begin < end
    owner = owner[inside]
    shift = (at + head - start)[owner]
    targets = zip((begin[inside] + shift).tolist(), (end[inside] + shift).tolist(), strict=True)

    piece_row = row
    columns = [shard, origin + start, at + head, at + size]
    if head.any():
        heads = np.flatnonzero(head)
        piece_row = np.concatenate([row, row[heads]])
        pinned = (shard, origin, at, at + head)
        columns = [np.concatenate([body, other[heads]]) for body, other in zip(columns, pinned, strict=True)]
        in_rows = np.lexsort((columns[2], piece_row))
        columns = [column[in_rows] for column in columns]
        piece_row = piece_row[in_rows]
    pieces = zip(*(column.tolist() for column in columns), strict=True)
    parts = (
        _by_row(piece_row, list(pieces), len(wanted)),
        _by_row(row[owner], list(targets), len(wanted)),
        _by_row(row, size.tolist(), len(wanted)),
    )
    return list(map(RowLayout, *parts))


def _from_shards(
    store: TokenStore, shard: NDArray[np.int64], local: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Where each document begins in its shard's ids; of all supervised spans the owner, ascending, and [2, spans]."""
    origin = np.empty(len(shard), dtype=np.int64)
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


def _by_row(rows: NDArray[np.int64], parts: list[Part], count: int) -> list[list[Part]]:
    """The parts of each of `count` rows; `rows` says, ascending, to which row each part belongs."""
    edges = np.searchsorted(rows, np.arange(count + 1)).tolist()
    return [parts[begin:end] for begin, end in pairwise(edges)]


class Assembler:
    """Copies rows of a plan into micro-batches.

    A micro-batch's arrays are its own as long as anybody holds one of them, or a view or a tensor over one.
    """

    def __init__(self, store: TokenStore, plan: RowPlan) -> None:
        self._store = store
        self._spec = plan.spec
        self._padding_id = store.padding_id
        self._count_up = np.arange(plan.sequence_length).data
        self._memory = _Memory()
        # Ids as narrow as the store keeps them; made when it is known how narrow.
        self._narrow: NDArray[Any] = np.empty(0, dtype=np.uint32)

    def assemble(self, rows: Sequence[RowLayout]) -> MicroBatch:
        """The micro-batch of these rows.

        Packed rows have the plan's sequence length. Unpacked rows are padded to the longest of them, rounded up to a
        multiple of 16 and never beyond the sequence length.
        """
        length = self._row_length(rows)
        shape = (len(rows), length)
        input_ids, targets, position_ids = (self._memory.take(len(rows) * length) for _ in range(3))
        input_ids[:] = self._ids(rows, length)
        targets.fill(IGNORED)
        # A slice of a memory view is copied in half the time that a slice of an array takes.
        ids, predicted, positions, count_up = input_ids.data, targets.data, position_ids.data, self._count_up
        for row_begin, row in zip(range(0, len(ids), length), rows, strict=True):
            # What stands at p is predicted at p - 1.
            for begin, end in row.targets:
                predicted[row_begin + begin - 1 : row_begin + end - 1] = ids[row_begin + begin : row_begin + end]
            at, row_end = row_begin, row_begin + length
            for size in row.samples:
                positions[at : at + size] = count_up[:size]
                at += size
            positions[at:row_end] = count_up[: row_end - at]
        return MicroBatch(input_ids.reshape(shape), targets.reshape(shape), position_ids.reshape(shape))

    def _ids(self, rows: Sequence[RowLayout], length: int) -> NDArray[Any]:
        """Ids of the rows, one after another; overwritten by the next call."""
        numbers = {piece[0] for row in rows for piece in row.pieces}
        arrays = {number: self._store.shard(number)["ids"] for number in numbers}
        for ids in arrays.values():
            if self._narrow.dtype != ids.dtype:
                self._narrow = np.empty(0, dtype=ids.dtype)
        total = len(rows) * length
        if len(self._narrow) < total:
            self._narrow = np.empty(total, dtype=self._narrow.dtype)
        found = self._narrow[:total]
        views = {number: ids.data for number, ids in arrays.items()}
        target = found.data
        for row_begin, row in zip(range(0, total, length), rows, strict=True):
            end = 0
            for shard, source, begin, end in row.pieces:
                target[row_begin + begin : row_begin + end] = views[shard][source : source + end - begin]
            if end < length:
                found[row_begin + end : row_begin + length] = self._padding_id
        return found

    def _row_length(self, rows: Sequence[RowLayout]) -> int:
        if self._spec.packing:
            return self._spec.sequence_length
        longest = max((sum(row.samples) for row in rows), default=0) or 1
        return min(-(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, self._spec.sequence_length)


def make_micro_batch(store: TokenStore, plan: RowPlan, rows: Sequence[int] | NDArray[np.int64]) -> MicroBatch:
    """One micro-batch by itself; who makes many keeps an `Assembler`. Raises as `TokenStore.shard`."""
    return Assembler(store, plan).assemble(look_up(store, plan, rows))


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
