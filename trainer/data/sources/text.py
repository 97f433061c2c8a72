"""Plain text: a document is the whole file, a line, or a paragraph (lines between blank lines); rows {"text": ...}."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from trainer.data.sources.checks import RowProblem, decode
from trainer.data.sources.json_lines import LineCutter, lines_of
from trainer.data.sources.pieces import Cutter, Piece, Window, pieces
from trainer.data.sources.rows import MAX_ROW_BYTES, BadRow, Chunk, InputFile, RawRow
from trainer.data.sources.streams import open_blocks
from trainer.errors import UsageError

DOCUMENTS = ("file", "line", "paragraph")
_BLANK_LINE = re.compile(rb"\n[ \t\r]*+\n")


class ParagraphCutter:
    """Rows end with blank lines."""

    def end_of_rows(self, data: bytes, at: int, *, final: bool) -> int:
        """See `Cutter`."""
        match = _BLANK_LINE.search(data, at)
        return match.end() if match else len(data) if final else 0

    def skip_row(self, window: Window) -> None:
        """See `Cutter`."""
        while not (end := self.end_of_rows(window.data, window.start, final=window.ended)):
            # The last line may be the first half of what ends the paragraph.
            keep_from = max(window.data.rfind(b"\n", window.start), window.start)
            if len(window.data) - keep_from > MAX_ROW_BYTES:
                keep_from = len(window.data)
            window.drop(keep_from - window.start)
            window.more()
        window.drop(end - window.start)


class WholeFileCutter:
    """The file is one row."""

    def end_of_rows(self, data: bytes, at: int, *, final: bool) -> int:
        """See `Cutter`."""
        return len(data) if final else 0

    def skip_row(self, window: Window) -> None:
        """See `Cutter`."""
        while not window.ended:
            window.drop(len(window.data) - window.start)
            window.more()


@dataclass(frozen=True)
class TextChunk:
    """Whole documents of a file."""

    file: str
    piece: Piece
    documents: str

    @property
    def size(self) -> int:
        """See `Chunk`."""
        return self.piece.size

    def key(self) -> str:
        """See `Chunk`."""
        return self.piece.key("text", self.documents)

    def rows(self) -> Iterator[RawRow | BadRow]:
        """See `Chunk`."""
        if self.piece.cut_off:
            yield self.piece.too_long(self.file)
            return
        for raw, line, byte in self._documents():
            try:
                text = decode(raw)
            except RowProblem as problem:
                yield problem.bad_row(self.file, line, byte, raw)
            else:
                if text.strip():
                    yield RawRow({"text": text}, self.file, line, byte)

    def _documents(self) -> Iterator[tuple[bytes, int, int]]:
        if self.documents == "file":
            yield self.piece.data, self.piece.line, self.piece.byte
        elif self.documents == "line":
            for raw, line, byte, _ in lines_of(self.piece):
                yield raw, line, byte
        else:
            yield from _paragraphs(self.piece)


def text_chunks(file: InputFile, chunk_bytes: int, documents: str) -> Iterator[Chunk]:
    """The file in chunks of whole documents.

    Raises:
        UsageError: `documents` is none of file, line and paragraph.
        DataError: the compressed stream is damaged.
    """
    if documents not in DOCUMENTS:
        raise UsageError(f"documents: {documents!r} is not one of {', '.join(DOCUMENTS)}")
    cutters: dict[str, Cutter] = {
        "file": WholeFileCutter(),
        "line": LineCutter(chunk_bytes),
        "paragraph": ParagraphCutter(),
    }
    with open_blocks(file.path, file.name) as blocks:
        window = Window(blocks, file.name)
        for piece in pieces(window, cutters[documents], chunk_bytes):
            yield TextChunk(file.name, piece, documents)


def _paragraphs(piece: Piece) -> Iterator[tuple[bytes, int, int]]:
    """Runs of lines that are not blank, without the line end of the last one."""
    start = end = first_line = 0
    inside = False
    for raw, line, byte, _ in lines_of(piece):
        if raw.strip():
            if not inside:
                start, first_line, inside = byte - piece.byte, line, True
            end = byte - piece.byte + len(raw)
        elif inside:
            yield piece.data[start:end], first_line, piece.byte + start
            inside = False
    if inside:
        yield piece.data[start:end], first_line, piece.byte + start
