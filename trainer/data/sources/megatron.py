r"""Megatron's indexed token files: NAME.bin holds token ids, NAME.idx says where each sequence and document is.

The index, all little-endian: magic ``MMIDIDX\0\0``, version u64 = 1, type code u8, number of sequences u64, length of
the document table u64, then sequence lengths i32, byte offsets of sequences i64, and the document table i64, whose
neighbours are the first and the one-past-last sequence of a document. A row is a document: {"input_ids": ids}.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.sources.checks import RowProblem, row_too_long
from trainer.data.sources.detect import MEGATRON_MAGIC
from trainer.data.sources.rows import MAX_ROW_BYTES, BadRow, Chunk, InputFile, RawRow, content_key
from trainer.data.sources.streams import cannot_read, read_ranges
from trainer.errors import DataError

HEADER = struct.Struct("<9sQBQQ")
INTEGER_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_COPY_REMEDY = "get complete copies of the .bin and the .idx file, made together"


@dataclass(frozen=True)
class MegatronChunk:
    """Documents: of each the byte ranges of its sequences in the .bin file; `first_row` counts from 1."""

    file: str
    path: Path
    dtype: str
    documents: tuple[tuple[tuple[int, int], ...], ...]
    first_row: int
    size: int

    def key(self) -> str:
        """See `Chunk`: of the ids and the lengths of the documents."""
        lengths = [sum(stop - start for start, stop in ranges) for ranges in self.documents]
        ranges = [item for document in self.documents for item in document]
        return content_key(("megatron", self.dtype, self.first_row, lengths), read_ranges(self.path, self.file, ranges))

    def rows(self) -> Iterator[RawRow | BadRow]:
        """See `Chunk`. The ids have the type they have in the file."""
        for line, ranges in enumerate(self.documents, start=self.first_row):
            try:
                yield RawRow({"input_ids": self._ids(ranges)}, self.file, line)
            except RowProblem as problem:
                yield problem.bad_row(self.file, line, None, b"")

    def _ids(self, ranges: tuple[tuple[int, int], ...]) -> NDArray[np.integer]:
        size = sum(stop - start for start, stop in ranges)
        if size > MAX_ROW_BYTES:
            raise row_too_long()
        content = b"".join(read_ranges(self.path, self.file, ranges))
        if len(content) != size:
            raise RowProblem("the .bin file ends inside this document", _COPY_REMEDY)
        return np.frombuffer(content, dtype=self.dtype)


def megatron_chunks(file: InputFile, chunk_bytes: int) -> Iterator[Chunk]:
    """The documents of a pair of files, `file.path` being the index, in chunks of about `chunk_bytes`.

    Raises:
        DataError: index and tokens do not fit together, or the ids are no integers.
    """
    data = file.path.with_suffix(".bin")
    try:
        index = file.path.read_bytes()
        data_bytes = data.stat().st_size
    except OSError as error:
        raise cannot_read(file.name, error) from error
    dtype, starts, stops, documents = _read_index(index, file.name, data_bytes)
    waiting: list[tuple[tuple[int, int], ...]] = []
    first_row, size = 1, 0
    for first, stop in zip(documents[:-1].tolist(), documents[1:].tolist(), strict=True):
        ranges = tuple(zip(starts[first:stop].tolist(), stops[first:stop].tolist(), strict=True))
        waiting.append(ranges)
        size += sum(end - start for start, end in ranges)
        if size >= chunk_bytes:
            yield MegatronChunk(file.name, data, dtype, tuple(waiting), first_row, size)
            first_row, size, waiting = first_row + len(waiting), 0, []
    if waiting:
        yield MegatronChunk(file.name, data, dtype, tuple(waiting), first_row, size)


def _read_index(
    index: bytes, name: str, data_bytes: int
) -> tuple[str, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Type of an id, first and one-past-last byte of each sequence, document table; all checked against the sizes."""
    if len(index) < HEADER.size:
        raise DataError(f"{name}: the index has no header (cut off?)", _COPY_REMEDY)
    magic, version, code, sequences, document_entries = HEADER.unpack_from(index)
    if magic != MEGATRON_MAGIC or version != 1:
        raise DataError(f"{name}: not a Megatron index of version 1", "preprocess the data again")
    if code not in INTEGER_TYPES:
        raise DataError(f"{name}: type code {code} is not one of integer token ids", "preprocess the data again")
    expected = HEADER.size + 12 * sequences + 8 * document_entries
    if len(index) != expected:
        modes = len(index) == expected + sequences
        what = "holds several modalities" if modes else f"has {len(index):,} bytes where {expected:,} are expected"
        raise DataError(f"{name}: the index {what}", "give text data" if modes else _COPY_REMEDY)
    at = HEADER.size
    lengths = np.frombuffer(index, "<i4", sequences, at).astype(np.int64)
    starts = np.frombuffer(index, "<i8", sequences, at + 4 * sequences).astype(np.int64)
    documents = np.frombuffer(index, "<i8", document_entries, at + 12 * sequences).astype(np.int64)
    dtype = INTEGER_TYPES[code]
    sizes = lengths * np.dtype(dtype).itemsize
    outside = (lengths < 0) | (starts < 0) | (starts > data_bytes - sizes)
    if outside.any():
        number = int(np.argmax(outside)) + 1
        raise DataError(f"{name}: sequence {number:,} is not inside the .bin file", _COPY_REMEDY)
    if sizes.sum() != data_bytes:
        raise DataError(f"{name}: the .bin file has {data_bytes:,} bytes, its sequences {sizes.sum():,}", _COPY_REMEDY)
    edges = documents[[0, -1]].tolist() if document_entries else []
    if edges != [0, sequences] or (np.diff(documents) < 0).any():
        raise DataError(f"{name}: the document table does not cover the {sequences:,} sequences", _COPY_REMEDY)
    return dtype, starts, starts + sizes, documents
