r"""Write Megatron's indexed dataset: flat ids in .bin, an index in .idx.

The index: magic `MMIDIDX\0\0`, uint64 version 1, uint8 dtype code, uint64 sequences, uint64 entries of the document
index, int32 length of every sequence, int64 byte offset of every sequence, int64 document index (here every sequence
is a document). The reader is in `trainer.data.sources.megatron`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.sources.detect import MEGATRON_MAGIC
from trainer.data.sources.megatron import HEADER, INTEGER_TYPES


def write_megatron(bin_file: Path, idx_file: Path, sequences: Iterable[NDArray[Any]], dtype: np.dtype[Any]) -> None:
    """Write arrays of `dtype` as one document each, both files synced."""
    code = next(code for code, known in INTEGER_TYPES.items() if np.dtype(known) == dtype)
    lengths = []
    with bin_file.open("wb") as stream:
        for sequence in sequences:
            stream.write(np.ascontiguousarray(sequence, dtype=dtype).data)
            lengths.append(len(sequence))
        stream.flush()
        os.fsync(stream.fileno())
    sizes = np.array(lengths, dtype=np.int64) * dtype.itemsize
    with idx_file.open("wb") as stream:
        stream.write(HEADER.pack(MEGATRON_MAGIC, 1, code, len(lengths), len(lengths) + 1))
        stream.write(np.array(lengths, dtype=np.int32).tobytes())
        stream.write((np.cumsum(sizes) - sizes).astype(np.int64).tobytes())
        stream.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
        stream.flush()
        os.fsync(stream.fileno())
