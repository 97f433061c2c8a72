"""Arrays of a token store on disk: immutable safetensors files, equal bytes for equal arrays, read back as views."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
