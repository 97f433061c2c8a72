"""Arrow IPC files and streams, and directories of them that `Dataset.save_to_disk` wrote.

An IPC file holds an IPC stream after its first 8 bytes, so both are read as streams: a chunk is the schema message and
a run of batch messages, by their byte offsets. Columns with dictionaries refer to messages before them; such a file is
one chunk.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from trainer.data.sources.detect import ARROW_FILE_MAGIC
from trainer.data.sources.rows import BadRow, Chunk, InputFile, RawRow, content_key
from trainer.data.sources.streams import cannot_read, read_ranges
from trainer.data.sources.table_rows import arrow_errors, check_schema, has_dictionary, rows_of_batches
from trainer.errors import DataError

_FILE_STREAM_START = 8


@dataclass(frozen=True)
class ArrowChunk:
    """Record batches: byte ranges of the schema and of the batches in the file; `first_row` counts from 1."""

    file: str
    path: Path
    schema_range: tuple[int, int]
    batches_range: tuple[int, int]
    first_row: int
    row_count: int

    @property
    def size(self) -> int:
        """See `Chunk`."""
        return self.batches_range[1] - self.batches_range[0]

    def key(self) -> str:
        """See `Chunk`: of the messages' bytes as they are in the file."""
        return content_key(("arrow", self.first_row, self.row_count, self.size), self._blocks())

    def rows(self) -> Iterator[RawRow | BadRow]:
        """See `Chunk`."""
        with arrow_errors(f"{self.file}:{self.first_row}", "Arrow"):
            reader = pa.ipc.open_stream(pa.BufferReader(b"".join(self._blocks())))
        yield from rows_of_batches(iter(reader), self.row_count, self.file, self.first_row, "Arrow")

    def _blocks(self) -> Iterator[bytes]:
        return read_ranges(self.path, self.file, (self.schema_range, self.batches_range))


def arrow_chunks(file: InputFile, chunk_bytes: int) -> Iterator[Chunk]:
    """The file in chunks of record batches of about `chunk_bytes`.

    Raises:
        DataError: it is damaged or cut off, or the columns cannot make rows; all rows before that were given out.
    """
    yield from _chunks_of_file(file.name, file.path, 1, chunk_bytes)


def saved_dataset_chunks(file: InputFile, chunk_bytes: int) -> Iterator[Chunk]:
    """The Arrow files of a directory written by `Dataset.save_to_disk`, as one table.

    Raises:
        DataError: as `arrow_chunks`, or the directory is not what save_to_disk writes.
    """
    first_row = 1
    for path in files_of_saved_dataset(file.path, file.name):
        for chunk in _chunks_of_file(file.name, path, first_row, chunk_bytes):
            first_row = chunk.first_row + chunk.row_count
            yield chunk


def files_of_saved_dataset(directory: Path, name: str) -> list[Path]:
    """The data files in the order of their rows.

    Raises:
        DataError: the directory's state is not what save_to_disk writes.
    """
    try:
        state = json.loads((directory / "state.json").read_bytes())
        files = [directory / item["filename"] for item in state["_data_files"]]
        indices = state.get("_indices_data_files") or state.get("_indices_files")
    except OSError as error:
        raise cannot_read(name, error) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{name}: state.json is not one of Dataset.save_to_disk", "save the dataset again") from error
    if indices:
        raise DataError(
            f"{name} selects rows by an indices file", "save it again: load_from_disk(...).flatten_indices()"
        )
    return files


def _chunks_of_file(name: str, path: Path, first_row: int, chunk_bytes: int) -> Iterator[ArrowChunk]:
    try:
        source = pa.OSFile(str(path))
    except OSError as error:
        raise cannot_read(name, error) from error
    with source:
        with arrow_errors(f"{name}:{first_row}", "Arrow"):
            schema_start = _stream_start(source, name)
            reader = pa.ipc.open_stream(source)
            check_schema(reader.schema, name)
            whole = has_dictionary(reader.schema)
        schema_range = (schema_start, source.tell())
        start, row_count = schema_range[1], 0
        failure: DataError | None = None
        while True:
            stop, batch = source.tell(), None
            try:
                with arrow_errors(f"{name}:{first_row + row_count}", "Arrow"):
                    batch = next(reader, None)
            except DataError as error:
                failure = error
            if row_count and (batch is None or (stop - start >= chunk_bytes and not whole)):
                yield ArrowChunk(name, path, schema_range, (start, stop), first_row, row_count)
                start, first_row, row_count = stop, first_row + row_count, 0
            if failure:
                raise failure
            if batch is None:
                return
            row_count += batch.num_rows


def _stream_start(source: pa.NativeFile, name: str) -> int:
    """Where the stream starts; a file, other than a stream, says at its end whether it is complete."""
    start = _FILE_STREAM_START if source.read(len(ARROW_FILE_MAGIC)) == ARROW_FILE_MAGIC else 0
    if start:
        source.seek(max(0, source.size() - len(ARROW_FILE_MAGIC)))
        if source.read() != ARROW_FILE_MAGIC:
            raise DataError(f"{name}: the Arrow file has no end (cut off?)", "get a complete copy of the file")
    source.seek(start)
    return start
