"""The bytes of a file, decompressed on the way when it is gzip or zstd (recognised by its first bytes)."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import MissingInputError

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
BLOCK_BYTES = 1 << 20
_GZIP_STEP = 1 << 16
_ZSTD_STEP = 1 << 12

STREAM_ERRORS = (OSError, EOFError, zlib.error)
"""What reading raises from a damaged stream or disk."""


class Blocks:
    """A byte stream in blocks of a fixed size, whatever the reader asks for, so that damage shows at a fixed byte."""

    def __init__(self, read: Callable[[int], bytes], step: int, compression: str) -> None:
        """`read` gives at most so many bytes, none at the end; it is asked for `step` at a time."""
        self.compression = compression
        self._read = read
        self._step = step
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
                part = self._read(self._step)
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
                # read1, and small steps: what can be decompressed before the damage is given out.
                yield Blocks(stream.read1, _GZIP_STEP, "gzip")
        elif magic == ZSTD_MAGIC:
            import pyarrow

            with pyarrow.CompressedInputStream(file, "zstd") as stream:
                yield Blocks(stream.read, _ZSTD_STEP, "zstd")
        else:
            yield Blocks(file.read, BLOCK_BYTES, "")


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
