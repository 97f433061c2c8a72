"""Open, check and read a token store. The layout is described in `store`."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.packing import RowPlan, plan_rows
from trainer.data.shards import read_arrays
from trainer.data.windows import check_window, lengths_of
from trainer.durable import sha256_of_file, xxh3_of_file
from trainer.errors import DataError, MissingInputError

SCHEMA_VERSION = 1
MANIFEST = "manifest-00000001.json"
PLAN_ARRAYS = (
    "document",
    "start",
    "stop",
    "first_target",
    "row_offsets",
    "row_samples",
    "supervised",
    "tokens",
    "dropped",
)
REBUILD = "build the store again, or restore the file from a copy"


def plan_name(sequence_length: int, overlap: int, packing: bool) -> str:
    """File name of a stored plan."""
    return f"plan-{sequence_length}-{overlap}-{'packed' if packing else 'single'}.safetensors"


def body_hash(body: Mapping[str, Any]) -> str:
    """sha256 of a manifest's body (everything but this hash), hexadecimal."""
    canonical = json.dumps({key: value for key, value in body.items() if key != "body_sha256"}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def content_fingerprint(manifest: Mapping[str, Any]) -> str:
    """sha256 over what is trained on: the token shards and what the ids mean.

    Where the inputs lay, when it was built and for which sequence length are left out: a store that is built again
    from the same rows has the same fingerprint, and a run on it resumes.
    """
    shards = [[file["name"], file["sha256"]] for file in manifest["files"] if file["name"].startswith("tokens/")]
    return body_hash({"shards": shards, "tokenizer": manifest["tokenizer_fingerprint"]})


class TokenStore:
    """A token store opened for reading: every file is a memory map, of which only what is used is read.

    Documents and the stored plan are views of these maps; only `compute_plan` makes arrays over all documents.
    `path` is its directory, `manifest` its manifest, `fingerprint` names its content (see `content_fingerprint`).
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.fingerprint: str = content_fingerprint(manifest)
        names = [file["name"] for file in manifest["files"] if file["name"].startswith("tokens/")]
        with _read_errors(path):
            self._shards = [read_arrays(path / name) for name in names]
        counts = [len(shard["document_offsets"]) - 1 for shard in self._shards]
        self._first_document = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        if (found := int(self._first_document[-1])) != manifest["documents"]:
            raise DataError(f"{path} has {found} documents, its manifest says {manifest['documents']}", REBUILD)

    @property
    def tokenizer_path(self) -> Path:
        """The copy of the tokenizer this store was built with."""
        return self.path / "tokenizer"

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens of the tokenizer; every id is below it."""
        return int(self.manifest["vocabulary_size"])

    @property
    def padding_id(self) -> int:
        """The id that fills rows; never a target."""
        return int(self.manifest["padding_id"])

    @property
    def sequence_length(self) -> int:
        """The sequence length the store was built for."""
        return int(self.manifest["sequence_length"])

    @property
    def overlap(self) -> int:
        """The overlap the store was built for."""
        return int(self.manifest["overlap"])

    @property
    def n_documents(self) -> int:
        """Number of documents."""
        return int(self.manifest["documents"])

    def document(self, index: int) -> tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.uint32]]:
        """Ids (uint16 or uint32 [tokens], a view) and supervised spans (uint32 [spans, 2]) of one document."""
        shard, local = self._locate(index)
        offsets, span_offsets = shard["document_offsets"], shard["span_offsets"]
        ids = shard["ids"][int(offsets[local]) : int(offsets[local + 1])]
        spans = shard["loss_spans"][int(span_offsets[local]) : int(span_offsets[local + 1])]
        return ids, spans

    def place(self, index: int) -> str:
        """`file:line` of the row a document was made from."""
        shard, local = self._locate(index)
        file = self.manifest["sources"][int(shard["source"][local])]["file"]
        return f"{file}:{int(shard['line'][local])}"

    def plan(self, sequence_length: int | None = None, overlap: int | None = None, packing: bool = True) -> RowPlan:
        """The plan for a sequence length: the stored one, else computed (about a second per million samples).

        The defaults are what the store was built for; with another length and no overlap, an eighth of the length.

        Raises:
            UsageError: the overlap does not fit the length.
            DataError: no row has a target.
        """
        length = sequence_length or self.sequence_length
        if overlap is None:
            overlap = self.overlap if length == self.sequence_length else default_overlap(length)
        check_window(length, overlap)
        stored = f"plans/{plan_name(length, overlap, packing)}"
        if any(file["name"] == stored for file in self.manifest["files"]):
            with _read_errors(self.path):
                arrays = read_arrays(self.path / stored)
            return RowPlan(
                **{name: arrays[name] for name in PLAN_ARRAYS},
                sequence_length=length,
                overlap=overlap,
                packing=packing,
            )
        plan = self.compute_plan(length, overlap, packing)
        if plan.n_rows == 0:
            raise DataError(
                f"{self.path} has no supervised token at sequence length {length}", "see steadfast data inspect"
            )
        return plan

    def compute_plan(self, sequence_length: int, overlap: int, packing: bool) -> RowPlan:
        """The plan from the documents, never from the stored one; reads the offsets and spans of all of them."""
        return plan_rows(
            _joined_offsets([shard["document_offsets"] for shard in self._shards]),
            np.concatenate([shard["loss_spans"] for shard in self._shards]),
            _joined_offsets([shard["span_offsets"] for shard in self._shards]),
            sequence_length=sequence_length,
            overlap=overlap,
            packing=packing,
        )

    def _locate(self, index: int) -> tuple[dict[str, NDArray[Any]], int]:
        if not 0 <= index < self.n_documents:
            raise IndexError(f"document {index} of {self.n_documents}")
        number = int(np.searchsorted(self._first_document, index, side="right")) - 1
        return self._shards[number], index - int(self._first_document[number])


