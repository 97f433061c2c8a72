"""The steps that need nothing but one row: clean, filter, replace personal data, find the facts that decisions need.

The order is fixed: what is repaired first need not be refused later, and personal data is replaced before a text is
compared with others, so that two rows that differ only in it are duplicates.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from trainer.data.build.recipe import Recipe
from trainer.data.quality.augment import AugmentSpec, augmentations, load_synonyms
from trainer.data.quality.decontaminate import EvalIndex, contamination
from trainer.data.quality.duplicates import duplicate_key, signature
from trainer.data.quality.filters import LengthLimits, filter_reason, length_reason, script_reason
from trainer.data.quality.missing import abnormal_turn, fix_record
from trainer.data.quality.pii import replace_pii_in
from trainer.data.quality.text import identity_of, text_of
from trainer.data.records import Record, TokenIds
from trainer.data.sources import RawRow
from trainer.data.store.report import Tally
from trainer.errors import DataError

CONTAMINATED = "rows with text of the evaluation files"
_REPAIRS = {"control_characters": "control characters removed", "unicode_composed": "texts composed to NFC"}
_WORDS = {
    "too_short": "rows that are too short",
    "too_long": "rows that are too long",
    "answer_too_short": "rows whose answer is too short",
    "answer_too_long": "rows whose answer is too long",
    "script": "rows in another script",
}


@dataclass(frozen=True)
class Facts:
    """What decisions over all rows need to know of one.

    `key` names its text (two uint64), `group` what must stay in one split, `label` is "" and `time` NaN where the
    recipe names no column for it.
    """

    key: tuple[int, int]
    group: int
    label: str
    time: float
    signature: NDArray[np.uint32] | None


class RowSteps:
    """The row-local steps of a recipe.

    Args:
        recipe: what to do.
        evaluation: n-grams of the evaluation texts that no row may contain; None for none.
    """

    def __init__(self, recipe: Recipe, evaluation: EvalIndex | None) -> None:
        self._recipe = recipe
        self._evaluation = evaluation
        self._lengths = LengthLimits(
            min_characters=recipe.keep.min_characters,
            max_characters=recipe.keep.max_characters,
            min_answer=recipe.keep.min_answer_characters,
        )
        self._augment = _augment_spec(recipe)

    def clean(self, record: Record, place: str, changed: Tally) -> tuple[Record, str | None]:
        """The record as it goes on, and the reason why it is left out, or None; counts what was changed.

        Raises:
            DataError: an abnormal value under `clean.missing: fail`, or the user's own filter failed.
        """
        if isinstance(record, TokenIds):
            return record, None
        clean = self._recipe.clean
        if clean.repair:
            record, counts = fix_record(record)
            for repair, count in counts.items():
                changed.add(_REPAIRS[repair], place, count)
        reason = self._abnormal(record, place)
        if reason is None:
            reason = self._filtered(record, place)
        if reason is None and clean.pii:
            record, counts = replace_pii_in(record, clean.pii, clean.pii_salt)
            for kind, count in counts.items():
                changed.add(f"personal data replaced: {kind}", place, count)
        if reason is None and self._evaluation is not None:
            share = contamination(text_of(record), self._evaluation)
            reason = CONTAMINATED if share > self._recipe.decontaminate.max_share else None
        return record, reason

    def facts(self, row: RawRow, record: Record) -> Facts:
        """The facts of one row.

        Raises:
            DataError: a column of the recipe is missing in the row, or its value is not what it must be.
        """
        recipe = self._recipe
        key = _tokens_key(record) if isinstance(record, TokenIds) else duplicate_key(identity_of(record))
        group = key[0]
        if recipe.split.group_by is not None:
            group = xxhash.xxh3_64_intdigest(str(_column(row, recipe.split.group_by)).encode())
        label = "" if recipe.label.column is None else self._label(row, recipe.label.column)
        time = float("nan") if recipe.split.time_column is None else _time(row, recipe.split.time_column)
        minhash = signature(identity_of(record)) if recipe.duplicates.near != "off" else None
        return Facts(key, group, label, time, minhash)

    def copies(self, record: Record, facts: Facts) -> list[Record]:
        """Changed copies of a row for the training split."""
        if self._augment is None or isinstance(record, TokenIds):
            return []
        return augmentations(record, self._augment, facts.key[0])

    def _abnormal(self, record: Record, place: str) -> str | None:
        if self._recipe.clean.missing == "keep" or (found := abnormal_turn(record)) is None:
            return None
        reason, turn = found
        if self._recipe.clean.missing == "fail":
            raise DataError(f"{place}: {reason.replace('_', ' ')} in {turn}", "repair the row, or clean.missing=drop")
        return f"rows with an abnormal value: {reason.replace('_', ' ')}"

    def _filtered(self, record: Record, place: str) -> str | None:
        keep = self._recipe.keep
        reason = length_reason(record, self._lengths)
        if reason is None and keep.scripts:
            reason = script_reason(text_of(record), keep.scripts, keep.script_share)
        if reason is None and keep.hook is not None:
            reason = filter_reason(keep.hook, text_of(record), place, Path.cwd())
        return None if reason is None else _WORDS.get(reason, f"rows refused by {reason}")

    def _label(self, row: RawRow, column: str) -> str:
        label = str(_column(row, column))
        known = self._recipe.label.values
        if known and label not in known:
            listing = ", ".join(known[:8])
            raise DataError(f"{row.place}: label {label!r} is not in the label set", f"known labels: {listing}")
        return label


def _augment_spec(recipe: Recipe) -> AugmentSpec | None:
    augment = recipe.augment
    if not augment.copies:
        return None
    return AugmentSpec(
        copies=augment.copies,
        swap=augment.swap,
        drop=augment.drop,
        synonyms=augment.synonyms,
        synonym_table=load_synonyms(Path(augment.synonym_file)) if augment.synonym_file else {},
        seed=recipe.seed,
    )


def _column(row: RawRow, column: str) -> Any:
    value = row.value.get(column)
    if value is None:
        listing = ", ".join(sorted(row.value)[:8])
        raise DataError(f"{row.place}: no value in column '{column}'", f"the row has: {listing}")
    return value


def _time(row: RawRow, column: str) -> float:
    """Seconds, or any rising number; dates as ISO 8601."""
    value = _column(row, column)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, datetime.datetime | datetime.date):
        value = value.isoformat()
    try:
        text = str(value)
        return float(text) if text.replace(".", "", 1).isdigit() else _utc(datetime.datetime.fromisoformat(text))
    except (ValueError, OverflowError) as error:
        raise DataError(
            f"{row.place}: '{column}' is {str(value)[:40]!r}, neither a number nor a date",
            "write 2026-01-31T12:00:00, 2026-01-31 or a number",
        ) from error


def _utc(moment: datetime.datetime) -> float:
    """Times without a zone are taken as UTC: a split must not depend on the machine."""
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()


def _tokens_key(record: TokenIds) -> tuple[int, int]:
    digest = xxhash.xxh3_128_intdigest(np.ascontiguousarray(record.ids).tobytes())
    return digest >> 64, digest & ((1 << 64) - 1)
