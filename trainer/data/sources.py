"""Local files to raw rows, each with its place `file:line`, so that every later complaint can name a line.

Readable: JSON Lines (one object a line), a JSON array of objects, and a directory written by
`datasets.Dataset.save_to_disk`. Bytes are read and decoded here, strictly, instead of by a general loader: a general
loader guesses encodings, replaces what it cannot decode and counts rows, not lines. Limits keep a hostile or broken
file from ending in a crash: a row has at most 16 MiB and 64 levels of nesting.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import DataError, MissingInputError

MAX_ROW_BYTES = 16 << 20
MAX_DEPTH = 64
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_TYPE_NAMES = {dict: "object", list: "array", str: "string", int: "number", float: "number", bool: "boolean"}


@dataclass(frozen=True)
class RawRow:
    """One row as written: `value` is a JSON object, `line` counts from 1 (in a datasets directory: rows)."""

    value: dict[str, Any]
    file: str
    line: int

    @property
    def place(self) -> str:
        """`file:line` for messages."""
        return f"{self.file}:{self.line}"


def read_rows(path: Path) -> Iterator[RawRow]:
    """Every row of a file or of a `datasets` directory, in order.

    Raises:
        MissingInputError: nothing is at `path`.
        DataError: an unreadable encoding, bad JSON, a row that is no object, a limit exceeded, no rows at all.
    """
    require_input(path)
    if path.is_dir():
        rows = _rows_of_saved_dataset(path)
    else:
        _refuse_other_containers(path)
        rows = _rows_of_array(path) if _first_byte(path) == b"[" else _rows_of_lines(path)
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataError(f"{path} has no rows", "give a file with at least one row, or leave it out")


def read_lines(path: Path) -> Iterator[str]:
    """Lines of a plain text file, strict UTF-8, without their line ends."""
    require_input(path)
    if path.is_dir():
        raise MissingInputError(f"{path} is a directory, not a text file", "check the path given with --input")
    with path.open("rb") as stream:
        number = 0
        while raw := stream.readline(MAX_ROW_BYTES + 2):
            number += 1
            if len(raw) > MAX_ROW_BYTES + 1:
                raise _too_long(f"{path}:{number}")
            yield _decode(raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw, str(path), number).rstrip("\r\n")


def require_input(path: Path) -> None:
    """Refuse what is not there, and pipes and devices: an input is read more than once, so parts would be lost.

    Raises:
        MissingInputError: no file or directory is at `path`.
    """
    if path.is_file() or path.is_dir():
        return
    if path.exists():
        raise MissingInputError(f"{path} is a pipe or a device, not a file", "write it to a file first")
    raise MissingInputError(f"there is no input {path}", "check the path given with --input")


def name_of_type(value: object) -> str:
    """The JSON word for a value's type, for messages."""
    return "null" if value is None else _TYPE_NAMES.get(type(value), type(value).__name__)


def _refuse_other_containers(path: Path) -> None:
    """Name a file that is plainly something else (compressed, Parquet, UTF-16) instead of calling it bad JSON."""
    try:
        with path.open("rb") as stream:
            head = stream.read(4)
    except OSError as error:
        raise MissingInputError(
            f"cannot read {path}: {error.strerror}", "check the path and its permissions"
        ) from error
    if head[:2] == b"\x1f\x8b" or head == b"\x28\xb5\x2f\xfd":
        raise DataError(f"{path} is compressed", "decompress it first (gunzip, unzstd)")
    if head == b"PAR1":
        raise DataError(
            f"{path} is a Parquet file", "convert it with datasets: Dataset.from_parquet(...).save_to_disk(...)"
        )
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path} is UTF-16 text", f"convert it: iconv -f UTF-16 -t UTF-8 {path.name} > utf8.json")


def _first_byte(path: Path) -> bytes:
    """The first byte that is neither a byte order mark nor white space; empty when there is none."""
    with path.open("rb") as stream:
        head = stream.read(1 << 16).removeprefix(BYTE_ORDER_MARK)
        while head and not (stripped := head.lstrip()):
            head = stream.read(1 << 16)
        return stripped[:1] if head else b""


