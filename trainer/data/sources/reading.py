"""One input to chunks of rows, whatever its container."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainer.data.sources.checks import RowProblem, decode
from trainer.data.sources.delimited import DELIMITERS, delimited_chunks
from trainer.data.sources.find import locate, require_input
from trainer.data.sources.json_lines import json_lines_chunks
from trainer.data.sources.json_values import json_values_chunks
from trainer.data.sources.pieces import BYTE_ORDER_MARK
from trainer.data.sources.rows import MAX_ROW_BYTES, BadRow, Chunk, InputFile, RawRow
from trainer.data.sources.text import text_chunks
from trainer.errors import DataError, MissingInputError

CHUNK_BYTES = 4 << 20


def chunks(file: InputFile, chunk_bytes: int = CHUNK_BYTES, documents: str = "file") -> Iterator[Chunk]:
    """All rows of an input in chunks of about `chunk_bytes` of decompressed content.

    Chunks are cut by the input alone. Those of text files carry their bytes, those of tables and token files say where
    in the file they are: the file must stay until their rows are read. A file without rows gives no row.

    Args:
        file: the input, from `locate`.
        chunk_bytes: where to cut; a row that is longer makes a longer chunk.
        documents: what a row of plain text is: `file`, `line` or `paragraph`.

    Raises:
        MissingInputError: the file cannot be opened.
        DataError: the container is broken in a way that hides the rows after it; the rows before it were given out.
        UsageError: `documents` is none of the three.
    """
    if file.container in DELIMITERS:
        return delimited_chunks(file, chunk_bytes)
    if file.container == "text":
        return text_chunks(file, chunk_bytes, documents)
    if file.container == "json":
        return json_values_chunks(file, chunk_bytes)
    if file.container == "jsonl":
        return json_lines_chunks(file, chunk_bytes)
    return _table_chunks(file, chunk_bytes)


def _table_chunks(file: InputFile, chunk_bytes: int) -> Iterator[Chunk]:
    if file.container == "megatron":
        from trainer.data.sources.megatron import megatron_chunks

        return megatron_chunks(file, chunk_bytes)
    if file.container == "parquet":
        from trainer.data.sources.parquet import parquet_chunks

        return parquet_chunks(file, chunk_bytes)
    from trainer.data.sources.arrow import arrow_chunks, saved_dataset_chunks

    return (saved_dataset_chunks if file.container == "dataset" else arrow_chunks)(file, chunk_bytes)


def read_rows(path: Path) -> Iterator[RawRow]:
    """Every row of a local input (what `locate` takes, but no URL), in order.

    Raises:
        MissingInputError: nothing is at `path`.
        DataError: the first row that cannot be read, a broken container, or no rows at all.
    """
    empty = True
    for file in locate([str(path)], Path()):
        for chunk in chunks(file):
            for row in chunk.rows():
                if isinstance(row, BadRow):
                    raise row.error()
                empty = False
                yield row
    if empty:
        raise DataError(f"{path} has no rows", "give a file with at least one row, or leave it out")


def read_lines(path: Path) -> Iterator[str]:
    """Lines of a plain text file, strict UTF-8, without their line ends.

    Raises:
        MissingInputError: nothing is at `path`.
        DataError: a line is not UTF-8, has a NUL byte or is too long.
    """
    require_input(path)
    if path.is_dir():
        raise MissingInputError(f"{path} is a directory, not a text file", "check the path given with --input")
    with path.open("rb") as stream:
        number = 0
        while raw := stream.readline(MAX_ROW_BYTES + 2):
            number += 1
            line = raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw
            try:
                yield decode(line.rstrip(b"\r\n"))
            except RowProblem as problem:
                raise problem.bad_row(str(path), number, None, b"").error() from problem