def default_overlap(sequence_length: int) -> int:
    """An eighth of the sequence length, at least 1."""
    return max(1, sequence_length // 8)


def open_store(path: Path | str, verify: bool = True, rank: int = 0, world_size: int = 1) -> TokenStore:
    """Open the store at `path`; with `verify` every file's size and xxh3 are checked first (8 GiB/s).

    Ranks that open it together share the checking: rank r checks the files r, r + world_size, ... of the manifest.
    Together they check every file once, and only one of them finds a damaged one.

    Raises:
        MissingInputError: nothing there, no store, or one that cannot be read (too many open files, no permission).
        DataError: the manifest or a file is damaged or missing; the message names it.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if verify:
        _check_files(path, manifest["files"][rank::world_size], thorough=False)
    return TokenStore(path, manifest)


@dataclass(frozen=True)
class VerifyReport:
    """What `verify_store` checked."""

    path: str
    files: int
    bytes: int
    documents: int
    tokens: int
    supervised_tokens: int
    fingerprint: str


def verify_store(path: Path | str) -> VerifyReport:
    """Check a store completely: sha256 of every file, ids below the vocabulary size, spans in range, counts.

    Raises:
        MissingInputError: nothing there, or no store.
        DataError: the first thing that is wrong, with its file.
    """
    path = Path(path)
    manifest = read_manifest(path)
    _check_files(path, manifest["files"], thorough=True)
    store = TokenStore(path, manifest)
    tokens = supervised = 0
    for file in manifest["files"]:
        if not file["name"].startswith("tokens/"):
            continue
        with _read_errors(path):
            arrays = read_arrays(path / file["name"])
        _check_shard(path / file["name"], arrays, store.vocabulary_size)
        tokens += len(arrays["ids"])
        spans = arrays["loss_spans"].astype(np.int64)
        supervised += int((spans[:, 1] - spans[:, 0]).sum())
    _check_plan(store)
    for name, counted in (("tokens", tokens), ("supervised_tokens", supervised)):
        if counted != manifest[name]:
            raise DataError(f"{path} holds {counted} {name}, its manifest says {manifest[name]}", REBUILD)
    return VerifyReport(
        path=str(path),
        files=len(manifest["files"]),
        bytes=sum(file["bytes"] for file in manifest["files"]),
        documents=store.n_documents,
        tokens=tokens,
        supervised_tokens=supervised,
        fingerprint=store.fingerprint,
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """The checked manifest of the store at `path`."""
    file = path / MANIFEST
    if not path.is_dir():
        raise MissingInputError(f"there is no token store {path}", "build one: steadfast data build --help")
    if not file.is_file():
        raise MissingInputError(f"{path} is no token store (no {MANIFEST})", "build one: steadfast data build --help")
    try:
        with _read_errors(file):
            manifest = json.loads(file.read_text(encoding="utf-8"))
        expected = manifest["body_sha256"]
        actual = body_hash(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} is damaged: it cannot be read", REBUILD) from error
    if expected != actual:
        raise DataError(f"{file} is damaged: its content does not match its own hash", REBUILD)
    if manifest.get("schema") != SCHEMA_VERSION:
        raise DataError(
            f"{file} has schema {manifest.get('schema')}, this version reads {SCHEMA_VERSION}", "build it again"
        )
    return dict(manifest)


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """Say of an OSError raised while reading the store or file `path` what it is: no damage, and no bug of ours."""
    try:
        yield
    except OSError as error:
        place = error.filename or path
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise MissingInputError(
                f"cannot open {place}: too many open files", "raise the limit: ulimit -n 65536"
            ) from error
        raise MissingInputError(f"cannot read {place}: {error.strerror or error}", "check it and its disk") from error


def _check_files(path: Path, files: Sequence[Mapping[str, Any]], *, thorough: bool) -> None:
    for entry in files:
        file = path / entry["name"]
        if not file.is_file():
            raise DataError(f"{file} is missing", REBUILD)
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise DataError(f"{file} is damaged: {size} bytes instead of {entry['bytes']}", REBUILD)
        with _read_errors(file):
            intact = sha256_of_file(file) == entry["sha256"] if thorough else xxh3_of_file(file) == entry["xxh3"]
        if not intact:
            raise DataError(f"{file} is damaged: its checksum does not match the manifest", REBUILD)


def _check_shard(file: Path, arrays: Mapping[str, NDArray[Any]], vocabulary_size: int) -> None:
    ids, spans = arrays["ids"], arrays["loss_spans"].astype(np.int64)
    if len(ids) and int(ids.max()) >= vocabulary_size:
        raise DataError(f"{file}: id {int(ids.max())} is not below the vocabulary size {vocabulary_size}", REBUILD)
    lengths = lengths_of(arrays["document_offsets"])
    owner = np.repeat(np.arange(len(lengths)), lengths_of(arrays["span_offsets"]))
    good = (spans[:, 0] < spans[:, 1]) & (spans[:, 1] <= lengths[owner])
    rising = (owner[1:] != owner[:-1]) | (spans[1:, 0] >= spans[:-1, 1])
    if not (good.all() and rising.all()):
        raise DataError(f"{file}: supervised spans out of order or out of range", REBUILD)


def _check_plan(store: TokenStore) -> None:
    """The stored plan must be the one that the documents give."""
    stored, computed = store.plan(), store.compute_plan(store.sequence_length, store.overlap, packing=True)
    for name in PLAN_ARRAYS:
        if not np.array_equal(getattr(stored, name), getattr(computed, name)):
            raise DataError(f"{store.path}: the stored plan does not fit the documents ({name})", REBUILD)


def _joined_offsets(parts: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """Offsets of several shards as those of one long array."""
    joined = [np.zeros(1, dtype=np.uint64)]
    for part in parts:
        joined.append(part[1:] + joined[-1][-1])
    return np.concatenate(joined)
