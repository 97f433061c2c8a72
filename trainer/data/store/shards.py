"""Arrays of a token store: immutable safetensors files, equal bytes for equal arrays, read back as views.

The token shards of a store are all mapped when they lie on a disk of this machine, and one by one when they come
through a cache.
"""

from __future__ import annotations

import errno
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trainer.data.store.remote import PROTECTED_STEPS, RemoteFile, ShardCache
from trainer.errors import MissingInputError
from trainer.tensor_file import DTYPE_NAMES, FileDigest, TensorFile, TensorFileWriter

Arrays = dict[str, NDArray[Any]]


def id_dtype(vocabulary_size: int) -> np.dtype[np.unsignedinteger[Any]]:
    """How token ids are kept: as uint16 where they fit, else as uint32."""
    return np.dtype(np.uint16 if vocabulary_size <= 1 << 16 else np.uint32)


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> FileDigest:
    """Write `arrays` as one safetensors file, synced; returns its size and hashes.

    Wide types come first, which keeps every array aligned to its own width, as the format asks.
    Raises CannotWriteError.
    """
    ordered = dict(sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    shapes = {name: (DTYPE_NAMES[array.dtype], array.shape) for name, array in ordered.items()}
    with TensorFileWriter(path, shapes, dict(sorted(metadata.items())), with_sha256=True) as file:
        for name, array in ordered.items():
            file.write(name, array)
    return file.finished


def read_arrays(path: Path) -> Arrays:
    """Read-only views into a memory map of a safetensors file; DataError when it is not one, or not whole."""
    file = TensorFile(path)
    return {name: file.array(name) for name in file.entries}


def ragged(counts: Sequence[int] | NDArray[Any]) -> NDArray[np.uint64]:
    """Offsets uint64 [parts + 1] of parts with these sizes that lie one after another."""
    return np.concatenate([[0], np.cumsum(np.asarray(counts, dtype=np.uint64))]).astype(np.uint64)


def take_parts(offsets: NDArray[np.uint64] | NDArray[np.int64], chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indexes, in order, of the elements of the `chosen` parts that `offsets` delimit."""
    starts = offsets[chosen].astype(np.int64)
    return indexes_of_parts(starts, offsets[chosen + 1].astype(np.int64) - starts)


def indexes_of_parts(starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indexes, in order, of the elements of parts that begin at `starts`."""
    before = np.cumsum(sizes) - sizes
    indexes: NDArray[np.int64] = np.repeat(starts - before, sizes) + np.arange(int(sizes.sum()), dtype=np.int64)
    return indexes


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Say of an OSError raised while reading the store or file `path` what it is: no damage, and no bug of ours."""
    try:
        yield
    except OSError as error:
        place = error.filename or path
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise MissingInputError(
                f"cannot open {place}: too many open files", "raise the limit: ulimit -n 65536"
            ) from error
        raise MissingInputError(f"cannot read {place}: {error.strerror or error}", "check it and its disk") from error


class Shards(Protocol):
    """The token shards of a store by number."""

    def shard(self, number: int) -> Arrays:
        """Its arrays, views of a memory map."""

    def expect(self, needed: Sequence[int], soon: Sequence[int]) -> None:
        """Say which shards the next step needs and which may follow, nearest first."""


class LocalShards:
    """Shards on a disk of this machine; all are mapped at once."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        with read_errors(path):
            self._shards = [read_arrays(path / name) for name in names]

    def shard(self, number: int) -> Arrays:
        """See `Shards`."""
        return self._shards[number]

    def expect(self, needed: Sequence[int], soon: Sequence[int]) -> None:
        """They are there."""


class CachedShards:
    """Shards that come through a cache; those of the steps being prepared, and a few more, are mapped."""

    _OTHERS = 8

    def __init__(self, cache: ShardCache, files: Sequence[RemoteFile]) -> None:
        self._cache = cache
        self._files = files
        self._lock = threading.Lock()
        self._open: OrderedDict[int, Arrays] = OrderedDict()
        self._needed: deque[set[int]] = deque(maxlen=PROTECTED_STEPS)
        self._soon: set[int] = set()

    def shard(self, number: int) -> Arrays:
        """See `Shards`; waits until it is there. Raises as `ShardCache.path`."""
        with self._lock:
            if number not in self._open:
                self._open[number] = self._map(self._files[number])
                self._close_unexpected()
            self._open.move_to_end(number)
            return self._open[number]

    def expect(self, needed: Sequence[int], soon: Sequence[int]) -> None:
        """See `Shards`."""
        with self._lock:
            self._needed.append(set(needed))
            self._soon = set(soon)
            self._close_unexpected()
        self._cache.expect([self._files[number] for number in needed], [self._files[number] for number in soon])

    def _map(self, file: RemoteFile) -> Arrays:
        while True:
            path = self._cache.path(file)
            try:
                with read_errors(path):
                    return read_arrays(path)
            except MissingInputError:
                # Removed between the two lines, by a process that needs the room.
                if path.exists():
                    raise

    def _close_unexpected(self) -> None:
        # A removed file frees its disk space only when nobody maps it any more.
        expected = self._soon.union(*self._needed)
        others = [number for number in self._open if number not in expected]
        for number in others[: -self._OTHERS]:
            del self._open[number]
