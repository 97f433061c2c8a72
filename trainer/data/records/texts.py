"""Rows without a conversation: plain text, and token ids."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.records.fields import RowView, list_of, missing
from trainer.data.records.record import PlainText, TokenIds
from trainer.data.sources import name_of_type
from trainer.errors import DataError

IGNORED = -100


def from_text(row: RowView) -> PlainText:
    """All of the text is trained on."""
    return PlainText("", row.text("text"), row.place)


def from_tokens(row: RowView) -> TokenIds:
    """Ids with `labels` (IGNORED or the id itself) or `loss_mask` (0 or 1); with neither all is trained on."""
    ids = _integers(row, "input_ids")
    if not len(ids):
        raise DataError(f"{row.place}: '{row.name('input_ids')}' is empty", "remove the row")
    if ids.min() < 0:
        raise DataError(f"{row.place}: '{row.name('input_ids')}' has negative ids", "remove padding from the row")
    attention = row.value.get("attention_mask")
    if isinstance(attention, list) and not all(attention):
        raise DataError(f"{row.place}: attention_mask has zeros", "remove padding from the row")
    masks = []
    if row.get("labels") is not None:
        labels = _integers(row, "labels", len(ids))
        wrong = np.flatnonzero((labels != IGNORED) & (labels != ids))
        if len(wrong):
            at = int(wrong[0])
            raise DataError(
                f"{row.place}: {row.name('labels')}[{at}] is {labels[at]} where {row.name('input_ids')}[{at}] is "
                f"{ids[at]}",
                f"write the same id, or {IGNORED} for what is not trained on (labels are not shifted)",
            )
        masks.append(labels != IGNORED)
    if row.get("loss_mask") is not None:
        flags = _integers(row, "loss_mask", len(ids))
        if ((flags != 0) & (flags != 1)).any():
            raise DataError(f"{row.place}: '{row.name('loss_mask')}' has other values than 0 and 1", "write 0 or 1")
        masks.append(flags == 1)
    if len(masks) == 2 and not np.array_equal(*masks):
        raise DataError(
            f"{row.place}: '{row.name('labels')}' and '{row.name('loss_mask')}' disagree", "keep one of them"
        )
    return TokenIds(ids, spans_of(masks[0]) if masks else ((0, len(ids)),), row.place)


def spans_of(mask: NDArray[np.bool_]) -> tuple[tuple[int, int], ...]:
    """(start, stop) of each run of True."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0)).tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def _integers(row: RowView, key: str, length: int | None = None) -> NDArray[np.int64]:
    name, place = row.name(key), row.place
    if name not in row.value:
        raise missing(row.value, name, place)
    given = row.get(key)
    if isinstance(given, np.ndarray) and given.dtype.kind in "iu":
        values: list[Any] | NDArray[Any] = given
    else:
        values = _whole_numbers(list_of(given, name, place), key, name, place)
    if length is not None and len(values) != length:
        raise DataError(
            f"{place}: '{name}' has {len(values)} entries for {length} tokens", "write one entry for each token"
        )
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError as error:
        raise DataError(f"{place}: '{name}' has numbers beyond 64 bits", "write token ids") from error


def _whole_numbers(values: list[Any], key: str, name: str, place: str) -> list[Any]:
    allowed: tuple[type[Any], ...] = (int, bool) if key == "loss_mask" else (int,)
    for index, value in enumerate(values):
        if type(value) not in allowed:
            raise DataError(
                f"{place}: {name}[{index}] must be a whole number, this is {name_of_type(value)}", "write numbers"
            )
    return values
