"""Arrays on disk: immutable safetensors files, written deterministically and read back as zero-copy views.

The format is plain safetensors, readable by anything. It is written here because the same arrays must give the same
bytes (the library orders the metadata by chance), and read here because a memory map of the whole file costs nothing
at start-up and shares its pages between ranks.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.durable import write_file
from trainer.errors import DataError

_NAMES = {"U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "I64": "<i8"}
_CODES = {np.dtype(name): code for code, name in _NAMES.items()}
_ALIGNMENT = 64


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Write `arrays` as one safetensors file, atomically and durably; equal input gives equal bytes.

    Raises:
        CannotWriteError: no space, no permission.
    """
    # Wide types first keeps every array aligned to its own width, as the format asks.
    ordered = sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    at = 0
    for name, array in ordered:
        header[name] = {
            "dtype": _CODES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    body = [np.ascontiguousarray(array).tobytes() for _, array in ordered]
    write_file(path, b"".join([struct.pack("<Q", len(text)), text, *body]))


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read-only views into a memory map of a safetensors file.

    Raises:
        DataError: the file is no safetensors file, or shorter than its header says.
    """
    try:
        with path.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        (size,) = struct.unpack_from("<Q", mapped, 0)
        header = json.loads(mapped[8 : 8 + size])
        arrays = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            dtype = np.dtype(_NAMES[entry["dtype"]])
            count = (end - begin) // dtype.itemsize
            flat = (
                np.frombuffer(mapped, dtype=dtype, count=count, offset=8 + size + begin)
                if count
                else np.empty(0, dtype)
            )
            arrays[name] = flat.reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, struct.error, OSError) as error:
        raise DataError(
            f"{path} is damaged: {error}", "build the store again, or restore the file from a copy"
        ) from error
    return arrays
