"""Cut a byte stream into pieces of whole rows, in bounded memory.

A piece holds about `chunk_bytes` and ends where a row ends, so any process can parse it alone. Where that is depends on
the container, which is a `Cutter`. A row that is longer than a row may be is cut off after that length, and a piece of
its own: the rows after it are still read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from trainer.data.sources.checks import RowProblem, decode, row_too_long
from trainer.data.sources.rows import MAX_ROW_BYTES, SHOWN_BYTES, BadRow, content_key
from trainer.data.sources.streams import BLOCK_BYTES, STREAM_ERRORS, Blocks
from trainer.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Piece:
    """Whole rows: their bytes, the line and the byte offset of the first one, and the bytes of input they stand for.

    `cut_off`: it is the first 4 KiB of one row that is too long.
    """

    data: bytes
    line: int
    byte: int
    size: int
    cut_off: bool = False

    def key(self, *facts: object) -> str:
        """`Chunk.key` of the rows in it, `facts` saying how they are read."""
        return content_key((*facts, self.line, self.byte, self.cut_off), [self.data])

    def too_long(self, file: str) -> BadRow:
        """What there is to say about a piece that is cut off."""
        return row_too_long().bad_row(file, self.line, self.byte, self.data)


class BrokenHere(Exception):
    """The container is broken, `lines_down` lines below `position` of the data: the rows after it cannot be found."""

    def __init__(self, position: int, fact: str, remedy: str, lines_down: int = 0) -> None:
        super().__init__(fact)
        self.position = position
        self.fact = fact
        self.remedy = remedy
        self.lines_down = lines_down


class Window:
    """The part of a byte stream that is being looked at: `data[start:]` is not yet in a piece."""

    def __init__(self, blocks: Blocks, name: str) -> None:
        self.name = name
        self.data = b""
        self.start = 0
        self.byte = 0
        self.line = 1
        self.ended = False
        self._blocks = blocks
        self._failure: DataError | None = None
        self.more()
        if self.data.startswith(BYTE_ORDER_MARK):
            self.drop(len(BYTE_ORDER_MARK))

    @property
    def complete(self) -> bool:
        """All of the file is in `data`, and its end is its real end."""
        return self.ended and self._failure is None

    def more(self) -> int:
        """Append as much as is waiting, a block at least; returns by how much positions in `data` moved down.

        Doubling keeps the work linear when one long row is looked at again with every block.
        """
        moved = self.start
        parts = [self.data[moved:]]
        self.start = 0
        for _ in range(max(1, len(parts[0]) // BLOCK_BYTES)):
            try:
                block = self._blocks.read()
            except STREAM_ERRORS as error:
                self.data = b"".join(parts)
                self._failure = self._damaged(error)
                self.ended = True
                return moved
            parts.append(block)
            if not block:
                self.ended = True
                break
        self.data = b"".join(parts)
        return moved

    def take(self, end: int) -> Piece:
        """The bytes up to `end` as a piece."""
        data, line, byte = self.data[self.start : end], self.line, self.byte
        self.drop(len(data))
        return Piece(data, line, byte, len(data))

    def drop(self, count: int) -> None:
        """Leave out the next `count` bytes."""
        self.line += self.data.count(b"\n", self.start, self.start + count)
        self.start += count
        self.byte += count

    def line_at(self, position: int) -> int:
        """The line, from 1, of a position in `data`."""
        return self.line + self.data.count(b"\n", self.start, position)

    def finish(self) -> None:
        """Raises DataError: the stream did not end, it broke off."""
        if self._failure:
            raise self._failure

    def _damaged(self, error: Exception) -> DataError:
        place = f"{self.name}:{self.line_at(len(self.data))}"
        count = self.byte + len(self.data) - self.start
        if not self._blocks.compression:
            return DataError(f"{place}: cannot read on after {count:,} bytes: {error}", "check the disk")
        return DataError(
            f"{place}: the {self._blocks.compression} data is damaged or cut off after {count:,} bytes of content",
            "get a complete copy of the file",
        )


class Cutter(Protocol):
    """Knows where rows of one container end."""

    def end_of_rows(self, data: bytes, at: int, *, final: bool) -> int:
        """The end of one or more whole rows that start at `at`; 0 when `data` ends before the first one does.

        `final` says that no data follows. Raises BrokenHere.
        """

    def skip_row(self, window: Window) -> None:
        """Drop the row that starts at the window's start, however long it is."""


def pieces(window: Window, cutter: Cutter, chunk_bytes: int) -> Iterator[Piece]:
    """All that is left in the window and its stream, in pieces.

    Raises:
        DataError: the stream is damaged, or the container is broken; all rows before that were given out.
    """
    at = window.start
    while True:
        try:
            end = cutter.end_of_rows(window.data, at, final=window.complete)
        except BrokenHere as broken:
            if at > window.start:
                yield window.take(at)
            raise _broken(window, broken) from broken
        if end > at:
            at = end
            if at - window.start >= chunk_bytes:
                yield window.take(at)
        elif window.ended:
            break
        elif len(window.data) - at > MAX_ROW_BYTES + 2:
            if at > window.start:
                yield window.take(at)
            yield _cut_off(window, cutter)
            at = window.start
        else:
            at -= window.more()
    if at > window.start:
        yield window.take(at)
    window.finish()


def skip_line(window: Window) -> None:
    """Drop everything up to the next line end."""
    while not (end := window.data.find(b"\n", window.start) + 1):
        window.drop(len(window.data) - window.start)
        if window.ended:
            return
        window.more()
    window.drop(end - window.start)


def _cut_off(window: Window, cutter: Cutter) -> Piece:
    line, byte = window.line, window.byte
    data = window.data[window.start : window.start + SHOWN_BYTES]
    cutter.skip_row(window)
    return Piece(data, line, byte, window.byte - byte, cut_off=True)


def _broken(window: Window, broken: BrokenHere) -> DataError:
    """The container's complaint, unless the bytes are not even UTF-8, which explains it."""
    try:
        decode(window.data[window.start : broken.position])
    except RowProblem as problem:
        return DataError(f"{window.name}:{window.line + problem.lines_down}: {problem.fact}", problem.remedy)
    line = window.line_at(broken.position) + broken.lines_down
    return DataError(f"{window.name}:{line}: {broken.fact}", broken.remedy)
