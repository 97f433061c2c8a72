"""Leakage: texts that two or more splits share, exactly or nearly. Evaluation on them measures memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data.quality.duplicates import (
    PERMUTATIONS,
    THRESHOLD,
    duplicate_key,
    exact_duplicates,
    near_duplicates,
    signature,
    similarity,
)


@dataclass(frozen=True)
class Leak:
    """`place` of `split` has the text of `other_place` in `other_split`; `similarity` is an estimate, 1.0 if exact."""

    split: str
    place: str
    other_split: str
    other_place: str
    kind: str
    similarity: float


@dataclass(frozen=True)
class LeakReport:
    """All leaks; `counts`: texts of a split that another one has, by (split, other split, "exact" | "near").

    `texts` is how many texts each split has.
    """

    leaks: list[Leak]
    counts: dict[tuple[str, str, str], int]
    texts: dict[str, int]


def find_leaks(splits: Mapping[str, Iterable[tuple[str, str]]], threshold: float = THRESHOLD) -> LeakReport:
    """Every text that an earlier split has too, each once per earlier split, with its most similar text there.

    Args:
        splits: (place, text) of each split, in order of importance: {"train": ..., "test": ...} reports texts of test.
        threshold: estimated Jaccard similarity from which two texts are near duplicates. An exact leak is no near one.

    Texts are read one by one and not kept; a signature of half a KiB, a key and the place of each are.

    Raises:
        UsageError: a threshold outside [0.2, 1].
    """
    names = list(splits)
    places: list[str] = []
    keys: list[tuple[int, int]] = []
    columns: list[NDArray[np.uint32]] = []
    owners: list[int] = []
    for number, rows in enumerate(splits.values()):
        for place, text in rows:
            places.append(place)
            keys.append(duplicate_key(text))
            columns.append(signature(text))
            owners.append(number)
    owner = np.array(owners, dtype=np.int64)
    same = exact_duplicates(np.array(keys, dtype=np.uint64).reshape(-1, 2))
    sketch = np.array(columns, dtype=np.uint32).reshape(-1, PERMUTATIONS)
    cluster = near_duplicates(sketch, threshold)

    leaks = []
    for rows_of_cluster in _shared(cluster, owner):
        earlier = rows_of_cluster[:0]
        for number in np.unique(owner[rows_of_cluster]):
            mine = rows_of_cluster[owner[rows_of_cluster] == number]
            for row in mine:
                leaks += _best_matches(int(row), earlier, owner, same, sketch, threshold)
            earlier = np.concatenate([earlier, mine[np.unique(same[mine], return_index=True)[1]]])
    found = [
        Leak(names[owner[row]], places[row], names[owner[other]], places[other], kind, alike)
        for row, other, kind, alike in sorted(leaks)
    ]
    counts = Counter((leak.split, leak.other_split, leak.kind) for leak in found)
    return LeakReport(found, dict(counts), {name: owners.count(number) for number, name in enumerate(names)})


def _shared(cluster: NDArray[np.int64], owner: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Rows of each cluster that has rows of more than one split."""
    order = np.argsort(cluster, kind="stable")
    edges = np.flatnonzero(np.diff(cluster[order])) + 1
    return [rows for rows in np.split(order, edges) if len(rows) > 1 and len(np.unique(owner[rows])) > 1]


def _best_matches(
    row: int,
    earlier: NDArray[np.int64],
    owner: NDArray[np.int64],
    same: NDArray[np.int64],
    sketch: NDArray[np.uint32],
    threshold: float,
) -> list[tuple[int, int, str, float]]:
    """(row, its best match, kind, similarity) for each split among the `earlier` rows that has one."""
    matches = []
    alike = similarity(sketch[earlier], sketch[row])
    exact = same[earlier] == same[row]
    for number in np.unique(owner[earlier]):
        candidates = np.flatnonzero(owner[earlier] == number)
        best = candidates[np.lexsort((-alike[candidates], ~exact[candidates]))[0]]
        if exact[best]:
            matches.append((row, int(earlier[best]), "exact", 1.0))
        elif alike[best] >= threshold:
            matches.append((row, int(earlier[best]), "near", float(alike[best])))
    return matches
