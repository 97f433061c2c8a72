"""Balance of classes: copies of each document, or weights of each class. Both are plain numbers, decided by hashes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainer.data.hashing import seeded
from trainer.errors import UsageError

UNLABELLED = -1
Label = TypeVar("Label", bound=Hashable)


def copies(
    labels: NDArray[np.int64],
    keys: NDArray[np.uint64],
    method: Literal["over", "under"],
    ratio: float = 1.0,
    seed: int = 0,
) -> NDArray[np.int64]:
    """How often each document is in the data afterwards, int64 [n].

    Args:
        labels: int64 [n]; documents without a label (-1) are there once.
        keys: uint64 [n], a hash of each document's content: it decides who is dropped or repeated once more, so that
            the order of the documents does not.
        method: "over" repeats rare classes up to `ratio` times the largest one, "under" drops documents of frequent
            classes down to `ratio` times the smallest one. Classes on the right side of that stay as they are.
        ratio: in (0, 1] for "over", at least 1 for "under".
        seed: any integer; another one chooses other documents.

    Raises:
        UsageError: an unknown method, or a ratio outside its range.
    """
    if method not in ("over", "under"):
        raise UsageError(f"unknown balance method '{method}'", "known: over, under")
    if not (0 < ratio <= 1 if method == "over" else 1 <= ratio < np.inf):
        raise UsageError(f"ratio {ratio:g} for '{method}'", "give 0 to 1 for over, 1 or more for under")
    result = np.ones(len(labels), dtype=np.int64)
    classes, sizes = np.unique(labels[labels != UNLABELLED], return_counts=True)
    if not len(classes):
        return result
    target = round(ratio * int(sizes.max() if method == "over" else sizes.min()))
    order = np.lexsort((seeded(keys, seed), labels))
    starts = np.searchsorted(labels[order], classes)
    for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
        wanted = max(target, size) if method == "over" else min(target, size)
        each, more = divmod(wanted, size)
        members = order[start : start + size]
        result[members] = each
        result[members[:more]] += 1
    return result


def class_weights(
    counts: Mapping[Label, int], method: Literal["inverse", "effective"] = "inverse", beta: float = 0.999
) -> dict[Label, float]:
    """Loss weight of each class; the mean over the classes is 1.

    "inverse": proportional to 1 / count. "effective": to (1 - beta) / (1 - beta**count), the inverse effective number
    of samples (Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", 2019); beta near 1 is inverse
    frequency, beta 0 no weighting.

    Raises:
        UsageError: an unknown method, a count below 1, no class, or a beta outside [0, 1).
    """
    if method not in ("inverse", "effective"):
        raise UsageError(f"unknown class weights '{method}'", "known: inverse, effective")
    if not 0 <= beta < 1:
        raise UsageError(f"beta {beta:g}", "give 0 to less than 1; 0.999 is usual")
    if not counts or min(counts.values()) < 1:
        raise UsageError("class weights need a count above 0 for every class", "leave out classes without documents")
    raw = {
        label: 1 / count if method == "inverse" else (1 - beta) / (1 - beta**count) for label, count in counts.items()
    }
    mean = sum(raw.values()) / len(raw)
    return {label: weight / mean for label, weight in raw.items()}