def _decode(raw: bytes, file: str, line: int) -> str:
    """Strict UTF-8 without NUL; the message guesses what the bytes are instead."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"{file}:{line + raw.count(bytes([10]), 0, error.start)}"
        try:
            raw.decode("gb18030")
            guess = "it may be GB18030/GBK: iconv -f GB18030 -t UTF-8"
        except UnicodeDecodeError:
            guess = "it may be Latin-1 or Windows-1252: iconv -f WINDOWS-1252 -t UTF-8"
        raise DataError(f"{place}: byte 0x{raw[error.start]:02x} is not UTF-8", guess) from error
    if (at := text.find("\0")) >= 0:
        raise DataError(f"{file}:{line + text.count(chr(10), 0, at)}: a NUL byte", "remove it; the file may be damaged")
    return text


def _rows_of_lines(path: Path) -> Iterator[RawRow]:
    """JSON Lines; blank lines are skipped."""
    file = str(path)
    with path.open("rb") as stream:
        line = 0
        while raw := stream.readline(MAX_ROW_BYTES + 2):
            line += 1
            if line == 1:
                raw = raw.removeprefix(BYTE_ORDER_MARK)
            complete = raw.endswith(b"\n")
            if len(raw) > MAX_ROW_BYTES and not (complete and len(raw) <= MAX_ROW_BYTES + 2):
                raise _too_long(f"{file}:{line}")
            text = _decode(raw, file, line).strip(" \t\r\n")
            if not text:
                continue
            try:
                value, end = _decoder.raw_decode(text)
                if end != len(text):
                    raise json.JSONDecodeError("more text after the row's end", text, end)
            except (ValueError, RecursionError) as error:
                truncated = not complete and isinstance(error, json.JSONDecodeError)
                raise _bad_json(error, f"{file}:{line}", truncated=truncated) from error
            yield _checked(value, text, file, line)


def _rows_of_array(path: Path) -> Iterator[RawRow]:
    """The elements of one JSON array; the place of a row is the line on which it starts."""
    file = str(path)
    text = _decode(path.read_bytes().removeprefix(BYTE_ORDER_MARK), file, 1)
    at, line, counted = _skip_space(text, 0) + 1, 1, 0
    after_comma = False
    while True:
        at = _skip_space(text, at)
        line += text.count("\n", counted, at)
        counted = at
        place = f"{file}:{line}"
        if at >= len(text):
            raise DataError(f"{place}: the file ends inside the array (cut off?)", "get a complete copy of the file")
        if text[at] == "]" and not after_comma:
            break
        try:
            value, end = _decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            truncated = isinstance(error, json.JSONDecodeError) and error.pos >= len(text.rstrip())
            exact = line + text.count("\n", at, error.pos) if isinstance(error, json.JSONDecodeError) else line
            raise _bad_json(error, f"{file}:{exact}", truncated=truncated) from error
        if end - at > MAX_ROW_BYTES:
            raise _too_long(place)
        yield _checked(value, text[at:end], file, line)
        at = _skip_space(text, end)
        after_comma = text[at : at + 1] == ","
        if after_comma:
            at += 1
        elif at < len(text) and text[at] != "]":
            exact = line + text.count("\n", counted, at)
            raise DataError(
                f"{file}:{exact}: expected ',' or ']' after a row", "the file is not one JSON array; repair it"
            )
    rest = _skip_space(text, at + 1)
    if rest < len(text):
        exact = 1 + text.count("\n", 0, rest)
        raise DataError(f"{file}:{exact}: text after the end of the array", "keep one JSON array, or one object a line")


def _rows_of_saved_dataset(path: Path) -> Iterator[RawRow]:
    """Rows of `Dataset.save_to_disk`; Arrow fills absent keys with null, so nested nulls are taken as absent."""
    from datasets import Dataset, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except Exception as error:
        raise DataError(
            f"{path} is a directory that datasets.load_from_disk cannot open",
            "give a JSON or JSON Lines file, or a directory written by Dataset.save_to_disk",
        ) from error
    if not isinstance(dataset, Dataset):
        names = ", ".join(str(name) for name in dataset)
        raise DataError(f"{path} holds several splits ({names})", "give one of its subdirectories")
    for number, row in enumerate(dataset, start=1):
        value = {key: _without_nulls(item) for key, item in row.items()}
        _refuse_bad_strings(value, f"{path}:{number}")
        yield RawRow(value, str(path), number)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_decoder = json.JSONDecoder(parse_constant=_no_constant)


def _too_long(place: str) -> DataError:
    return DataError(f"{place}: the row is longer than {MAX_ROW_BYTES >> 20} MiB", "split it, or check the line ends")


def _bad_json(error: Exception, place: str, *, truncated: bool) -> DataError:
    if isinstance(error, RecursionError):
        return _too_deep(place)
    if truncated:
        return DataError(f"{place}: the file ends in the middle of a row (cut off?)", "get a complete copy of the file")
    reason = f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else str(error)
    return DataError(f"{place}: not JSON: {reason}", "write one JSON object a line, or one JSON array of objects")


def _too_deep(place: str) -> DataError:
    return DataError(f"{place}: nested deeper than {MAX_DEPTH} levels", "flatten the row")


def _checked(value: Any, text: str, file: str, line: int) -> RawRow:
    place = f"{file}:{line}"
    if not isinstance(value, dict):
        raise DataError(
            f"{place}: a row must be a JSON object, this is {name_of_type(value)}", "see steadfast data build --help"
        )
    if text.count("{") + text.count("[") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise _too_deep(place)
    if "\\u" in text:
        _refuse_bad_strings(value, place)
    return RawRow(value, file, line)


def _depth(value: Any) -> int:
    """Levels of nesting, without recursion."""
    deepest, waiting = 0, [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else None
        if children is not None:
            deepest = max(deepest, depth)
            waiting.extend((child, depth + 1) for child in children)
    return deepest


def _refuse_bad_strings(value: Any, place: str) -> None:
    """Escapes can smuggle in what UTF-8 forbids: NUL and half of a surrogate pair."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting.extend(item.keys())
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
        elif isinstance(item, str):
            if "\0" in item:
                raise DataError(f"{place}: a NUL character (\\u0000)", "remove it")
            try:
                item.encode("utf-8")
            except UnicodeEncodeError as error:
                code = f"\\u{ord(item[error.start]):04x}"
                raise DataError(
                    f"{place}: half of a surrogate pair ({code})", "remove it or write the whole pair"
                ) from error
