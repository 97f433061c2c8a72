"""Which format a source has and which column holds what: told, or found where there is one reading only."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from trainer.data.records.fields import listing, shorten
from trainer.data.sources import RawRow
from trainer.errors import DataError


@dataclass(frozen=True)
class Layout:
    """What was detected or told for one source: `mapping` is canonical key -> column, for every key that is used."""

    format: str
    mapping: dict[str, str]


@dataclass(frozen=True)
class Format:
    """Canonical keys of a format, and other names under which a column is found when it is the only one of them."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[str, ...]:
        """All canonical keys."""
        return self.required + self.optional


_PROMPTS = ("question", "query", "input", "problem")
_COMPLETIONS = ("response", "answer", "output", "solution")
_TOOLS = {"tools": ("functions",)}

FORMATS: dict[str, Format] = {
    "alpaca": Format(
        ("instruction", "output"), ("input", "system", "history"), {"output": ("response",), "input": ("context",)}
    ),
    "sharegpt": Format(("conversations",), ("system", "tools"), _TOOLS),
    "messages": Format(("messages",), ("system", "tools"), _TOOLS),
    "completion": Format(
        ("prompt", "completion"), ("system", "tools"), {"prompt": _PROMPTS, "completion": _COMPLETIONS, **_TOOLS}
    ),
    "continuation": Format(("prompt", "completion"), (), {"prompt": _PROMPTS, "completion": _COMPLETIONS}),
    "preference": Format(
        ("chosen",),
        ("prompt", "rejected", "system", "tools"),
        {"prompt": (*_PROMPTS, "instruction", "messages", "conversations"), **_TOOLS},
    ),
    "text": Format(("text",), (), {"text": ("document", "content")}),
    "tokens": Format(("input_ids",), ("labels", "loss_mask"), {"loss_mask": ("assistant_masks", "completion_mask")}),
}

# Columns that a prompt and its completion should not lose without a word.
_SAYS_MORE = {"context", "passage", "document", "text", "content", "instruction", "history"}


def detect_layout(row: RawRow, mapping: Mapping[str, str] | None = None, format: str | None = None) -> Layout:
    """The layout of the source whose first row is `row`.

    Args:
        row: the first row.
        mapping: canonical key -> column, for columns with names of their own.
        format: a key of FORMATS; None finds it.

    Raises:
        DataError: no format or more than one fits, a key or column that is not there.
    """
    mapping = dict(mapping or {})
    columns = row.value.keys()
    for key, column in mapping.items():
        if column not in columns:
            raise DataError(
                f"{row.place}: no column '{column}' for '{key}' (columns: {listing(columns)})", _close(column, columns)
            )
    twice = [column for column in mapping.values() if list(mapping.values()).count(column) > 1]
    if twice:
        raise DataError(f"{row.place}: column '{twice[0]}' is mapped twice", "map each column to one key")
    if format is None:
        format = _detect(row, mapping)
    elif format not in FORMATS:
        raise DataError(f"there is no format '{format}'", _close(format, FORMATS))
    layout = Layout(format, mapping)
    for key in mapping:
        if key not in FORMATS[format].keys:
            raise DataError(f"'{key}' is no key of format {format}", _close(key, FORMATS[format].keys))
    found = columns_of(row, layout)
    lost = [key for key in FORMATS[format].required if found[key] not in columns]
    if lost:
        raise DataError(
            f"{row.place}: '{lost[0]}' is missing for format {format} (columns: {listing(columns)})",
            "say which column it is, or another format",
        )
    return Layout(format, {key: found[key] for key in FORMATS[format].keys if key in found})


def columns_of(row: RawRow, layout: Layout) -> dict[str, str]:
    """Canonical key -> column for one row; every required key is there, whether or not the row has the column.

    An optional key that the first row of a source lacked is found in later rows too: nothing is dropped silently.

    Raises:
        DataError: two columns could be the same key.
    """
    format = FORMATS[layout.format]
    mapping = layout.mapping
    told = len(mapping) == len(row.value) and all(column in row.value for column in mapping.values())
    if told and all(key in mapping for key in format.required):
        return mapping  # no column is left to find
    columns = dict(mapping)
    for key in format.keys:
        if key in mapping:
            continue
        column = _column(format, key, row, mapping)
        if column is not None:
            columns[key] = column
        elif key in format.required:
            columns[key] = key
    return columns


def _column(format: Format, key: str, row: RawRow, mapping: Mapping[str, str]) -> str | None:
    """The column of an unmapped key: of its own name, or the only one of its other names."""
    value = row.value
    if key in value and key not in mapping.values():
        return key
    aliases = format.aliases.get(key)
    if aliases is None:
        return None
    found = [alias for alias in aliases if alias in value and alias not in mapping.values()]
    if len(found) > 1:
        raise DataError(f"{row.place}: '{key}' could be {_either(found)}", f"map '{key}' to one of them")
    return found[0] if found else None


def _detect(row: RawRow, mapping: Mapping[str, str]) -> str:
    names = (row.value.keys() - set(mapping.values())) | mapping.keys()
    found = _own_keys(names)
    if not found:
        found = _common_names(row, mapping, names)
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{row.place}: the row could be {_either(found)}", f"say which: --format {found[0]}")
    raise DataError(
        f"{row.place}: no known format (columns: {listing(row.value)})",
        f"say which format it is ({', '.join(FORMATS)}) and which column is which key",
    )


def _own_keys(names: Collection[str]) -> list[str]:
    """Formats with keys that nothing else has."""
    chosen = "chosen" in names and "rejected" in names
    prompted = chosen and "prompt" not in names  # then messages may be the prompt
    answered = "output" in names or "response" in names
    tests = {
        "tokens": "input_ids" in names,
        "preference": chosen,
        "messages": "messages" in names and not prompted,
        "sharegpt": "conversations" in names and not prompted,
        "alpaca": "instruction" in names and answered,
    }
    return [name for name, holds in tests.items() if holds]


def _common_names(row: RawRow, mapping: Mapping[str, str], names: Collection[str]) -> list[str]:
    """Formats whose columns have names that occur elsewhere too."""
    found = []
    prompts = _named("prompt", _PROMPTS, names)
    completions = _named("completion", _COMPLETIONS, names)
    if prompts and completions:
        if len(prompts) + len(completions) > 2:
            both = sorted({*prompts, *completions})
            raise DataError(
                f"{row.place}: more than one reading as a prompt and its completion: {', '.join(both)}",
                "map 'prompt' and 'completion', each to its column",
            )
        more = sorted(name for name in _SAYS_MORE & set(names) if row.value.get(name))
        if more and "text" not in more:
            raise DataError(
                f"{row.place}: '{prompts[0]}' and '{completions[0]}' look like a prompt and its completion, "
                f"but '{more[0]}' would be left out",
                "say --format completion, or map instruction, input and output for --format alpaca",
            )
        found.append("completion")
    strings = [name for name, value in row.value.items() if isinstance(value, str)]
    only = strings[0] if len(strings) == 1 and not mapping else None
    if "text" in names or only in FORMATS["text"].aliases["text"]:
        found.append("text")
    return found


def _named(key: str, aliases: Collection[str], names: Collection[str]) -> list[str]:
    """`key` when a column has this very name, else the aliases that columns have."""
    return [key] if key in names else [alias for alias in aliases if alias in names]


def _either(names: Collection[str]) -> str:
    return " or ".join(map(shorten, names))


def _close(word: str, names: Collection[str]) -> str:
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"there are: {listing(names)}"
