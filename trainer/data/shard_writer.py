"""Documents to token shards, in order, as many tokens a file as asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from trainer.data.packing import RowPlan, plan_rows
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
        # The index of all documents stays here for the plan: 8 bytes a document and 8 a span.
        self.lengths: list[int] = []
        self.sources: list[int] = []
        self._span_counts: list[int] = []
        self._spans: list[NDArray[np.uint32]] = []
        self._shards = 0

    def add(self, document: Encoded, source: int, line: int) -> None:
        """Take one document; a shard may be written."""
        spans = np.array(document.spans, dtype=np.uint32).reshape(-1, 2)
        self._waiting.append((document.ids.astype(self._dtype), spans, source, line))
        self._tokens += len(document.ids)
        self.lengths.append(len(document.ids))
        self.sources.append(source)
        self._span_counts.append(len(spans))
        self._spans.append(spans)
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
            "source": np.array(sources, dtype=np.uint16),
            "line": np.array(lines, dtype=np.uint32),
        }
        file = self._directory / "writing.safetensors"
        digest = write_arrays(file, arrays, {"schema": str(SCHEMA_VERSION)})
        with write_errors(file):
            file.rename(self._directory / f"tok-{self._shards:05d}-{digest.xxh3_128}.safetensors")
        self._shards += 1
        self._waiting.clear()
        self._tokens = 0

    def plan(self, sequence_length: int, overlap: int) -> RowPlan:
        """The packed plan of everything added."""
        spans = np.concatenate(self._spans) if self._spans else np.empty((0, 2), dtype=np.uint32)
        return plan_rows(
            _offsets(self.lengths),
            spans,
            _offsets(self._span_counts),
            sequence_length=sequence_length,
            overlap=overlap,
            packing=True,
        )


def _offsets(counts: Sequence[int]) -> NDArray[np.uint64]:
    return np.concatenate([[0], np.cumsum(np.array(counts, dtype=np.uint64))]).astype(np.uint64)
