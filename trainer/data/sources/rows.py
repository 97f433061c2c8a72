"""What passes between the input and the rest: files, chunks of files, rows, and rows that cannot be read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import xxhash

from trainer.errors import DataError

MAX_ROW_BYTES = 16 << 20
MAX_DEPTH = 64
SHOWN_BYTES = 4096

_TYPE_NAMES = {dict: "object", list: "array", str: "string", int: "number", float: "number", bool: "boolean"}


@dataclass(frozen=True)
class RawRow:
    """One row as written.

    `value` is a JSON object (of a key written twice the last value, as JSON parsers do); `line` counts from 1, in
    tables and token files rows; `byte` is the offset in the decompressed file, None in tables and token files.
    """

    value: dict[str, Any]
    file: str
    line: int
    byte: int | None = None

    @property
    def place(self) -> str:
        """`file:line` for messages."""
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read, while the rows after it can.

    `line` and `byte` say where the row starts, `fact` begins with the exact place of the trouble, which may be some
    lines further down. `raw` is the start of the row's bytes, at most 4 KiB; empty in tables.
    """

    file: str
    line: int
    byte: int | None
    fact: str
    remedy: str
    raw: bytes

    def error(self) -> DataError:
        """The same as an error, for those who cannot go on without the row."""
        return DataError(self.fact, self.remedy)


@dataclass(frozen=True)
class InputFile:
    """One input on this machine: a file, or a directory written by `Dataset.save_to_disk`.

    `name` is what the user knows it by (path or URL) and what rows carry as `file`; `bytes` is its size on disk,
    compressed if it is.
    """

    name: str
    path: Path
    container: str
    bytes: int


class Chunk(Protocol):
    """Consecutive rows of one file, cut by the input alone, never by the number of workers; picklable."""

    @property
    def size(self) -> int:
        """Bytes of (decompressed) input it stands for."""

    def key(self) -> str:
        """xxh3_128, hexadecimal, of its content and first line: equal key, equal rows, but for the name of the file."""

    def rows(self) -> Iterator[RawRow | BadRow]:
        """Its rows in order.

        Raises:
            DataError: the input is broken here in a way that hides the rows after it.
        """


def content_key(facts: Iterable[object], contents: Iterable[bytes]) -> str:
    """xxh3_128, hexadecimal, of facts about a chunk and of its bytes."""
    digest = xxhash.xxh3_128(repr(tuple(facts)).encode())
    for content in contents:
        digest.update(content)
    return digest.hexdigest()


def name_of_type(value: object) -> str:
    """The JSON word for a value's type, for messages."""
    return "null" if value is None else _TYPE_NAMES.get(type(value), type(value).__name__)
