"""What one rank contributes to a checkpoint, as a description: where each byte comes from, and how it becomes files.

The same description is written directly, slice by slice, or copied to host memory first and written by another process.
Torch-free.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer.checkpoint.slices import parameter_of
from trainer.durable import sync_file, write_file, xxh3_of_file
from trainer.errors import DivergedError
from trainer.tensor_file import DTYPE_BYTES, NUMPY_DTYPES, TensorFileWriter

SPARE_BYTES = 1 << 20
"""What a checkpoint takes beside its contents: manifest, directories, the last block of each file."""
_HEADER_BYTES = 160
_CHECKED_AT_ONCE = 1 << 20

Files = dict[str, dict[str, Any]]
"""Relative file name to {bytes, xxh3_128}."""


@dataclass(frozen=True)
class TensorSource:
    """A tensor that can be copied out: `fill(target)` puts its elements into an array of this dtype and shape."""

    dtype: str
    shape: tuple[int, ...]
    fill: Callable[[np.ndarray[Any, Any]], None]

    @property
    def bytes(self) -> int:
        """Size of the elements."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    def empty(self) -> np.ndarray[Any, Any]:
        """A new array that `fill` takes."""
        return np.empty(self.shape, numpy_dtype(self.dtype))


Late = Callable[[], Mapping[str, Mapping[str, TensorSource]] | None]
"""Tensor files, or None as long as they are not known."""


@dataclass(frozen=True)
class RankContents:
    """All files of one rank."""

    tensors: Mapping[str, Mapping[str, TensorSource]]
    """File name to the tensors in it, in order."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """File name to its text."""
    copies: Mapping[str, Path] = field(default_factory=dict)
    """Relative file name to the file it is a copy of."""
    late: Late | None = None
    """More tensors of this same state, which the next training step will know."""

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(source.bytes for file in self.tensors.values() for source in file.values())

    @property
    def disk_bytes(self) -> int:
        """Room needed on the disk: headers estimated, a little more than less."""
        headers = sum(_HEADER_BYTES + len(key) for file in self.tensors.values() for key in file)
        copies = sum(source.stat().st_size for source in self.copies.values())
        return self.tensor_bytes + headers + copies + sum(map(len, self.texts.values()))


def numpy_dtype(name: str) -> Any:
    """The numpy type that carries a safetensors type; bfloat16, which numpy lacks, travels as its 16-bit patterns."""
    return np.uint16 if name == "BF16" else NUMPY_DTYPES[name]


def from_array(array: np.ndarray[Any, Any], dtype: str) -> TensorSource:
    """An array that lies in memory already."""

    def fill(target: np.ndarray[Any, Any]) -> None:
        target[...] = array

    return TensorSource(dtype, array.shape, fill)


def write_contents(contents: RankContents, place: Path) -> Files:
    """Write and sync everything below `place`, one tensor in memory at a time; returns sizes and hashes."""

    def read(file: str, key: str) -> np.ndarray[Any, Any]:
        source = contents.tensors[file][key]
        target = source.empty()
        source.fill(target)
        return target

    shapes = {
        file: {key: (source.dtype, source.shape) for key, source in tensors.items()}
        for file, tensors in contents.tensors.items()
    }
    return write_files(place, shapes, read, contents.texts, contents.copies)


def write_files(
    place: Path,
    shapes: Mapping[str, Mapping[str, tuple[str, tuple[int, ...]]]],
    read: Callable[[str, str], np.ndarray[Any, Any]],
    texts: Mapping[str, str],
    copies: Mapping[str, Path],
    on_tensor: Callable[[], None] = lambda: None,
) -> Files:
    """Write tensor files from `read(file, key)`, texts and copies below `place`, each synced; sizes and hashes.

    `on_tensor` is called after each tensor; fault tests stop the process there. Raises DivergedError when a slice of
    weights or moments is not finite: the check is made here and not by the rank, which would train on meanwhile.
    """
    files: Files = {}
    for name, tensors in shapes.items():
        with TensorFileWriter(place / name, tensors) as file:
            for key, (dtype, _) in tensors.items():
                content = read(name, key)
                _refuse_bad_numbers(key, content, dtype)
                file.write(key, content)
                on_tensor()
        files[name] = {"bytes": file.finished.bytes, "xxh3_128": file.finished.xxh3_128}
    for name, text in texts.items():
        write_file(place / name, text)
    for name, source in copies.items():
        (place / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source, place / name)
        sync_file(place / name)
    return files | {name: describe_file(place / name) for name in (*texts, *copies)}


def _refuse_bad_numbers(key: str, content: np.ndarray[Any, Any], dtype: str) -> None:
    parameter = parameter_of(key)
    if parameter is None:
        return
    flat = content.reshape(-1)
    for begin in range(0, flat.size, _CHECKED_AT_ONCE):
        part = flat[begin : begin + _CHECKED_AT_ONCE]
        # bfloat16 comes as bit patterns; infinity and NaN are those with all bits of the exponent set.
        good = (part & 0x7F80) != 0x7F80 if dtype == "BF16" else np.isfinite(part)
        if not good.all():
            raise DivergedError(
                f"the weights or moments of {parameter} are not finite",
                "the newest checkpoint is from before; lower optimizer.learning_rate, then start again",
            )


def describe_file(path: Path) -> dict[str, Any]:
    """Size and hash of a small file that was just written."""
    return {"bytes": path.stat().st_size, "xxh3_128": xxh3_of_file(path)}
