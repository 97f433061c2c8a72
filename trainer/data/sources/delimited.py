"""CSV and TSV as RFC 4180 has them: a header, quoted fields that may hold line ends, a quote written twice inside.

Cells are strings. A record whose quotes do not match is one bad row, its first line, and reading goes on with the line
after it; so one stray quote cannot swallow the file.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from trainer.data.sources.checks import RowProblem, decode
from trainer.data.sources.pieces import Piece, Window, pieces, skip_line
from trainer.data.sources.rows import MAX_ROW_BYTES, BadRow, Chunk, InputFile, RawRow
from trainer.data.sources.streams import open_blocks
from trainer.errors import DataError

DELIMITERS = {"csv": ",", "tsv": "\t"}


@lru_cache
def _record_start(delimiter: str) -> re.Pattern[bytes]:
    """As much of one record as is well formed. A quote counts only where a field begins, as `csv` has it."""
    mark = re.escape(delimiter.encode())
    field = rb'(?:"[^"]*+(?:""[^"]*+)*+"|[^"%s\n][^%s\n]*+|)' % (mark, mark)
    return re.compile(rb"%s(?:%s%s)*+\r?+" % (field, mark, field))


@dataclass(frozen=True)
class RecordCutter:
    """Rows end with line ends outside quotes."""

    delimiter: str

    def end_of_rows(self, data: bytes, at: int, *, final: bool) -> int:
        """See `Cutter`."""
        return self.end_of_record(data, at, final=final)[0]

    def skip_row(self, window: Window) -> None:
        """See `Cutter`."""
        skip_line(window)

    def end_of_record(self, data: bytes, at: int, *, final: bool) -> tuple[int, bool]:
        """The end of the record that starts at `at`, 0 when it is not in `data`, and whether its quotes match."""
        match = _record_start(self.delimiter).match(data, at)
        stop = match.end() if match else at
        too_long = min(stop, len(data)) - at > MAX_ROW_BYTES + 1
        if not too_long:
            if data[stop : stop + 1] == b"\n":
                return stop + 1, True
            if stop == len(data):
                return (stop, True) if final else (0, True)
            never_closed = data[stop : stop + 1] == b'"'
            if never_closed and not final and len(data) - at <= MAX_ROW_BYTES + 2:
                return 0, True
        end = data.find(b"\n", at) + 1
        return end or (len(data) if final else 0), False


@dataclass(frozen=True)
class DelimitedChunk:
    """Whole records, and the header they belong to."""

    file: str
    piece: Piece
    header: tuple[str, ...]
    delimiter: str

    @property
    def size(self) -> int:
        """See `Chunk`."""
        return self.piece.size

    def key(self) -> str:
        """See `Chunk`."""
        return self.piece.key(self.delimiter, self.header)

    def rows(self) -> Iterator[RawRow | BadRow]:
        """See `Chunk`."""
        if self.piece.cut_off:
            yield self.piece.too_long(self.file)
            return
        data, cutter, at, line = self.piece.data, RecordCutter(self.delimiter), 0, self.piece.line
        while at < len(data):
            end, matched = cutter.end_of_record(data, at, final=True)
            raw = data[at:end]
            byte = self.piece.byte + at
            try:
                cells = parse_record(raw, self.delimiter, quotes_match=matched)
                if cells:
                    yield RawRow(self._value(cells), self.file, line, byte)
            except RowProblem as problem:
                yield problem.bad_row(self.file, line, byte, raw)
            line += raw.count(b"\n")
            at = end

    def _value(self, cells: list[str]) -> dict[str, str]:
        if len(cells) != len(self.header):
            raise RowProblem(
                f"{_count(len(cells))} where the header has {_count(len(self.header))}",
                "quote cells that hold the delimiter, a quote or a line end",
            )
        return dict(zip(self.header, cells, strict=True))


def delimited_chunks(file: InputFile, chunk_bytes: int) -> Iterator[Chunk]:
    """The file in chunks of whole records.

    Raises:
        DataError: the header is unreadable, or the compressed stream is damaged.
    """
    delimiter = DELIMITERS[file.container]
    cutter = RecordCutter(delimiter)
    with open_blocks(file.path, file.name) as blocks:
        window = Window(blocks, file.name)
        header = _read_header(window, cutter)
        if header:
            for piece in pieces(window, cutter, chunk_bytes):
                yield DelimitedChunk(file.name, piece, header, delimiter)


def parse_record(raw: bytes, delimiter: str, *, quotes_match: bool) -> list[str]:
    """The cells of one record; none of a blank line.

    Raises:
        RowProblem: not UTF-8, too long, or not a record.
    """
    text = decode(raw.removesuffix(b"\n").removesuffix(b"\r"))
    if not text:
        return []
    if not quotes_match:
        raise RowProblem(
            "a quoted field is not closed within 16 MiB, or text follows its closing quote",
            "write a quote inside a quoted field twice",
        )
    # The module's limit of 128 KiB a field is one for the whole process; a row's own limit was checked above.
    csv.field_size_limit(MAX_ROW_BYTES)
    try:
        return next(csv.reader([text], delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        fact = "a carriage return outside quotes" if "\r" in text else f"not a CSV record: {error}"
        raise RowProblem(fact, "quote cells that hold line ends") from error


def _read_header(window: Window, cutter: RecordCutter) -> tuple[str, ...]:
    """The names of the columns, empty when there is no row at all; blank lines before them are skipped."""
    while True:
        end, matched = cutter.end_of_record(window.data, window.start, final=window.complete)
        if end <= window.start:
            if window.ended:
                window.finish()
                return ()
            if len(window.data) - window.start > MAX_ROW_BYTES:
                raise DataError(f"{window.name}:{window.line}: the header is longer than 16 MiB", "is it a table?")
            window.more()
            continue
        line = window.line
        try:
            names = parse_record(window.take(end).data, cutter.delimiter, quotes_match=matched)
        except RowProblem as problem:
            place = f"{window.name}:{line + problem.lines_down}"
            raise DataError(f"{place}: in the header, {problem.fact}", problem.remedy) from problem
        if names:
            _check_names(names, f"{window.name}:{line}", cutter.delimiter)
            return tuple(names)


def _check_names(names: list[str], place: str, delimiter: str) -> None:
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{place}: the header names column {repeated[0]!r} twice", "give each column its own name")
    if len(names) == 1 and (other := next((mark for mark in ",;\t" if mark != delimiter and mark in names[0]), "")):
        raise DataError(
            f"{place}: the header is one column, {names[0][:60]!r}; its delimiter seems to be {other!r}",
            "write commas in a .csv file and tabs in a .tsv file",
        )


def _count(cells: int) -> str:
    return f"{cells} cell{'s' if cells != 1 else ''}"
