"""Documents to token shards, in order, as many tokens a file as asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from trainer.data.store.reader import SCHEMA_VERSION
from trainer.data.store.shards import ragged, take_parts, write_arrays
from trainer.durable import write_errors
from trainer.tensor_file import FileDigest

RAGGED = {"ids": "document_offsets", "loss_spans": "span_offsets", "turn_ends": "turn_offsets"}
"""Arrays with several elements a document, and where each document's begin."""
PLAIN = ("head", "document_hash", "source", "file", "line", "label")
"""Arrays with one element a document."""


def take_documents(arrays: Mapping[str, NDArray[Any]], chosen: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """The `chosen` documents, in the order given, as arrays of the same layout."""
    taken = {name: arrays[name][chosen] for name in PLAIN if name in arrays}
    for name, offsets in RAGGED.items():
        taken[name] = arrays[name][take_parts(arrays[offsets], chosen)]
        taken[offsets] = ragged(np.diff(arrays[offsets].astype(np.int64))[chosen])
    return taken


def file_entry(name: str, digest: FileDigest) -> dict[str, Any]:
    """What the manifest says of a file that was written with a digest."""
    return {"name": name, "bytes": digest.bytes, "xxh3": digest.xxh3_128, "sha256": digest.sha256}


class ShardWriter:
    """Collects documents and writes a shard whenever enough tokens are there; `files` are its manifest entries.

    Args:
        directory: made here; where the shards go.
        shard_tokens: tokens after which a new shard begins; a document is never torn apart.
    """

    def __init__(self, directory: Path, shard_tokens: int) -> None:
        with write_errors(directory):
            directory.mkdir()
        self._directory = directory
        self._limit = shard_tokens
        self._waiting: list[dict[str, NDArray[Any]]] = []
        self._tokens = 0
        self.files: list[dict[str, Any]] = []

    def add(self, documents: Mapping[str, NDArray[Any]]) -> None:
        """Take documents (the arrays of a shard but for `document_hash`); shards may be written."""
        ends = documents["document_offsets"][1:].astype(np.int64)
        first = 0
        while first < len(ends):
            before = int(ends[first - 1]) if first else 0
            # The document that reaches the limit is the last of its shard.
            last = int(np.searchsorted(ends, before + self._limit - self._tokens, side="left")) + 1
            last = min(last, len(ends))
            block = take_documents(documents, np.arange(first, last))
            self._waiting.append(block)
            self._tokens += len(block["ids"])
            if self._tokens >= self._limit:
                self.flush()
            first = last

    def flush(self) -> None:
        """Write what waits as one shard, named by its content after the running number that keeps the order."""
        if not self._waiting:
            return
        arrays = {
            name: np.concatenate([block[name] for block in self._waiting])
            for name in self._waiting[0]
            if name not in RAGGED.values()
        }
        for offsets in RAGGED.values():
            arrays[offsets] = ragged(
                np.concatenate([np.diff(block[offsets].astype(np.int64)) for block in self._waiting])
            )
        arrays["document_hash"] = _document_hashes(arrays)
        file = self._directory / "writing.safetensors"
        digest = write_arrays(file, arrays, {"schema": str(SCHEMA_VERSION)})
        name = f"tok-{len(self.files):05d}-{digest.xxh3_128}.safetensors"
        with write_errors(file):
            file.rename(self._directory / name)
        entry = file_entry(f"{self._directory.name}/{name}", digest)
        self.files.append(entry | {"documents": len(arrays["line"])})
        self._waiting.clear()
        self._tokens = 0


def _document_hashes(arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.uint64]:
    """xxh3 of ids and spans of every document: what it trains, not where it came from."""
    offsets, spans = arrays["document_offsets"].tolist(), arrays["span_offsets"].tolist()
    ids = arrays["ids"].view(np.uint8)
    loss = np.ascontiguousarray(arrays["loss_spans"]).reshape(-1).view(np.uint8)
    width = arrays["ids"].dtype.itemsize
    return np.array(
        [
            xxhash.xxh3_64_intdigest(
                ids[offsets[i] * width : offsets[i + 1] * width].tobytes()
                + loss[spans[i] * 8 : spans[i + 1] * 8].tobytes()
            )
            for i in range(len(offsets) - 1)
        ],
        dtype=np.uint64,
    )
