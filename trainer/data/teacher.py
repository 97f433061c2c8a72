"""What a teacher predicted for a token store: made once by `steadfast teach`, read while a student learns from it.

    DIR/manifest.json       which store and teacher, k, temperature, every file with size and hashes, and its own hash
    DIR/teacher-<shard>-<xxh3>.safetensors
        token               uint32 [targets]                where each token to be predicted lies in the shard's ids
        candidates          uint16 or uint32 [targets, k]   the teacher's most probable tokens there
        log_probabilities   float16 [targets, k + 1]        theirs, in the same order; the last is that of all others

They belong to tokens of the store, not to rows: every sequence length, packing and order finds its own among them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.micro_batch import IGNORED, BatchLayout, MicroBatch, TeacherTargets
from trainer.data.store.reader import TokenStore, body_hash, manifest_text
from trainer.data.store.shards import Arrays, id_dtype, indexes_of_parts, read_arrays, read_errors, write_arrays
from trainer.data.store.windows import lengths_of
from trainer.durable import sha256_of_file, write_file, xxh3_of_file
from trainer.errors import DataError, MissingInputError
from trainer.names import is_plain_name

MANIFEST_NAME = "manifest.json"
KIND = "teacher"
AGAIN = "make it again: steadfast teach"
LEAST_LOG_PROBABILITY = -60_000.0
"""float16 has nothing far below; as a probability it is zero."""


class Teacher:
    """A teacher's predictions for one store, mapped. `top_k`, `temperature`; `fingerprint` names their content."""

    def __init__(self, path: Path, manifest: Mapping[str, Any], shards: Sequence[Arrays]) -> None:
        self.path = path
        self.top_k = int(manifest["top_k"])
        self.temperature = float(manifest["temperature"])
        self.fingerprint: str = str(manifest["body_sha256"])
        self._shards = shards

    def taught(self, batch: MicroBatch, layout: BatchLayout) -> TeacherTargets:
        """What the teacher predicted where `batch` has targets, in their order: row by row.

        DataError when it says nothing of a token.
        """
        places = np.flatnonzero(batch.targets.reshape(-1) != IGNORED) + 1
        shard, source, _, begin = layout.pieces[:4, np.argsort(layout.pieces[3])]
        piece = np.searchsorted(begin, places, side="right") - 1
        token = source[piece] + places - begin[piece]
        candidates = np.empty((len(places), self.top_k), dtype=np.int64)
        log_probabilities = np.empty((len(places), self.top_k + 1), dtype=np.float32)
        for number in np.unique(shard[piece]).tolist():
            mine = shard[piece] == number
            arrays = self._shards[number]
            known = arrays["token"]
            rows = np.searchsorted(known, token[mine])
            if rows.max() == len(known) or not np.array_equal(known[rows], token[mine]):
                raise DataError(f"{self.path} says nothing of some tokens of shard {number}", AGAIN)
            candidates[mine] = arrays["candidates"][rows]
            log_probabilities[mine] = arrays["log_probabilities"][rows]
        return TeacherTargets(candidates, log_probabilities)


def open_teacher(path: Path, store: TokenStore, rank: int = 0, world_size: int = 1) -> Teacher:
    """Open and check a teacher's predictions for `store`; ranks that open them together share the checking.

    Raises MissingInputError when there are none, DataError when they are damaged or were made for another store.
    """
    manifest = read_teacher_manifest(path)
    if manifest["store"] != store.fingerprint:
        raise DataError(f"{path} was made for another store than {store.location}", AGAIN)
    for entry in manifest["files"][rank::world_size]:
        _check_file(path / entry["name"], entry)
    with read_errors(path):
        return Teacher(path, manifest, [read_arrays(path / entry["name"]) for entry in manifest["files"]])


def read_teacher_manifest(path: Path) -> dict[str, Any]:
    """The checked manifest; MissingInputError when there is none, DataError when it is not as it was written."""
    file = path / MANIFEST_NAME
    if not file.is_file():
        raise MissingInputError(f"{path} has no {MANIFEST_NAME}", "give a directory that steadfast teach made")
    with read_errors(file):
        content = file.read_bytes()
    try:
        manifest: dict[str, Any] = json.loads(content)
        intact = manifest["body_sha256"] == body_hash(manifest) and content == manifest_text(manifest).encode()
        names = [str(entry["name"]) for entry in manifest["files"]]
        intact = intact and manifest["kind"] == KIND and all(is_plain_name(name) for name in names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file} is no manifest of a teacher's predictions", AGAIN) from error
    if not intact:
        raise DataError(f"{file} is not as it was written", AGAIN)
    return manifest


def _check_file(file: Path, entry: Mapping[str, Any]) -> None:
    if not file.is_file():
        raise DataError(f"{file} is missing", AGAIN)
    with read_errors(file):
        intact = file.stat().st_size == entry["bytes"] and xxh3_of_file(file) == entry["xxh3"]
    if not intact:
        raise DataError(f"{file} is damaged: it is not what the manifest says", AGAIN)


def targets_of_shard(arrays: Arrays) -> NDArray[np.int64]:
    """Where the supervised tokens lie in a shard's ids, ascending; nothing predicts the first token of a document."""
    spans = arrays["loss_spans"].astype(np.int64)
    counts = lengths_of(arrays["span_offsets"])
    begins = np.repeat(arrays["document_offsets"][:-1].astype(np.int64), counts)
    starts = begins + np.maximum(spans[:, 0], 1)
    return indexes_of_parts(starts, np.maximum(begins + spans[:, 1] - starts, 0))


def finished_shard(directory: Path, number: int) -> Path | None:
    """The predictions for a shard that are there already, whole."""
    for file in directory.glob(f"teacher-{number:05d}-*.safetensors"):
        if xxh3_of_file(file) == file.stem.rpartition("-")[2]:
            return file
        file.unlink()
    return None


def write_shard(
    directory: Path,
    number: int,
    token: NDArray[np.int64],
    candidates: NDArray[np.int64],
    log_probabilities: NDArray[np.float32],
    vocabulary_size: int,
) -> Path:
    """Write the predictions for a shard; the file has its name when it is whole. Raises CannotWriteError."""
    arrays = {
        "token": token.astype(np.uint32),
        "candidates": candidates.astype(id_dtype(vocabulary_size)),
        "log_probabilities": np.maximum(log_probabilities, LEAST_LOG_PROBABILITY).astype(np.float16),
    }
    temporary = directory / f".teacher-{number:05d}"
    digest = write_arrays(temporary, arrays, {})
    return temporary.rename(directory / f"teacher-{number:05d}-{digest.xxh3_128}.safetensors")


def write_teacher_manifest(directory: Path, files: Sequence[Path], about: Mapping[str, Any]) -> None:
    """Write the manifest, last: `about` says which store, teacher, `top_k` and `temperature`; files are one a shard."""
    entries = [
        {
            "name": file.name,
            "bytes": file.stat().st_size,
            "xxh3": file.stem.rpartition("-")[2],
            "sha256": sha256_of_file(file),
        }
        for file in files
    ]
    manifest: dict[str, Any] = {"kind": KIND, **about, "files": entries}
    manifest["body_sha256"] = body_hash(manifest)
    write_file(directory / MANIFEST_NAME, manifest_text(manifest))
