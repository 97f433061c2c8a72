"""What makes a row unreadable, whatever container it comes from."""

from __future__ import annotations

import json
import re
from typing import Any

from trainer.data.sources.rows import MAX_DEPTH, MAX_ROW_BYTES, SHOWN_BYTES, BadRow, name_of_type

JSON_SPACE = " \t\r\n"


class RowProblem(Exception):
    """Why a row cannot be read: fact, remedy, and how many lines below the row's first one the trouble is."""

    def __init__(self, fact: str, remedy: str, lines_down: int = 0) -> None:
        super().__init__(fact)
        self.fact = fact
        self.remedy = remedy
        self.lines_down = lines_down

    def bad_row(self, file: str, line: int, byte: int | None, raw: bytes) -> BadRow:
        """The problem with its place."""
        fact = f"{file}:{line + self.lines_down}: {self.fact}"
        return BadRow(file, line, byte, fact, self.remedy, raw[:SHOWN_BYTES])


def row_too_long() -> RowProblem:
    """The row has more bytes than a row may have."""
    return RowProblem(f"the row is longer than {MAX_ROW_BYTES >> 20} MiB", "split it, or check the line ends")


def decode(raw: bytes) -> str:
    """Strict UTF-8 without NUL, at most 16 MiB.

    Raises:
        RowProblem: anything else; the remedy guesses what the bytes are instead.
    """
    if len(raw) > MAX_ROW_BYTES:
        raise row_too_long()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        try:
            raw.decode("gb18030")
            guess = "it may be GB18030/GBK: iconv -f GB18030 -t UTF-8"
        except UnicodeDecodeError:
            guess = "it may be Latin-1 or Windows-1252: iconv -f WINDOWS-1252 -t UTF-8"
        fact = f"byte 0x{raw[error.start]:02x} is not UTF-8"
        raise RowProblem(fact, guess, raw.count(b"\n", 0, error.start)) from error
    if (at := text.find("\0")) >= 0:
        raise RowProblem("a NUL byte", "remove it; the file may be damaged", text.count("\n", 0, at))
    return text


def parse_object(raw: bytes, *, at_end_of_file: bool = False) -> dict[str, Any] | None:
    """The JSON object that `raw` holds; None when it holds only white space.

    Args:
        raw: one row.
        at_end_of_file: nothing follows it, not even a line end, so that it may have been cut off.

    Raises:
        RowProblem: not UTF-8, not JSON, no object, a limit exceeded, text that no UTF-8 file can hold.
    """
    text = decode(raw)
    start = len(text) - len(text.lstrip(JSON_SPACE))
    stripped = text.strip(JSON_SPACE)
    if not stripped:
        return None
    try:
        value, end = _decoder.raw_decode(stripped)
    except RecursionError as error:
        raise _too_deep() from error
    except json.JSONDecodeError as error:
        lines_down = text.count("\n", 0, start + error.pos)
        raise _not_json(error, stripped, lines_down, at_end_of_file=at_end_of_file) from error
    except ValueError as error:
        raise RowProblem(_number_fact(error), "write it as a string") from error
    if end != len(stripped):
        lines_down = text.count("\n", 0, start + end)
        raise RowProblem(f"not JSON: more text after the row's end (column {end + 1})", _JSON_REMEDY, lines_down)
    if not isinstance(value, dict):
        raise RowProblem(
            f"a row must be a JSON object, this is {name_of_type(value)}", "see steadfast data build --help"
        )
    if text.count("{") + text.count("[") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise _too_deep()
    if "\\u" in text:
        refuse_bad_strings(value)
    return value


def refuse_bad_strings(value: Any) -> None:
    """Refuse strings that UTF-8 text cannot hold: JSON escapes and tables can smuggle in NUL and half surrogate pairs.

    Raises:
        RowProblem: one is there, or one is longer than a row may be.
    """
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting.extend(item.keys())
            waiting.extend(item.values())
        elif isinstance(item, list | tuple):
            waiting.extend(item)
        elif isinstance(item, str):
            if "\0" in item:
                raise RowProblem("a NUL character (\\u0000)", "remove it")
            if len(item) > MAX_ROW_BYTES:
                raise row_too_long()
            try:
                item.encode("utf-8")
            except UnicodeEncodeError as error:
                code = f"\\u{ord(item[error.start]):04x}"
                raise RowProblem(f"half of a surrogate pair ({code})", "remove it or write the whole pair") from error


def _not_json(error: json.JSONDecodeError, text: str, lines_down: int, *, at_end_of_file: bool) -> RowProblem:
    unfinished = error.msg.startswith("Unterminated string") or _HALF_A_WORD.fullmatch(text, error.pos)
    if at_end_of_file and unfinished:
        return RowProblem(
            "the file ends in the middle of a row (cut off?)", "get a complete copy of the file", lines_down
        )
    return RowProblem(f"not JSON: {error.msg} (column {error.colno})", _JSON_REMEDY, lines_down)


_HALF_A_WORD = re.compile(r"[-+.\w\\]*")
_JSON_REMEDY = "write one JSON object a line, or one JSON array of objects"


def _too_deep() -> RowProblem:
    return RowProblem(f"nested deeper than {MAX_DEPTH} levels", "flatten the row")


def _number_fact(error: ValueError) -> str:
    """Python refuses integers of more than 4,300 digits, in words about its interpreter; ours are kept."""
    return str(error) if isinstance(error, _NumberError) else "an integer of more than 4,300 digits"


class _NumberError(ValueError):
    """A number that JSON does not have, or that no float can hold."""


def _no_constant(name: str) -> None:
    raise _NumberError(f"not JSON: {name} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise _NumberError(f"the number {digits[:24]} is out of range")
    return value


_decoder = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)


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
