"""Long documents as overlapping windows in which every token is a target exactly once.

A *sample* is a view of a document: `(start, stop, first_target)`, ids `document[start:stop]`. Position t of the
document is a target of the sample when `first_target <= t < stop`; since `first_target > start`, the token before t is
always in the sample too. The overlap gives later windows context; its tokens were already targets of the window before.

The last window is shifted left until it is full, so the end of a document has as much context as the rest.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UsageError


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


def cut_windows(length: int, window: int, overlap: int) -> list[tuple[int, int, int]]:
    """Windows of one document of `length` tokens as (start, stop, first_target); [] for an empty one."""
    check_window(window, overlap)
    if length <= 0:
        return []
    windows = [(0, min(length, window), 1)]
    while (covered := windows[-1][1]) < length:
        stop = min(covered - overlap + window, length)
        windows.append((stop - window, stop, covered))
    return windows


def cut_documents(
    lengths: NDArray[np.int64], window: int, overlap: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint32]]:
    """`cut_windows` of many documents at once: columns (document, start, stop, first_target) in document order."""
    check_window(window, overlap)
    step = window - overlap
    counts = np.where(lengths <= window, (lengths > 0).astype(np.int64), 1 + -(-(lengths - window) // step))
    document = np.repeat(np.arange(len(lengths), dtype=np.int64), counts)
    index = np.arange(len(document), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
    covered = window + (index - 1) * step  # where the window before ends
    stop = np.minimum(np.where(index == 0, window, covered + step), lengths[document])
    start = np.where(index == 0, 0, stop - window)
    first_target = np.where(index == 0, 1, covered)
    columns = (document, start, stop, first_target)
    return tuple(column.astype(np.uint32) for column in columns)  # type: ignore[return-value]


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
