"""Arrays of a token store on disk: immutable safetensors files, equal bytes for equal arrays, read back as views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.tensor_file import DTYPE_NAMES, FileDigest, TensorFile, TensorFileWriter


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


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read-only views into a memory map of a safetensors file; DataError when it is not one, or not whole."""
    file = TensorFile(path)
    return {name: file.array(name) for name in file.entries}


def ragged(counts: Sequence[int] | NDArray[Any]) -> NDArray[np.uint64]:
    """Offsets uint64 [parts + 1] of parts with these sizes that lie one after another."""
    return np.concatenate([[0], np.cumsum(np.asarray(counts, dtype=np.uint64))]).astype(np.uint64)


def take_parts(offsets: NDArray[np.uint64], chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indexes, in order, of the elements of the `chosen` parts that `offsets` delimit."""
    starts = offsets[chosen].astype(np.int64)
    sizes = offsets[chosen + 1].astype(np.int64) - starts
    before = np.cumsum(sizes) - sizes
    indexes: NDArray[np.int64] = np.repeat(starts - before, sizes) + np.arange(int(sizes.sum()), dtype=np.int64)
    return indexes
