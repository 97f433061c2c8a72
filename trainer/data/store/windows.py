"""Long documents as overlapping windows in which every token is a target exactly once.

A *sample* is a view of a document: `(start, stop, first_target, head)`, ids `document[:head] + document[start:stop]`.
Position t of the document is a target of the sample when `first_target <= t < stop`; since `first_target > start`, the
token before t is always in the sample too. The overlap gives later windows context; its tokens were already targets of
the window before. A pinned head (system prompt, instruction) stands in front of every later window and is no target
there.

Conversations are cut where a turn ended as long as one ends inside the window. Where no turn begins inside the overlap,
the last window is shifted left until it is full, so the end of a document has as much context as the rest.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UsageError


@dataclass(frozen=True)
class Samples:
    """Samples in the order of their documents, five columns, uint32 [samples] each."""

    document: NDArray[np.uint32]
    start: NDArray[np.uint32]
    stop: NDArray[np.uint32]
    first_target: NDArray[np.uint32]
    head: NDArray[np.uint32]

    def of(self, chosen: NDArray[np.bool_]) -> Samples:
        """The chosen samples."""
        return Samples(*(getattr(self, name)[chosen] for name in SAMPLE_COLUMNS))


SAMPLE_COLUMNS = tuple(Samples.__dataclass_fields__)


def lengths_of(offsets: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Sizes of the parts that rising `offsets` [parts + 1] delimit, int64 [parts]."""
    whole = offsets.astype(np.int64)
    sizes: NDArray[np.int64] = whole[1:] - whole[:-1]
    return sizes


def check_window(window: int, overlap: int) -> None:
    """Refuse windows that cannot advance.

    Raises:
        UsageError: window < 2, overlap < 1 or overlap >= window.
    """
    if window < 2:
        raise UsageError(f"sequence length {window} is too short", "a row needs at least 2 tokens")
    if not 1 <= overlap < window:
        raise UsageError(
            f"overlap {overlap} does not fit sequence length {window}",
            f"give 1 to {window - 1}: neighbouring windows must share a token, and each must bring new ones",
        )


def cut_windows(
    length: int, window: int, overlap: int, turn_ends: Sequence[int] = (), head: int = 0
) -> list[tuple[int, int, int, int]]:
    """Windows of one document of `length` tokens as (start, stop, first_target, head); [] for an empty one.

    Args:
        length: tokens of the document.
        window: most tokens of a sample, its head included.
        overlap: tokens of context before the first new target, fewer where the head leaves no room.
        turn_ends: rising positions where a turn ended.
        head: tokens of the document that stand in front of every window but the first; at most half a window.

    Raises:
        UsageError: see `check_window`.
    """
    check_window(window, overlap)
    if length <= 0:
        return []
    if length <= window:
        return [(0, length, 1, 0)]
    room = window - head
    shared = min(overlap, room - 1)
    # A cut inside the head, or before the first target, would bring nothing.
    ends = turn_ends[bisect_right(turn_ends, max(head, 1)) : bisect_left(turn_ends, length)]
    windows: list[tuple[int, int, int, int]] = []
    start, first, pinned, limit = 0, 1, 0, window
    while True:
        stop = min(limit, length)
        if limit < length and (at := bisect_right(ends, limit)) and ends[at - 1] > first:
            stop = ends[at - 1]
        windows.append((start, stop, first, pinned))
        if stop == length:
            return windows
        first, pinned = stop, head
        start = max(first - shared, head)
        if (at := bisect_left(ends, start)) < len(ends) and ends[at] < first:
            start = ends[at]
        elif start + room > length:
            start = max(length - room, head)
        limit = start + room


def cut_documents(
    lengths: NDArray[np.int64],
    window: int,
    overlap: int,
    turn_ends: NDArray[np.uint32],
    turn_offsets: NDArray[np.uint64],
    heads: NDArray[np.int64],
) -> Samples:
    """`cut_windows` of many documents at once.

    `lengths` and `heads` are int64 [documents]; `turn_ends` uint32 [turns] holds those of all documents, relative to
    their document, which begin at `turn_offsets` uint64 [documents + 1].
    """
    check_window(window, overlap)
    turns = lengths_of(turn_offsets)
    # Only long documents with turns are cut one by one; they are few.
    single = np.flatnonzero((lengths > window) & (turns > 0))
    by_rule = _cut_by_rule(np.where((lengths > window) & (turns > 0), 0, lengths), window, overlap, heads)
    if not len(single):
        return by_rule
    rows = [
        (document, *cut)
        for document in single.tolist()
        for cut in cut_windows(
            int(lengths[document]),
            window,
            overlap,
            turn_ends[int(turn_offsets[document]) : int(turn_offsets[document + 1])].tolist(),
            int(heads[document]),
        )
    ]
    one_by_one = np.array(rows, dtype=np.uint32).T
    joined = [
        np.concatenate([getattr(by_rule, name), column])
        for name, column in zip(SAMPLE_COLUMNS, one_by_one, strict=True)
    ]
    order = np.argsort(joined[0], kind="stable")
    return Samples(*(column[order] for column in joined))


def _cut_by_rule(lengths: NDArray[np.int64], window: int, overlap: int, heads: NDArray[np.int64]) -> Samples:
    """Windows of documents without turns: each advances by the same step."""
    room = window - heads
    step = np.maximum(room - overlap, 1)
    counts = np.where(lengths <= window, (lengths > 0).astype(np.int64), 1 + -(-(lengths - window) // step))
    document = np.repeat(np.arange(len(lengths), dtype=np.int64), counts)
    index = np.arange(len(document), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
    covered = window + (index - 1) * step[document]  # where the window before ends
    stop = np.minimum(np.where(index == 0, window, covered + step[document]), lengths[document])
    start = np.where(index == 0, 0, stop - room[document])
    first_target = np.where(index == 0, 1, covered)
    head = np.where(index == 0, 0, heads[document])
    return Samples(*(column.astype(np.uint32) for column in (document, start, stop, first_target, head)))


def count_targets(
    document: NDArray[np.uint32],
    first: NDArray[np.uint32],
    stop: NDArray[np.uint32],
    spans: NDArray[np.uint32],
    span_offsets: NDArray[np.uint64],
    document_offsets: NDArray[np.uint64],
) -> NDArray[np.int64]:
    """Supervised positions t with first <= t < stop, for each sample, int64; `spans` holds those of all documents."""
    if not len(spans):
        return np.zeros(len(document), dtype=np.int64)
    per_document = lengths_of(span_offsets)
    base = np.repeat(document_offsets[:-1].astype(np.int64), per_document)
    begins = spans[:, 0].astype(np.int64) + base
    ends = spans[:, 1].astype(np.int64) + base
    before = np.concatenate([[0], np.cumsum(ends - begins)])

    def supervised_before(position: NDArray[np.int64]) -> NDArray[np.int64]:
        at = np.searchsorted(begins, position, side="right") - 1
        inside = np.minimum(position, ends[np.maximum(at, 0)]) - begins[np.maximum(at, 0)]
        counted: NDArray[np.int64] = np.where(at < 0, 0, before[np.maximum(at, 0)] + inside)
        return counted

    origin = document_offsets.astype(np.int64)[document]
    counted: NDArray[np.int64] = supervised_before(origin + stop) - supervised_before(origin + first)
    return np.maximum(counted, 0)
