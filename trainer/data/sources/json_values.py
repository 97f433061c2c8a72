"""One JSON array of objects, or objects written one after another over several lines.

The array may have any size: the end of each element is found from its brackets and strings alone, so that a row that is
not JSON inside does not hide the rows after it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from trainer.data.sources.checks import RowProblem, parse_object
from trainer.data.sources.pieces import BrokenHere, Piece, Window, pieces
from trainer.data.sources.rows import MAX_ROW_BYTES, BadRow, Chunk, InputFile, RawRow
from trainer.data.sources.streams import open_blocks

_SPACE = re.compile(rb"[ \t\r\n]*+")
_BETWEEN_ROWS = re.compile(rb"[ \t\r\n,]*+")
_SCALAR = re.compile(rb"[^\s,\[\]{}\"]++")
_OUTSIDE_STRINGS = re.compile(rb"[\[\]{}\"]")
_INSIDE_STRINGS = re.compile(rb"[\"\\]")
_ARRAY_REMEDY = "the file is not one JSON array; repair it"
_REMEDY = "write one JSON object a line, or one JSON array of objects"


class Nesting:
    """How deep in brackets, and whether in a string, a JSON value is at some byte; fed with one block after another."""

    def __init__(self) -> None:
        self.depth = 0
        self._in_string = False
        self._escaped = False

    def end(self, data: bytes, at: int) -> int:
        """Where the value that began at the first call's `at` ends in `data`, 0 if not in there.

        Brackets of both kinds count alike: whether they match is the parser's question.
        """
        if self._escaped and at < len(data):
            at += 1
            self._escaped = False
        while found := (_INSIDE_STRINGS if self._in_string else _OUTSIDE_STRINGS).search(data, at):
            at = found.end()
            token = found[0]
            if token == b'"':
                self._in_string = not self._in_string
            elif token == b"\\":
                self._escaped = at == len(data)
                at += 1
                continue
            else:
                self.depth += 1 if token in b"[{" else -1
            if self.depth <= 0 and not self._in_string:
                return at
        return 0


class ValueFinder:
    """Ends of JSON values in bytes."""

    def __init__(self) -> None:
        self._data = b""
        self._text = ""

    def end(self, data: bytes, at: int, *, final: bool) -> int:
        """The end of the value that starts at `at`; 0 when `data` ends before it."""
        if self._data is not data:
            # Of Latin-1 a character is a byte: the standard library's parser, written in C, then counts in bytes.
            self._data, self._text = data, data.decode("latin-1")
        try:
            _, end = _decoder.raw_decode(self._text, at)
        except (ValueError, RecursionError):
            scalar = _SCALAR.match(data, at)
            end = scalar.end() if scalar else Nesting().end(data, at)
        unfinished_scalar = end == len(data) and not final and data[at : at + 1] not in b'[{"'
        return 0 if unfinished_scalar else end


_decoder = json.JSONDecoder()


class ValueCutter:
    """Rows end with values, or with the commas between them and the bracket that closes their array.

    Begins after the bracket that opens the array, or with the first object.
    """

    def __init__(self, *, array: bool) -> None:
        self._array = array
        self._expected: Literal["first", "value", "separator", "nothing"] = "first" if array else "value"
        self._finder = ValueFinder()

    def end_of_rows(self, data: bytes, at: int, *, final: bool) -> int:
        """See `Cutter`."""
        if (end_of_space := _end_of(_SPACE, data, at)) > at:
            return end_of_space
        if at == len(data):
            if final and self._array and self._expected != "nothing":
                raise BrokenHere(at, "the file ends inside the array (cut off?)", "get a complete copy of the file")
            return at
        if self._expected == "separator":
            return self._end_of_separator(data, at)
        if self._expected == "nothing":
            raise BrokenHere(at, "text after the end of the array", "keep one JSON array, or one object a line")
        if self._expected == "first" and data[at : at + 1] == b"]":
            self._expected = "nothing"
            return at + 1
        return self._end_of_value(data, at, final=final)

    def skip_row(self, window: Window) -> None:
        """See `Cutter`."""
        nesting = Nesting()
        while not (end := nesting.end(window.data, window.start)):
            window.drop(len(window.data) - window.start)
            if window.ended:
                return
            window.more()
        window.drop(end - window.start)
        self._expected = "separator" if self._array else "value"

    def _end_of_separator(self, data: bytes, at: int) -> int:
        separator = data[at : at + 1]
        if separator not in (b",", b"]"):
            raise BrokenHere(at, "expected ',' or ']' after a row", _ARRAY_REMEDY)
        self._expected = "value" if separator == b"," else "nothing"
        return at + 1

    def _end_of_value(self, data: bytes, at: int, *, final: bool) -> int:
        first = data[at : at + 1]
        if first in b",:]}" or not (self._array or first == b"{"):
            found = first.decode("ascii", "replace")
            raise BrokenHere(at, f"not JSON: expected a row, found {found!r}", _REMEDY)
        end = self._finder.end(data, at, final=final)
        if end:
            self._expected = "separator" if self._array else "value"
        elif final:
            raise _unfinished(data, at)
        elif first not in b'[{"' and len(data) - at > MAX_ROW_BYTES:
            raise BrokenHere(at, "a number or a word of more than 16 MiB", "the file is damaged; get a new copy")
        return end


@dataclass(frozen=True)
class JsonValuesChunk:
    """Whole elements of an array, or whole objects, with what stands between them."""

    file: str
    piece: Piece

    @property
    def size(self) -> int:
        """See `Chunk`."""
        return self.piece.size

    def key(self) -> str:
        """See `Chunk`."""
        return self.piece.key("json")

    def rows(self) -> Iterator[RawRow | BadRow]:
        """See `Chunk`."""
        if self.piece.cut_off:
            yield self.piece.too_long(self.file)
            return
        data, finder = self.piece.data, ValueFinder()
        at, counted, line = 0, 0, self.piece.line
        while (at := _end_of(_BETWEEN_ROWS, data, at)) < len(data) and data[at : at + 1] != b"]":
            end = finder.end(data, at, final=True) or len(data)
            line += data.count(b"\n", counted, at)
            counted = at
            raw, byte = data[at:end], self.piece.byte + at
            at = end
            try:
                value = parse_object(raw)
            except RowProblem as problem:
                yield problem.bad_row(self.file, line, byte, raw)
            else:
                if value is not None:
                    yield RawRow(value, self.file, line, byte)


def json_values_chunks(file: InputFile, chunk_bytes: int) -> Iterator[Chunk]:
    """The file in chunks of whole elements.

    Raises:
        DataError: the compressed stream is damaged, or the array is broken between rows or not closed.
    """
    with open_blocks(file.path, file.name) as blocks:
        window = Window(blocks, file.name)
        while (at := _end_of(_SPACE, window.data, window.start)) == len(window.data) and not window.ended:
            window.drop(at - window.start)
            window.more()
        array = window.data[at : at + 1] == b"["
        window.drop(at + array - window.start)
        cutter = ValueCutter(array=array)
        for piece in pieces(window, cutter, chunk_bytes):
            yield JsonValuesChunk(file.name, piece)


def _end_of(pattern: re.Pattern[bytes], data: bytes, at: int) -> int:
    match = pattern.match(data, at)
    return match.end() if match else at


def _unfinished(data: bytes, at: int) -> BrokenHere:
    """The last value does not end: the parser says where it goes wrong, or that the file was cut off."""
    try:
        parse_object(data[at:], at_end_of_file=True)
    except RowProblem as problem:
        return BrokenHere(at, problem.fact, problem.remedy, problem.lines_down)
    return BrokenHere(at, "a row does not end", _REMEDY)
