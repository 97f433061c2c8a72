"""Parquet, by row groups: a chunk is one or more of them, and what is read into memory is a few hundred rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from trainer.data.sources.rows import BadRow, Chunk, InputFile, RawRow, content_key
from trainer.data.sources.streams import read_ranges
from trainer.data.sources.table_rows import arrow_errors, check_schema, rows_of_batches

BATCH_ROWS = 256


@dataclass(frozen=True)
class ParquetChunk:
    """Row groups `first_group` to before `stop_group`; `first_row` counts from 1."""

    file: str
    path: Path
    first_group: int
    stop_group: int
    first_row: int
    row_count: int
    size: int

    def key(self) -> str:
        """See `Chunk`: of the schema and of the row groups' bytes as they are in the file."""
        with arrow_errors(self.file, "Parquet"), _open(self.path) as table:
            schema = table.schema_arrow.serialize().to_pybytes()
            ranges = [
                _range_of_column(table.metadata.row_group(group).column(column))
                for group in range(self.first_group, self.stop_group)
                for column in range(table.metadata.num_columns)
            ]
            return content_key(
                ("parquet", schema, self.first_row, self.row_count), read_ranges(self.path, self.file, ranges)
            )

    def rows(self) -> Iterator[RawRow | BadRow]:
        """See `Chunk`."""
        with arrow_errors(self.file, "Parquet"):
            table = _open(self.path)
        with table:
            first_row = self.first_row
            for group in range(self.first_group, self.stop_group):
                count = table.metadata.row_group(group).num_rows
                batches = table.iter_batches(BATCH_ROWS, row_groups=[group], use_threads=False)
                yield from rows_of_batches(batches, count, self.file, first_row, "Parquet")
                first_row += count


def parquet_chunks(file: InputFile, chunk_bytes: int) -> Iterator[Chunk]:
    """The file in chunks of row groups of about `chunk_bytes` of uncompressed data.

    Raises:
        DataError: the footer is damaged, or the columns cannot make rows.
    """
    with arrow_errors(file.name, "Parquet"), _open(file.path) as table:
        check_schema(table.schema_arrow, file.name)
        groups = [table.metadata.row_group(group) for group in range(table.metadata.num_row_groups)]
        sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    first_group, first_row, row_count, size = 0, 1, 0, 0
    for group, (group_rows, group_size) in enumerate(sizes, start=1):
        row_count += group_rows
        size += group_size
        if row_count and (size >= chunk_bytes or group == len(sizes)):
            yield ParquetChunk(file.name, file.path, first_group, group, first_row, row_count, size)
            first_group, first_row, row_count, size = group, first_row + row_count, 0, 0


def _open(path: Path) -> pq.ParquetFile:
    return pq.ParquetFile(path, page_checksum_verification=True)


def _range_of_column(column: pq.ColumnChunkMetaData) -> tuple[int, int]:
    start = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset:
        start = min(start, column.dictionary_page_offset)
    return start, start + column.total_compressed_size
