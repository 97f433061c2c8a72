"""Values of a row, checked: each helper gives the value or a DataError that names its place."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from trainer.data.sources import name_of_type
from trainer.errors import DataError

# Keys of a row or message that would change training: dropping them would be silent.
WEIGHT_KEYS = ("weight", "loss", "train")
CONTENT_KEYS = ("refusal", "audio", "images", "image", "videos", "video", "audios")
_NOTABLE_KEYS = frozenset(WEIGHT_KEYS + CONTENT_KEYS)

MAX_DEPTH = 64
SHOWN = 40


@dataclass(frozen=True)
class RowView:
    """A row under canonical names: `columns` says which column of `value` holds which key; keys it lacks are absent."""

    value: dict[str, Any]
    columns: dict[str, str]
    place: str

    def get(self, key: str) -> Any:
        """The value, or None when it is null or absent."""
        column = self.columns.get(key)
        return None if column is None else self.value.get(column)

    def name(self, key: str) -> str:
        """What the file calls the key."""
        return self.columns.get(key, key)

    def text(self, key: str) -> str:
        """A string that must be there."""
        return text_of(self.value, self.name(key), self.place)

    def optional_text(self, key: str) -> str:
        """A string; "" when null or absent."""
        value = self.get(key)
        return "" if value is None else self.text(key)


def text_of(value: dict[str, Any], key: str, place: str) -> str:
    """value[key], which must be a string."""
    text = value.get(key)
    if isinstance(text, str):
        return text
    if key not in value:
        raise missing(value, key, place)
    raise DataError(f"{place}: '{key}' must be a string, this is {name_of_type(text)}", "write text, or remove the row")


def optional_text_of(value: dict[str, Any], key: str, place: str) -> str:
    """value[key], a string; "" when null or absent."""
    return "" if value.get(key) is None else text_of(value, key, place)


def list_of(value: Any, key: str, place: str) -> list[Any]:
    """`value`, which must be an array."""
    if not isinstance(value, list):
        raise DataError(f"{place}: '{key}' must be an array, this is {name_of_type(value)}", "write [...]")
    return value


def missing(value: Collection[str], key: str, place: str) -> DataError:
    """The error for a key that a row or message lacks."""
    return DataError(
        f"{place}: '{key}' is missing (there are: {listing(value)})",
        "rows of one file must have one format; see --format",
    )


def listing(names: Collection[str]) -> str:
    """The first names of a row, for messages."""
    shown = sorted(map(shorten, names))
    return ", ".join(shown[:12]) + (", ..." if len(shown) > 12 else "") if shown else "none"


def shorten(text: str) -> str:
    """A text of the data as a message can show it: one line, at most SHOWN characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= SHOWN else f"{flat[: SHOWN - 3]}..."


def refuse_unsupported(value: dict[str, Any], place: str, understood: Collection[str] = ()) -> None:
    """Refuse keys of a row that ask for another training than there is, except the columns `understood`."""
    if _NOTABLE_KEYS.isdisjoint(value):
        return
    for key in WEIGHT_KEYS:
        if key not in understood and value.get(key) not in (None, True, 1):
            raise DataError(
                f"{place}: '{key}' of a whole row asks for another loss than there is", "remove it, or remove the row"
            )
    refuse_contents(value, place, understood)


def refuse_contents(value: dict[str, Any], place: str, understood: Collection[str] = ()) -> None:
    """Refuse images, audio and the like."""
    if _NOTABLE_KEYS.isdisjoint(value):
        return
    for key in CONTENT_KEYS:
        if value.get(key) and key not in understood:
            raise DataError(f"{place}: '{key}' cannot be trained on", "remove it, or remove the row")


def flag_of(item: dict[str, Any], place: str) -> bool | None:
    """Whether a message is flagged to be trained on (`weight`, `train`, `loss`: 0, 1, true or false); None: no flag.

    Raises:
        DataError: another value, such as a fractional weight, or two flags that disagree.
    """
    if _NOTABLE_KEYS.isdisjoint(item):
        return None
    found: dict[str, bool] = {}
    for key in WEIGHT_KEYS:
        flag = item.get(key)
        if flag is None:
            continue
        if not isinstance(flag, (bool, int, float)) or flag not in (0, 1):
            said = flag if isinstance(flag, (int, float)) else name_of_type(flag)
            raise DataError(
                f"{place}: '{key}': {shorten(str(said))} is not supported", "write 0 or 1, or remove the row"
            )
        found[key] = bool(flag)
    if len(set(found.values())) > 1:
        raise DataError(f"{place}: {' and '.join(map(repr, found))} disagree", "keep one of them")
    return next(iter(found.values()), None)


def json_of(text: str, what: str, place: str) -> Any:
    """The value of JSON text inside a row, held to the limits of a row.

    Raises:
        DataError: not JSON, too deep, or with characters that UTF-8 forbids (an escape can smuggle them in).
    """
    try:
        value = _decoder.decode(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: {what} is not JSON", "write an object, or the JSON text of one") from error
    waiting = [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise DataError(f"{place}: {what} is nested deeper than {MAX_DEPTH} levels", "flatten it")
        if isinstance(item, dict):
            waiting.extend((part, depth + 1) for pair in item.items() for part in pair)
        elif isinstance(item, list):
            waiting.extend((part, depth + 1) for part in item)
        elif isinstance(item, str) and ("\0" in item or not _is_unicode(item)):
            raise DataError(f"{place}: {what} has a NUL or half of a surrogate pair", "remove it")
    return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_decoder = json.JSONDecoder(parse_constant=_no_constant)
