"""The bytes of a file, decompressed on the way when it is gzip or zstd (recognised by its first bytes)."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from trainer.errors import MissingInputError

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
BLOCK_BYTES = 1 << 20
_COMPRESSED_READ_BYTES = 1 << 16

STREAM_ERRORS = (OSError, EOFError, zlib.error)
"""What reading raises from a damaged stream or disk."""


class ByteStream(Protocol):
    """What is read from: at most `size` bytes a call, none at the end."""

    def read(self, size: int, /) -> bytes:
        """The next bytes."""


class Blocks:
    """A byte stream in blocks of a fixed size, whatever the reader asks for, so that damage shows at a fixed byte."""

    def __init__(self, stream: ByteStream, compression: str) -> None:
        self.compression = compression
        self._stream = stream
        self._step = _COMPRESSED_READ_BYTES if compression else BLOCK_BYTES
        self._failure: Exception | None = None

    def read(self) -> bytes:
        """The next block, empty at the end. What was read before a failure comes first, then the failure.

        Raises:
            OSError, EOFError, zlib.error: the stream is damaged or cut off here (`STREAM_ERRORS`).
        """
        if self._failure:
            raise self._failure
        parts: list[bytes] = []
        size = 0
        while size < BLOCK_BYTES:
            try:
                part = self._stream.read(self._step)
            except STREAM_ERRORS as error:
                if not parts:
                    raise
                self._failure = error
                break
            if not part:
                break
            parts.append(part)
            size += len(part)
        return b"".join(parts)


@contextmanager
def open_blocks(path: Path, name: str) -> Iterator[Blocks]:
    """The decompressed bytes of a file.

    Raises:
        MissingInputError: it cannot be opened.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise cannot_read(name, error) from error
    with file:
        magic = file.read(4)
        file.seek(0)
        if magic.startswith(GZIP_MAGIC):
            with gzip.GzipFile(fileobj=file) as stream:
                yield Blocks(stream, "gzip")
        elif magic == ZSTD_MAGIC:
            import pyarrow

            with pyarrow.CompressedInputStream(file, "zstd") as stream:
                yield Blocks(stream, "zstd")
        else:
            yield Blocks(file, "")


def read_ranges(path: Path, name: str, ranges: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """The bytes of a file from `start` to before `stop`, for each of `ranges`, in blocks; fewer where the file ends.

    Raises:
        MissingInputError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            for start, stop in ranges:
                file.seek(start)
                left = stop - start
                while left > 0 and (block := file.read(min(left, BLOCK_BYTES))):
                    left -= len(block)
                    yield block
    except OSError as error:
        raise cannot_read(name, error) from error


def cannot_read(name: str, error: OSError) -> MissingInputError:
    """The refusal of an input that is there but cannot be read."""
    return MissingInputError(f"cannot read {name}: {error.strerror or error}", "check the path and its permissions")
