"""Over all rows of a build: which are left out as duplicates, which store each goes to, and how often it is there.

Everything that cannot be decided from a row alone is decided here, in one process, over a few columns (some 60 bytes
a row), after the parts were made and before the shards are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.build.parts import Part
from trainer.data.build.recipe import Recipe
from trainer.data.quality.balance import copies as balanced_copies
from trainer.data.quality.duplicates import exact_duplicates, near_duplicates
from trainer.data.quality.split import assign_splits, folds, split_by_time
from trainer.data.store.report import DUPLICATE, NEAR_DUPLICATE

OUT_OF_BALANCE = "rows left out of training for balance"
LEFT_OUT = -1


@dataclass(frozen=True)
class RowTable:
    """Columns over all rows, in the order of the input; `parent` is a row of the table or -1."""

    source: NDArray[np.uint16]
    file: NDArray[np.uint32]
    line: NDArray[np.uint32]
    key: NDArray[np.uint64]
    group: NDArray[np.uint64]
    label: NDArray[np.int32]
    time: NDArray[np.float64]
    parent: NDArray[np.int64]
    first_of_part: NDArray[np.int64]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class StorePlan:
    """One store of the build: which splits go into it, and whether it is trained on."""

    name: str
    splits: tuple[int, ...]
    training: bool


@dataclass(frozen=True)
class Decision:
    """What becomes of every row.

    `split` is the number of its split or LEFT_OUT; `copies` how often it is in a training store (1 unless balanced; a
    store that is held out has every original row once and no augmented one). `left_out` and `kept` list rows by reason;
    `repeats` is the row that a duplicate repeats, itself where it repeats none.
    """

    stores: tuple[StorePlan, ...]
    split: NDArray[np.int16]
    copies: NDArray[np.int32]
    left_out: tuple[tuple[str, NDArray[np.int64]], ...]
    kept: tuple[tuple[str, NDArray[np.int64]], ...]
    repeats: NDArray[np.int64]

    def kept_rows(self, table: RowTable) -> NDArray[np.bool_]:
        """Which original rows are in a store, bool [rows]."""
        anywhere = [self.copies_in(store, table) > 0 for store in self.stores]
        kept: NDArray[np.bool_] = np.any(anywhere, axis=0) & (table.parent < 0)
        return kept

    def copies_in(self, store: StorePlan, table: RowTable) -> NDArray[np.int32]:
        """How often every row is in one store, int32 [rows]."""
        copies = self.copies if store.training else (table.parent < 0).astype(np.int32)
        return np.where(np.isin(self.split, store.splits), copies, 0).astype(np.int32)


def row_table(parts: Sequence[Part]) -> RowTable:
    """The rows of all parts as one table."""
    labels: dict[str, int] = {}
    for part in parts:
        for label in part.labels:
            if label:
                labels.setdefault(label, len(labels))
    sizes = [len(part.arrays["line"]) for part in parts]
    first = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def column(name: str) -> NDArray[Any]:
        return np.concatenate([part.arrays[name] for part in parts])

    return RowTable(
        source=np.repeat(np.array([part.source for part in parts], dtype=np.uint16), sizes),
        file=np.repeat(np.array([part.file for part in parts], dtype=np.uint32), sizes),
        line=column("line"),
        key=column("key"),
        group=column("group"),
        label=np.concatenate(
            [
                np.array([labels.get(label, -1) for label in part.labels], dtype=np.int32)[part.arrays["label"]]
                for part in parts
            ]
        ),
        time=column("time"),
        parent=np.concatenate(
            [
                np.where(part.arrays["parent"] < 0, -1, part.arrays["parent"] + start)
                for part, start in zip(parts, first, strict=False)
            ]
        ),
        first_of_part=first,
        labels=tuple(labels),
    )


def decide(table: RowTable, parts: Sequence[Part], recipe: Recipe, scratch: Path) -> Decision:
    """Decide over all rows; `scratch` is a directory for a file of signatures."""
    n = len(table.line)
    original = np.flatnonzero(table.parent < 0)
    repeats = np.arange(n, dtype=np.int64)
    left_out: list[tuple[str, NDArray[np.int64]]] = []
    kept: list[tuple[str, NDArray[np.int64]]] = []
    alive = np.ones(n, dtype=bool)

    repeats[original] = original[exact_duplicates(table.key[original])]
    exact = original[repeats[original] != original]
    (left_out if recipe.duplicates.exact == "drop" else kept).append((DUPLICATE, exact))
    if recipe.duplicates.exact == "drop":
        alive[exact] = False
    group = table.group.copy()
    if recipe.duplicates.near != "off":
        rows = original[alive[original]]
        clusters = rows[near_duplicates(_signatures(parts, rows, table, scratch), recipe.duplicates.threshold)]
        near = rows[(clusters != rows) & (repeats[rows] == rows)]
        repeats[rows] = np.where(clusters != rows, clusters, repeats[rows])
        (left_out if recipe.duplicates.near == "drop" else kept).append((NEAR_DUPLICATE, near))
        if recipe.duplicates.near == "drop":
            alive[near] = False
        if recipe.split.group_by is None:
            group[rows] = table.group[clusters]
    _follow_parents(table, alive, group)

    split = _split(table, group, recipe)
    split[~alive] = LEFT_OUT
    stores = _stores(recipe)
    copies = np.ones(n, dtype=np.int32)
    if recipe.balance.method != "none":
        trained = {number for store in stores if store.training for number in store.splits}
        rows = np.flatnonzero(np.isin(split, list(trained)))
        classes = (table.label if recipe.label.column else table.source).astype(np.int64)[rows]
        copies[rows] = balanced_copies(
            classes, table.key[rows, 0], recipe.balance.method, recipe.balance.ratio, recipe.seed
        )
        gone = rows[(copies[rows] == 0) & (table.parent[rows] < 0)]
        # With folds a row that is not trained on is still validated on.
        (kept if recipe.split.folds else left_out).append((OUT_OF_BALANCE, gone))
    return Decision(
        stores=stores,
        split=split,
        copies=copies,
        left_out=tuple((reason, rows) for reason, rows in left_out if len(rows)),
        kept=tuple((reason, rows) for reason, rows in kept if len(rows)),
        repeats=repeats,
    )


def _stores(recipe: Recipe) -> tuple[StorePlan, ...]:
    """One store; or one a share, of which the first is trained on; or two a fold."""
    numbers = range(recipe.split.folds)
    if numbers:
        return tuple(
            store
            for fold in numbers
            for store in (
                StorePlan(f"fold-{fold}/train", tuple(other for other in numbers if other != fold), training=True),
                StorePlan(f"fold-{fold}/validation", (fold,), training=False),
            )
        )
    if recipe.split.shares:
        return tuple(StorePlan(name, (n,), training=n == 0) for n, name in enumerate(recipe.split.shares))
    return (StorePlan("", (0,), training=True),)


def _split(table: RowTable, group: NDArray[np.uint64], recipe: Recipe) -> NDArray[np.int16]:
    """The split of every row."""
    split = recipe.split
    strata = None
    if split.stratify_by is not None:
        strata = (table.source if split.stratify_by == "source" else table.label).astype(np.int64)
    if split.folds and strata is None:
        return folds(group, split.folds, recipe.seed).astype(np.int16)
    if split.time_column is not None:
        return split_by_time(table.time, split.shares).astype(np.int16)
    shares = split.shares or {str(fold): 1 / split.folds for fold in range(split.folds)}
    if shares:
        return assign_splits(group, shares, recipe.seed, strata).astype(np.int16)
    return np.zeros(len(group), dtype=np.int16)


def _follow_parents(table: RowTable, alive: NDArray[np.bool_], group: NDArray[np.uint64]) -> None:
    """Augmented rows share the fate of the row they were made from."""
    augmented = np.flatnonzero(table.parent >= 0)
    alive[augmented] = alive[table.parent[augmented]]
    group[augmented] = group[table.parent[augmented]]


def _signatures(parts: Sequence[Part], rows: NDArray[np.int64], table: RowTable, scratch: Path) -> NDArray[np.uint32]:
    """MinHash signatures of `rows` as a memory map, so that they need not fit in memory."""
    width = max(part.arrays["signature"].shape[1] for part in parts)
    gathered = np.memmap(scratch / "signatures", dtype=np.uint32, mode="w+", shape=(max(len(rows), 1), max(width, 1)))
    at = 0
    for part, first in zip(parts, table.first_of_part, strict=False):
        mine = rows[(rows >= first) & (rows < first + len(part.arrays["line"]))] - first
        gathered[at : at + len(mine)] = part.arrays["signature"][mine] if len(mine) else 0
        at += len(mine)
    return gathered[: len(rows)]
