"""safetensors files, one tensor in memory at a time.

The library's `save_file` wants every tensor at once; checkpoints and exports of large models must not. Writing is
sequential: the header is fixed first, then the tensors follow in its order, hashed on the way. Reading maps the file.
Both can go piece by piece, so that not even one whole tensor has to be in memory.
The format: 8 bytes little-endian header length, JSON header {name: {dtype, shape, data_offsets}}, then the bytes
(https://github.com/huggingface/safetensors, section "Format").
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash

from trainer.durable import write_errors
from trainer.errors import DataError

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
NUMPY_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "I16": np.int16,
    "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
DTYPE_NAMES = {np.dtype(kind): name for name, kind in NUMPY_DTYPES.items()}
MAX_HEADER_BYTES = 100 << 20
WRITE_BACK_BYTES = 32 << 20
READ_AHEAD_BYTES = 8 << 20
QUEUED_BYTES = 16 << 20
"""What may wait to be hashed and written while the next piece is made."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `begin` and `end` are byte positions in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class FileDigest:
    """Size and hashes of a finished file."""

    bytes: int
    xxh3_128: str
    sha256: str | None
    """Only when the writer was asked for it: it is eight times slower than xxh3."""


class TensorFileWriter:
    """Write the tensors of `shapes` {name: (safetensors dtype, shape)} in exactly that order.

    Use as a context manager; `finished` tells size and hashes when the block has ended. Content is synced to disk, the
    name is not: callers write into a directory that they rename.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[str, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
        *,
        with_sha256: bool = False,
    ) -> None:
        self.path = path
        self._digest: FileDigest | None = None
        self._expected = [(name, math.prod(shape) * DTYPE_BYTES[dtype]) for name, (dtype, shape) in shapes.items()]
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        position = 0
        for (name, (dtype, shape)), (_, size) in zip(shapes.items(), self._expected, strict=True):
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
            position += size
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._prefix = len(text).to_bytes(8, "little") + text
        self._written = 0
        self._on_its_way = 0
        self._fast = xxhash.xxh3_128()
        self._strong = hashlib.sha256() if with_sha256 else None
        # sha256 is as slow as a disk and neither needs the lock of Python: hashing, writing and the next pieces of our
        # caller go on side by side. One thread each: both need their pieces in order.
        self._workers = (ThreadPoolExecutor(1), ThreadPoolExecutor(1)) if with_sha256 else None
        self._pending: deque[tuple[int, Future[None], Future[None]]] = deque()

    def __enter__(self) -> TensorFileWriter:
        with write_errors(self.path):
            self._stream = self.path.open("xb", buffering=0)
            self._put(memoryview(self._prefix))
        return self

    def write(self, name: str, content: np.ndarray[Any, Any]) -> None:
        """Append the next tensor; `name` and its size must be what the header announced."""
        self.write_pieces(name, [content])

    def write_pieces(self, name: str, pieces: Iterable[np.ndarray[Any, Any]]) -> None:
        """The same for a tensor that comes in pieces, in the order of its elements.

        With sha256 a piece must not change after it was given: it is hashed and written while the next ones are made.
        """
        expected_name, expected = self._expected[self._written] if self._written < len(self._expected) else ("", 0)
        size = 0
        for piece in pieces:
            data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
            size += data.nbytes
            if name == expected_name and size <= expected:
                with write_errors(self.path):
                    self._put(data)
        if (name, size) != (expected_name, expected):
            raise ValueError(f"{self.path}: {name} with {size} bytes is not the tensor the header announces next")
        self._written += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._written != len(self._expected):
                    raise ValueError(f"{self.path}: {self._expected[self._written][0]} was announced and never written")
                with write_errors(self.path):
                    self._wait_until(0)
                    os.fsync(self._stream.fileno())
                    size = self._stream.tell()
                strong = self._strong.hexdigest() if self._strong else None
                self._digest = FileDigest(size, self._fast.hexdigest(), strong)
        finally:
            for worker in self._workers or ():
                worker.shutdown(cancel_futures=True)
            with write_errors(self.path):
                self._stream.close()

    @property
    def finished(self) -> FileDigest:
        """Size and hashes of the whole file; only after the block ended without an error."""
        if self._digest is None:
            raise ValueError(f"{self.path} is not finished")
        return self._digest

    def _put(self, data: memoryview) -> None:
        """Hash and write the next bytes; with sha256 in other threads, a bounded number of bytes behind."""
        self._fast.update(data)
        if self._strong is None or self._workers is None:
            self._write(data)
            return
        self._wait_until(QUEUED_BYTES - data.nbytes)
        hasher, writer = self._workers
        self._pending.append((data.nbytes, hasher.submit(self._strong.update, data), writer.submit(self._write, data)))

    def _write(self, data: memoryview) -> None:
        while data.nbytes:
            data = data[self._stream.write(data) :]
        place = self._stream.tell()
        if place - self._on_its_way >= WRITE_BACK_BYTES:
            # Pages that are dirty are not dropped but begin to go to the disk: the sync at the end finds few left.
            os.posix_fadvise(self._stream.fileno(), self._on_its_way, place - self._on_its_way, os.POSIX_FADV_DONTNEED)
            self._on_its_way = place

    def _wait_until(self, left: int) -> None:
        """Wait until at most `left` bytes are neither hashed nor written; raises what went wrong with the others."""
        while self._pending and sum(size for size, *_ in self._pending) > left:
            _, hashed, written = self._pending.popleft()
            hashed.result()
            written.result()


class TensorFile:
    """Read-only view of a safetensors file. Opening reads the header only.

    Raises DataError when the header is not what the format demands (also: truncated, overlapping, out of bounds).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries, self.metadata = _read_header(path)
        self._stream: FileIO | None = None
        self._bytes: np.ndarray[Any, np.dtype[np.uint8]] | None = None

    def array(self, name: str, start: int = 0, count: int | None = None) -> np.ndarray[Any, Any]:
        """Elements [start, start + count) of a tensor as a flat view of the mapped file; the whole one has its shape.

        bfloat16, which numpy does not know, comes as its 16-bit patterns.
        """
        begin, end = self._place(name, start, count)
        if self._bytes is None:
            with self.path.open("rb") as stream:
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            self._bytes = np.frombuffer(mapped, dtype=np.uint8)
        entry = self.entries[name]
        flat: np.ndarray[Any, Any] = self._bytes[begin:end].view(_in_memory(entry.dtype))
        return flat if (start, count) != (0, None) else flat.reshape(entry.shape)

    def read(self, name: str, start: int, count: int, into: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, Any]:
        """The same elements, flat, copied to `into` (contiguous, of their dtype) or to newly allocated memory.

        For whoever needs each once: the disk gets one request for all of them where a map asks page by page, and
        nothing of the file counts as memory of the process. Raises DataError when it cannot be read, or has become
        shorter.
        """
        place, _ = self._place(name, start, count)
        found = np.empty(count, _in_memory(self.entries[name].dtype)) if into is None else into
        left = found.view(np.uint8).data
        try:
            if self._stream is None:
                self._stream = self.path.open("rb", buffering=0)
            file = self._stream.fileno()
            while left.nbytes:
                os.posix_fadvise(file, place, min(left.nbytes, READ_AHEAD_BYTES), os.POSIX_FADV_WILLNEED)
                if not (done := os.preadv(file, [left[:READ_AHEAD_BYTES]], place)):
                    raise DataError(f"{self.path} has become shorter since it was opened", "restore it from its source")
                place, left = place + done, left[done:]
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}", "restore it from its source") from error
        return found

    def _place(self, name: str, start: int, count: int | None) -> tuple[int, int]:
        """First byte of an element in the file, and the one after the last."""
        entry = self.entries[name]
        width = DTYPE_BYTES[entry.dtype]
        total = (entry.end - entry.begin) // width
        stop = total if count is None else start + count
        if not 0 <= start <= stop <= total:
            raise IndexError(f"{self.path}: {name} has {total} elements, asked for [{start}, {stop})")
        return entry.begin + start * width, entry.begin + stop * width


def _in_memory(dtype: str) -> Any:
    return np.uint16 if dtype == "BF16" else NUMPY_DTYPES[dtype]


def _read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    def damaged(reason: str) -> DataError:
        return DataError(f"{path} is damaged: {reason}", "restore it from its source")

    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise damaged("the header is truncated")
        try:
            header = json.loads(stream.read(length))
            metadata = header.pop("__metadata__", {})
            entries = {
                str(name): TensorEntry(
                    str(entry["dtype"]),
                    tuple(map(int, entry["shape"])),
                    8 + length + int(entry["data_offsets"][0]),
                    8 + length + int(entry["data_offsets"][1]),
                )
                for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise damaged("the header is not valid") from error
    position = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        if entry.dtype not in DTYPE_BYTES or min(entry.shape, default=0) < 0:
            raise damaged(f"{name} has an unknown type or shape")
        if entry.begin != position or entry.end - entry.begin != math.prod(entry.shape) * DTYPE_BYTES[entry.dtype]:
            raise damaged(f"{name} does not lie where the header says")
        position = entry.end
    if position != size:
        raise damaged(f"{size} bytes where the header announces {position}")
    return entries, metadata
