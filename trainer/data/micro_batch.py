"""Rows of a plan as the arrays that a model takes, in two steps.

`look_up` finds where the tokens and targets of many rows lie: with whole arrays, which costs about as much for a
thousand samples as for one. `Assembler` copies the rows of one micro-batch, piece by piece, which costs less than an
index of all their tokens, into memory that was used before, which costs less than memory that the system has to clear.
Only then do places become numbers of Python: those of a few rows at a time stay in the processor's cache.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise, repeat
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data.store.packing import RowPlan
from trainer.data.store.reader import TokenStore
from trainer.data.store.shards import id_dtype, indexes_of_parts, take_parts

# The target of a position that predicts nothing; torch's losses ignore it by default.
IGNORED = -100
LENGTH_MULTIPLE = 16
EMPTY_ROW = -1


class TeacherTargets(NamedTuple):
    """What a teacher predicts at each target of a micro-batch, row by row.

    `candidates` int64 [targets, k], its most probable tokens; `log_probabilities` float32 [targets, k + 1], theirs and,
    last, that of all others.
    """

    candidates: NDArray[np.int64]
    log_probabilities: NDArray[np.float32]


class MicroBatch(NamedTuple):
    """One rank's rows of one micro-batch; three int64 arrays [micro_batch, length].

    `targets[i, t]` is the id that position t must predict (already shifted), or IGNORED. A target never crosses the
    border of a sample. `position_ids` restart at 0 with every sample, and in the padded tail, which is a segment of its
    own; micro-batches whose rows are one whole sample each share them, so they are to be read only.
    """

    input_ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    teacher: TeacherTargets | None = None
    """Where there is a teacher to learn from."""


class BatchLayout(NamedTuple):
    """What one micro-batch is made of. Tokens are counted from the begin of its first row, row after row.

    Each array is int64 [columns, count], and places are begins and ends: `pieces` (shard, place in its ids, place,
    position ids), `predicting` (place) where the next token is predicted, and `tails` (place) of the padding of each
    row that has some. `ids` are the tokens of each shard.
    """

    rows: int
    row_length: int
    ids: Mapping[int, memoryview]
    pieces: NDArray[np.int64]
    predicting: NDArray[np.int64]
    tails: NDArray[np.int64]


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
    ids, origin, owner, spans = _from_shards(store, shard, local)

    begin = np.maximum(spans[0], first_target[owner])
    end = np.minimum(spans[1], stop[owner])
    inside = begin < end
    owner = owner[inside]
    # What stands at p is predicted at p - 1.
    shift = (at + head - start - 1)[owner]

    batch = row // batches.shape[1]
    piece_batch = batch
    pieces = [shard, origin + start, origin + stop, at + head, at + size, head, size]
    if head.any():
        heads = np.flatnonzero(head)
        pinned = (shard, origin, origin + head, at, at + head, np.zeros_like(head), head)
        piece_batch = np.concatenate([batch, batch[heads]])
        pieces = [np.concatenate([body, each[heads]]) for body, each in zip(pieces, pinned, strict=True)]
    row_end = row_begin + np.repeat(lengths, batches.shape[1])
    short = np.flatnonzero(row_begin + used < row_end)
    count = len(batches)
    return list(
        map(
            BatchLayout,
            repeat(batches.shape[1]),
            lengths.tolist(),
            repeat(ids),
            _by_batch(piece_batch, pieces, count),
            _by_batch(batch[owner], [begin[inside] + shift, end[inside] + shift], count),
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
) -> tuple[dict[int, memoryview], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Ids of the shards; where each document begins in them; owners of spans, and spans [2, count], in any order."""
    by_shard = _stable_order(shard, store.n_shards)
    numbers, first = np.unique(shard[by_shard], return_index=True)
    local = local[by_shard]
    origin, span_start, span_stop = np.empty((3, len(shard)), dtype=np.int64)
    parts = list(zip(numbers.tolist(), pairwise([*first.tolist(), len(shard)]), strict=True))
    ids = {}
    for number, (begin, end) in parts:
        arrays = store.shard(number)
        ids[number] = arrays["ids"].data
        inside = local[begin:end]
        origin[begin:end] = arrays["document_offsets"][inside]
        span_start[begin:end] = arrays["span_offsets"][inside]
        span_stop[begin:end] = arrays["span_offsets"][inside + 1]
    counts = span_stop - span_start
    chosen = indexes_of_parts(span_start, counts)
    spans = np.empty((len(chosen), 2), dtype=np.int64)
    spans_before = np.concatenate([[0], np.cumsum(counts)])
    for number, (begin, end) in parts:
        mine = slice(spans_before[begin], spans_before[end])
        spans[mine] = store.shard(number)["loss_spans"][chosen[mine]]
    in_place = np.empty_like(origin)
    in_place[by_shard] = origin
    return ids, in_place, np.repeat(by_shard, counts), spans.T


