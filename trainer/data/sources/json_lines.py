"""JSON Lines: one JSON object a line; blank lines are skipped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trainer.data.sources.checks import RowProblem, parse_object
from trainer.data.sources.pieces import Piece, Window, pieces, skip_line
from trainer.data.sources.rows import BadRow, Chunk, InputFile, RawRow
from trainer.data.sources.streams import open_blocks


@dataclass(frozen=True)
class LineCutter:
    """Rows end with lines. Many are taken at once, by looking for the last line end among `chunk_bytes`."""

    chunk_bytes: int

    def end_of_rows(self, data: bytes, at: int, *, final: bool) -> int:
        """See `Cutter`."""
        end = data.rfind(b"\n", at, at + self.chunk_bytes) + 1 or data.find(b"\n", at + self.chunk_bytes) + 1
        return len(data) if final and not end else end

    def skip_row(self, window: Window) -> None:
        """See `Cutter`."""
        skip_line(window)


@dataclass(frozen=True)
class JsonLinesChunk:
    """Whole lines of a file."""

    file: str
    piece: Piece

    @property
    def size(self) -> int:
        """See `Chunk`."""
        return self.piece.size

    def key(self) -> str:
        """See `Chunk`."""
        return self.piece.key("jsonl")

    def rows(self) -> Iterator[RawRow | BadRow]:
        """See `Chunk`."""
        if self.piece.cut_off:
            yield self.piece.too_long(self.file)
            return
        for raw, line, byte, is_last in lines_of(self.piece):
            try:
                value = parse_object(raw, at_end_of_file=is_last)
            except RowProblem as problem:
                yield problem.bad_row(self.file, line, byte, raw)
            else:
                if value is not None:
                    yield RawRow(value, self.file, line, byte)


def json_lines_chunks(file: InputFile, chunk_bytes: int) -> Iterator[Chunk]:
    """The file in chunks of whole lines. Raises DataError: the compressed stream is damaged."""
    with open_blocks(file.path, file.name) as blocks:
        window = Window(blocks, file.name)
        for piece in pieces(window, LineCutter(chunk_bytes), chunk_bytes):
            yield JsonLinesChunk(file.name, piece)


def lines_of(piece: Piece) -> Iterator[tuple[bytes, int, int, bool]]:
    """Each line without its end: bytes, number, byte offset, and whether the file ended in it."""
    lines = piece.data.split(b"\n")
    last = len(lines) - 1
    byte = piece.byte
    for number, raw in enumerate(lines):
        if number < last or raw:
            yield raw.removesuffix(b"\r"), piece.line + number, byte, number == last
        byte += len(raw) + 1
