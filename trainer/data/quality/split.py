"""Splits and folds as functions of a group key: near duplicates and turns of one document never part.

The group of a document is any 64-bit key: the content hash of the first document of its cluster of near duplicates, the
hash of a user or of a file (a row number would change with the order of the rows). Without strata the split of a group
depends on its key and the seed alone, so it stays when data is added or reordered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from trainer.data.hashing import seeded
from trainer.errors import DataError, UsageError


def assign_splits(
    group: NDArray[np.uint64], shares: Mapping[str, float], seed: int, strata: NDArray[np.int64] | None = None
) -> NDArray[np.uint8]:
    """The split of every row as an index into the names of `shares`, uint8 [n]; rows of one group get the same.

    Args:
        group: uint64 [n], the group key of each row.
        shares: share of each split, positive, together 1: {"train": 0.98, "test": 0.02}. Shares are of groups.
        seed: any integer; another one gives an unrelated assignment.
        strata: int64 [n], such as a label or a source. Then every stratum is divided by itself, exact to one group, by
            largest remainders; what rounding takes from a split in one stratum it gets back in the next, so the whole
            is exact to one group too. A group in several strata counts for that of its first row. The price: added
            rows may move a few others.

    Raises:
        UsageError: shares that are not positive or do not sum to 1, no split, or more than 255.
    """
    limits = _limits(shares)
    if strata is None:
        position = seeded(group, seed).astype(np.float64) / 2.0**64
        return np.minimum(np.searchsorted(limits, position, side="right"), len(limits) - 1).astype(np.uint8)
    groups, first, of_row = np.unique(group, return_index=True, return_inverse=True)
    stratum = strata[first]
    ranks = np.lexsort((seeded(groups, seed), stratum))  # by stratum, inside it by hash
    split = np.empty(len(groups), dtype=np.uint8)
    owed = np.zeros(len(limits))
    wanted = np.array(list(shares.values()))
    for members in np.split(ranks, np.flatnonzero(np.diff(stratum[ranks])) + 1):
        quota = wanted * len(members) + owed
        counts = largest_remainder(quota, len(members))
        owed = quota - counts
        split[members] = np.repeat(np.arange(len(limits), dtype=np.uint8), counts)
    return split[of_row]


def largest_remainder(quota: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Whole numbers that sum to `total`, nearest to `quota`: its whole parts, then one more by largest remainder.

    On equal remainders the first wins. A negative quota counts as 0 until all others have theirs.
    """
    counts = np.maximum(np.floor(quota), 0).astype(np.int64)
    while (missing := total - int(counts.sum())) > 0:
        counts[np.argsort(counts - quota, kind="stable")[:missing]] += 1
    while counts.sum() > total:
        counts[np.argmax(np.where(counts > 0, counts - quota, -np.inf))] -= 1
    return counts


def folds(group: NDArray[np.uint64], k: int, seed: int) -> NDArray[np.int64]:
    """The fold 0 to k - 1 of every row, int64 [n], for k-fold cross-validation; rows of one group get the same.

    Raises:
        UsageError: k < 2.
    """
    if k < 2:
        raise UsageError(f"{k} folds", "give at least 2")
    return (seeded(group, seed) % np.uint64(k)).astype(np.int64)


def split_by_time(times: NDArray[np.float64], shares: Mapping[str, float]) -> NDArray[np.uint8]:
    """The split of every row by time, as an index into the names of `shares`, uint8 [n]: the oldest rows get the first.

    Shares are of rows. Rows of one time stay together: they go where the middle one of them belongs.

    Raises:
        UsageError: as `assign_splits`.
        DataError: a time that is not a finite number; names its row.
    """
    limits = _limits(shares)
    if len(bad := np.flatnonzero(~np.isfinite(times))):
        raise DataError(f"row {bad[0]} has the time {times[bad[0]]}", "give every row a time, or leave the row out")
    _, of_row, counts = np.unique(times, return_inverse=True, return_counts=True)
    middle = (np.cumsum(counts) - counts / 2) / max(len(times), 1)
    split = np.minimum(np.searchsorted(limits, middle, side="right"), len(limits) - 1).astype(np.uint8)
    return split[of_row]


def _limits(shares: Mapping[str, float]) -> NDArray[np.float64]:
    """Where in [0, 1] each split ends."""
    values = list(shares.values())
    if not 1 <= len(values) <= 255 or not all(0 < value <= 1 for value in values):
        raise UsageError(f"split shares {dict(shares)}", "give 1 to 255 splits, each a share above 0")
    if not math.isclose(sum(values), 1, abs_tol=1e-6):
        raise UsageError(f"split shares sum to {sum(values):g}", "make them sum to 1")
    return np.cumsum(values)