def _by_batch(batch: NDArray[np.int64], columns: Sequence[NDArray[np.int64]], count: int) -> list[NDArray[np.int64]]:
    """The columns, cut into those of each of `count` micro-batches; `batch` says whose a value is."""
    in_order = _stable_order(batch, count)
    edges = np.searchsorted(batch[in_order], np.arange(count + 1)).tolist()
    stacked = np.stack(columns)[:, in_order]
    return [stacked[:, begin:end] for begin, end in pairwise(edges)]


def _stable_order(numbers: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The order that sorts numbers below `count`; numpy sorts narrow ones by their digits."""
    order: NDArray[np.int64] = np.argsort(numbers.astype(np.min_scalar_type(count)), kind="stable")
    return order


class Assembler:
    """Copies rows of a plan into micro-batches.

    A micro-batch's ids and targets are its own as long as anybody holds one of its arrays, or a view or a tensor over
    one.
    """

    def __init__(self, store: TokenStore, plan: RowPlan) -> None:
        self._padding_id = store.padding_id
        self._count_up = np.arange(plan.sequence_length).data
        # Position ids of rows that are one whole sample each.
        self._undivided = np.empty((0, 0), dtype=np.int64)
        self._memory = _Memory()
        # Ids as narrow as the store keeps them, overwritten by every micro-batch.
        self._narrow = np.empty(0, dtype=id_dtype(store.vocabulary_size))

    def assemble(self, layout: BatchLayout) -> MicroBatch:
        """The micro-batch of this layout."""
        total = layout.rows * layout.row_length
        block = self._memory.take(total)
        input_ids, targets, position_ids = block
        if len(self._narrow) < total:
            self._narrow = np.empty(total, dtype=self._narrow.dtype)
        narrow, count_up, shards = self._narrow[:total], self._count_up, layout.ids
        undivided = layout.pieces.shape[1] == layout.rows and not layout.tails.size
        # A slice of a memory view is copied in half the time that a slice of an array takes.
        ids, positions = narrow.data, position_ids.data
        for shard, source, source_end, begin, end, first, last in zip(*layout.pieces.tolist(), strict=True):
            ids[begin:end] = shards[shard][source:source_end]
            if not undivided:
                positions[begin:end] = count_up[first:last]
        for begin, end in zip(*layout.tails.tolist(), strict=True):
            narrow[begin:end] = self._padding_id
            positions[begin:end] = count_up[: end - begin]
        input_ids[:] = narrow
        targets.fill(IGNORED)
        predicted, following = targets.data, input_ids.data[1:]
        for place in map(slice, *layout.predicting.tolist()):
            predicted[place] = following[place]
        input_ids, targets, position_ids = block.reshape(3, layout.rows, layout.row_length)
        return MicroBatch(
            input_ids, targets, self._counted(layout.rows, layout.row_length) if undivided else position_ids
        )

    def _counted(self, rows: int, row_length: int) -> NDArray[np.int64]:
        """Position ids that count up in every row; the same array each time."""
        if self._undivided.shape != (rows, row_length):
            self._undivided = np.tile(np.arange(row_length), (rows, 1))
        return self._undivided


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
        """An array [3, size] of any content."""
        references = [*map(sys.getrefcount, self._blocks)]
        if references.count(references[0]) == 1:
            self._blocks.append(np.empty(0, dtype=np.int64))
            references.append(references[0])
        free = references.index(references[0], 1)
        if len(self._blocks[free]) < 3 * size:
            self._blocks[free] = np.empty(3 * size, dtype=np.int64)
        return self._blocks[free][: 3 * size].reshape(3, size)
