"""Documents to token shards, in order, as many tokens a file as asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from trainer.data.reader import SCHEMA_VERSION
from trainer.data.shards import write_arrays
from trainer.data.templates import Encoded
from trainer.durable import write_errors


class ShardWriter:
    """Collects documents and writes a shard whenever enough tokens are there."""

    def __init__(self, directory: Path, vocabulary_size: int, shard_tokens: int) -> None:
        directory.mkdir()
        self._directory = directory
        self._dtype = np.uint16 if vocabulary_size <= 1 << 16 else np.uint32
        self._limit = shard_tokens
        self._waiting: list[tuple[NDArray[Any], NDArray[np.uint32], int, int]] = []
        self._tokens = 0
        self.shards: list[Path] = []

    def add(self, document: Encoded, source: int, line: int) -> None:
        """Take one document; a shard may be written."""
        spans = np.array(document.spans, dtype=np.uint32).reshape(-1, 2)
        self._waiting.append((document.ids.astype(self._dtype), spans, source, line))
        self._tokens += len(document.ids)
        if self._tokens >= self._limit:
            self.flush()

    def flush(self) -> None:
        """Write what waits as one shard, named by its content after the running number that keeps the order."""
        if not self._waiting:
            return
        ids, spans, sources, lines = zip(*self._waiting, strict=True)
        hashes = [xxhash.xxh3_64_intdigest(i.tobytes() + s.tobytes()) for i, s in zip(ids, spans, strict=True)]
        arrays: dict[str, NDArray[Any]] = {
            "ids": np.concatenate(ids),
            "document_offsets": _offsets([len(part) for part in ids]),
            "loss_spans": np.concatenate(spans),
            "span_offsets": _offsets([len(part) for part in spans]),
            "document_hash": np.array(hashes, dtype=np.uint64),
            "turn_ends": np.empty(0, dtype=np.uint32),
            "turn_offsets": np.zeros(len(ids) + 1, dtype=np.uint64),
            "head": np.zeros(len(ids), dtype=np.uint32),
            "label": np.full(len(ids), -1, dtype=np.int32),
            "source": np.array(sources, dtype=np.uint16),
            "file": np.array(sources, dtype=np.uint32),
            "line": np.array(lines, dtype=np.uint32),
        }
        file = self._directory / "writing.safetensors"
        digest = write_arrays(file, arrays, {"schema": str(SCHEMA_VERSION)})
        target = self._directory / f"tok-{len(self.shards):05d}-{digest.xxh3_128}.safetensors"
        with write_errors(file):
            file.rename(target)
        self.shards.append(target)
        self._waiting.clear()
        self._tokens = 0


def _offsets(counts: Sequence[int]) -> NDArray[np.uint64]:
    return np.concatenate([[0], np.cumsum(np.array(counts, dtype=np.uint64))]).astype(np.uint64)
