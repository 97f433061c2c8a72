"""Arrow record batches to rows, for every container that Arrow reads.

Arrow fills absent keys of nested objects with null, so nested nulls are taken as absent. Rows have numbers, not lines.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from trainer.data.sources.checks import RowProblem, refuse_bad_strings
from trainer.data.sources.rows import MAX_DEPTH, BadRow, RawRow
from trainer.errors import DataError

_ARROW_ERRORS = (pa.ArrowException, OSError, ValueError, TypeError, KeyError, MemoryError, OverflowError)


@contextmanager
def arrow_errors(place: str, container: str) -> Iterator[None]:
    """Turn what pyarrow raises about damaged data into a DataError with the place."""
    try:
        yield
    except _ARROW_ERRORS as error:
        raise DataError(f"{place}: the {container} data is damaged: {_reason(error)}", _COPY_REMEDY) from error


_COPY_REMEDY = "get a complete copy of the file"


def check_schema(schema: pa.Schema, file: str) -> None:
    """Refuse tables whose rows are no objects with known keys, or that nest deeper than a row may.

    Raises:
        DataError: no columns, a column name twice, too deep.
    """
    if not schema.names:
        raise DataError(f"{file} has no columns", "give a file with at least one column")
    if repeated := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise DataError(f"{file} has two columns named {repeated[0]!r}", "give each column its own name")
    waiting = [(field.type, 1) for field in schema]
    while waiting:
        kind, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise DataError(f"{file}: nested deeper than {MAX_DEPTH} levels", "flatten the columns")
        waiting.extend((child, depth + 1) for child in _children(kind))


def has_dictionary(schema: pa.Schema) -> bool:
    """Some column refers to values that are kept apart from its batches."""
    waiting = [field.type for field in schema]
    while waiting:
        kind = waiting.pop()
        if isinstance(kind, pa.DictionaryType):
            return True
        waiting.extend(_children(kind))
    return False


def rows_of_batches(
    batches: Iterator[pa.RecordBatch], count: int, file: str, first_row: int, container: str
) -> Iterator[RawRow | BadRow]:
    """The rows of record batches, which must be `count`.

    Raises:
        DataError: the batches are damaged or fewer.
    """
    line = first_row
    while line < first_row + count:
        with arrow_errors(f"{file}:{line}", container):
            batch = next(batches, None)
        if batch is None:
            missing = first_row + count - line
            raise DataError(f"{file}:{line}: the {container} data ends {missing:,} rows too early", _COPY_REMEDY)
        yield from _rows_of_batch(batch, file, line)
        line += batch.num_rows


def _rows_of_batch(batch: pa.RecordBatch, file: str, first_row: int) -> Iterator[RawRow | BadRow]:
    text_columns = [field.name for field in batch.schema if _has_text(field.type)]
    try:
        values = _values(batch)
    except _ARROW_ERRORS:
        values = [None] * batch.num_rows
    for index, value in enumerate(values):
        line = first_row + index
        try:
            row = _single_value(batch.slice(index, 1)) if value is None else value
            row = {key: _without_nulls(item) for key, item in row.items()}
            for name in text_columns:
                refuse_bad_strings(row[name])
        except RowProblem as problem:
            yield problem.bad_row(file, line, None, b"")
        else:
            yield RawRow(row, file, line)


def _values(batch: pa.RecordBatch) -> list[dict[str, Any] | None]:
    # Arrow trusts offsets and text of what it maps; a damaged file would be read out of bounds.
    batch.validate(full=True)
    return list(batch.to_pylist())


def _single_value(batch: pa.RecordBatch) -> dict[str, Any]:
    """Raises RowProblem: the row cannot be read, e.g. its text is not UTF-8."""
    try:
        return _values(batch)[0] or {}
    except _ARROW_ERRORS as error:
        raise RowProblem(
            f"the row cannot be read: {_reason(error)}", "write the table again, with UTF-8 text"
        ) from error


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _children(kind: pa.DataType) -> list[pa.DataType]:
    if isinstance(kind, pa.DictionaryType):
        return [kind.value_type]
    if isinstance(kind, pa.BaseExtensionType):
        return [kind.storage_type]
    return [kind.field(index).type for index in range(kind.num_fields)]


def _has_text(kind: pa.DataType) -> bool:
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return is_text or any(_has_text(child) for child in _children(kind))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list) and value and isinstance(value[0], dict | list | None):
        return [_without_nulls(item) for item in value]
    return value
