"""Files that survive a crash: written beside their place, synced, then renamed into it.

A reader never sees half a file, and after a power cut either the old or the new content is there. Operating-system
errors become `CannotWriteError` with the path and a remedy.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from trainer.errors import CannotWriteError

CHUNK_BYTES = 4 << 20


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError raised while writing `path` into a CannotWriteError that names the reason."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CannotWriteError(
                f"no space left while writing {path}", "free disk space or choose another place"
            ) from error
        reason = error.strerror or str(error)
        raise CannotWriteError(f"cannot write {path}: {reason}", "check the path and its permissions") from error


def sync_directory(path: Path) -> None:
    """Make renames and new names inside directory `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def present_umask() -> int:
    """The umask of this process, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def make_directory(path: Path) -> None:
    """Make directory `path` and those above it that are missing, durably: what lies inside is no safer than its name.

    Raises CannotWriteError.
    """
    missing = [directory for directory in (path, *path.parents) if not directory.exists()]
    with write_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        for directory in missing:
            sync_directory(directory.parent)


def write_file(path: Path, content: bytes | str) -> None:
    """Put `content` at `path` atomically and durably; an existing file is replaced as a whole."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with write_errors(path):
        try:
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
            sync_directory(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def sync_file(path: Path) -> None:
    """Force the content of an already written file to disk."""
    with write_errors(path), path.open("rb") as stream:
        os.fsync(stream.fileno())


def file_chunks(path: Path) -> Iterator[bytes]:
    """The bytes of `path` in pieces of at most CHUNK_BYTES."""
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def xxh3_of_file(path: Path) -> str:
    """xxh3_128 of a file's bytes, hexadecimal: fast, finds accidents."""
    digest = xxhash.xxh3_128()
    for chunk in file_chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    """sha256 of a file's bytes, hexadecimal: slow, finds forgery too."""
    digest = hashlib.sha256()
    for chunk in file_chunks(path):
        digest.update(chunk)
    return digest.hexdigest()
