"""Open, check and read a token store. The layout is described in `store`."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.store.manifest import what_is_wrong
from trainer.data.store.packing import PLAN_ARRAYS, LongText, PlanSpec, RowPlan, default_overlap, plan_rows
from trainer.data.store.remote import RemoteFile, ShardCache, fetch_bytes, is_url
from trainer.data.store.shards import Arrays, CachedShards, LocalShards, Shards, read_arrays, read_errors, write_arrays
from trainer.data.store.windows import lengths_of
from trainer.durable import sha256_of_file, write_errors, xxh3_of_file
from trainer.errors import DataError, HangError, MissingInputError, UsageError
from trainer.names import is_plain_path

SCHEMA_VERSION = 2
MANIFEST = "manifest-00000001.json"
FETCHED_BYTES = 4 << 30
"""Most bytes of shards that are kept at a time of a store at a URL that is only looked at."""
REBUILD = "build the store again, or restore the file from a copy"


def body_hash(body: Mapping[str, Any]) -> str:
    """sha256 of a manifest's body (everything but this hash), hexadecimal."""
    canonical = json.dumps({key: value for key, value in body.items() if key != "body_sha256"}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """A manifest, its hash included, as it is written."""
    return json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"


def content_fingerprint(manifest: Mapping[str, Any]) -> str:
    """sha256 over what is trained on: the token shards and what the ids mean.

    Where the inputs lay, when it was built and for which sequence length are left out: a store that is built again
    from the same rows has the same fingerprint, and a run on it resumes.
    """
    shards = [[file["name"], file["sha256"]] for file in manifest["files"] if file["name"].startswith("tokens/")]
    return body_hash({"shards": shards, "tokenizer": manifest["tokenizer_fingerprint"]})


class TokenStore:
    """A token store opened for reading: every file is a memory map, of which only what is used is read.

    Documents and the stored plan are views of these maps; only a plan that is not stored makes arrays over all
    documents. `location` is the path or URL it was opened with, `path` its directory on this machine (of a store at a
    URL: that of the files fetched so far), `manifest` its manifest, `fingerprint` names its content (see
    `content_fingerprint`).
    """

    def __init__(self, location: str, path: Path, manifest: dict[str, Any], cache: ShardCache | None = None) -> None:
        self.location = location
        self.path = path
        self.manifest = manifest
        self.fingerprint: str = content_fingerprint(manifest)
        self.is_remote = is_url(location)
        self._cache = cache
        self._tokens = [file for file in manifest["files"] if file["name"].startswith("tokens/")]
        counts = [file["documents"] for file in self._tokens]
        self._first_document = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        if (found := int(self._first_document[-1])) != manifest["documents"]:
            raise DataError(f"the shards of {location} have {found} documents, not {manifest['documents']}", REBUILD)
        if found == 0:
            raise DataError(f"{location} has no documents", REBUILD)
        self._shards: Shards
        if cache is not None and self.is_remote:
            self._remote = {file.key: file for file in _remote_files(location, path, manifest)}
            cache.register(list(self._remote.values()))
            self._shards = CachedShards(cache, [self._remote_file(file["name"]) for file in self._tokens])
            for file in manifest["files"]:
                if file["name"].startswith("tokenizer/"):
                    cache.path(self._remote_file(file["name"]))
        else:
            self._shards = LocalShards(path, [file["name"] for file in self._tokens])
            for number, (file, count) in enumerate(zip(self._tokens, counts, strict=True)):
                if len(self._shards.shard(number)["document_offsets"]) != count + 1:
                    raise DataError(f"{path / file['name']} has not the {count} documents of the manifest", REBUILD)

    @property
    def name(self) -> str:
        """The last part of its location."""
        return self.location.rstrip("/").rpartition("/")[2]

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
    def spec(self) -> PlanSpec:
        """The plan the store was built with."""
        return PlanSpec(**self.manifest["plan"])

    @property
    def n_documents(self) -> int:
        """Number of documents."""
        return int(self.manifest["documents"])

    @property
    def n_shards(self) -> int:
        """Number of token shards."""
        return len(self._tokens)

    @property
    def shard_bytes(self) -> int:
        """Bytes of all token shards."""
        return sum(int(file["bytes"]) for file in self._tokens)

    @property
    def largest_shard_bytes(self) -> int:
        """Bytes of the largest token shard."""
        return max((int(file["bytes"]) for file in self._tokens), default=0)

    @property
    def source_names(self) -> list[str]:
        """Names of the sources, in the order of their numbers."""
        return [source["name"] for source in self.manifest["sources"]]

    def document(self, index: int) -> tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.uint32]]:
        """Ids (uint16 or uint32 [tokens], a view) and supervised spans (uint32 [spans, 2]) of one document."""
        shard, local = self._locate(index)
        offsets, span_offsets = shard["document_offsets"], shard["span_offsets"]
        ids = shard["ids"][int(offsets[local]) : int(offsets[local + 1])]
        spans = shard["loss_spans"][int(span_offsets[local]) : int(span_offsets[local + 1])]
        return ids, spans

    def column(self, name: str) -> NDArray[Any]:
        """One value a document over all documents: source, file, line, label, head or document_hash."""
        return np.concatenate([self._shards.shard(number)[name] for number in range(self.n_shards)])

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every document, int64 [documents]."""
        shards = (self._shards.shard(number) for number in range(self.n_shards))
        return np.concatenate([lengths_of(shard["document_offsets"]) for shard in shards])

    def source_of(self, index: int) -> str:
        """Name of the source a document comes from."""
        shard, local = self._locate(index)
        return self.source_names[int(shard["source"][local])]

    def place(self, index: int) -> str:
        """`file:line` of the row a document was made from."""
        shard, local = self._locate(index)
        file = self.manifest["inputs"][int(shard["file"][local])]["name"]
        return f"{file}:{int(shard['line'][local])}"

    def plan_spec(
        self,
        sequence_length: int | None = None,
        *,
        window: int | None = None,
        overlap: int | None = None,
        pin_prefix: bool | None = None,
        long_text: LongText | None = None,
        packing: bool = True,
        by_source: bool | None = None,
    ) -> PlanSpec:
        """A spec in which what is not given is as the store was built.

        With another length or window and no overlap, the overlap is an eighth of the window.

        Raises:
            UsageError: the settings do not fit each other.
        """
        built = self.spec
        length = sequence_length or built.sequence_length
        if window is None:
            window = built.window if length == built.sequence_length else length
        if overlap is None:
            overlap = built.overlap if window == built.window else default_overlap(window)
        return PlanSpec(
            sequence_length=length,
            window=window,
            overlap=overlap,
            pin_prefix=built.pin_prefix if pin_prefix is None else pin_prefix,
            long_text=built.long_text if long_text is None else long_text,
            packing=packing,
            by_source=built.by_source if by_source is None else by_source,
        ).check()

    def has_plan(self, spec: PlanSpec) -> bool:
        """Whether the plan is stored."""
        return any(file["name"] == f"plans/{spec.name}.safetensors" for file in self.manifest["files"])

    def plan(self, spec: PlanSpec | None = None) -> RowPlan:
        """The plan of a spec (default: that of the build): the stored one, else computed.

        Computing takes about a second per million samples. With a cache one process of the node does it and the others
        map its result, which stays in the cache; without, each process computes its own: the store never changes.

        Raises:
            UsageError: the spec cannot be used.
            DataError: no row has a target, a document is too long and the spec calls that an error, or the stored plan
                is one of other documents.
        """
        spec = (spec or self.spec).check()
        if self.has_plan(spec):
            return self._stored_plan(spec)
        plan = self.compute_plan(spec) if self._cache is None else self._shared_plan(spec, self._cache)
        if plan.n_rows == 0:
            raise DataError(
                f"{self.location} has no supervised token at sequence length {spec.sequence_length}",
                "see steadfast data inspect",
            )
        return plan

    def _stored_plan(self, spec: PlanSpec) -> RowPlan:
        file = self.file(f"plans/{spec.name}.safetensors")
        plan = _read_plan(file, spec)
        if len(plan.dropped) != self.n_documents:
            raise DataError(
                f"{file} is a plan of {len(plan.dropped)} documents, {self.location} has {self.n_documents}", REBUILD
            )
        return plan

    def file(self, name: str) -> Path:
        """A file of the manifest on this machine; that of a store at a URL is fetched first, and checked."""
        if self._cache is not None and self.is_remote:
            return self._cache.path(self._remote_file(name))
        return self.path / name

    def compute_plan(self, spec: PlanSpec) -> RowPlan:
        """The plan from the documents, never from a stored one; reads offsets and spans of all of them."""
        shards = (self._shards.shard(number) for number in range(self.n_shards))
        return plan_rows(shards, spec, len(self.manifest["sources"]), self.place)

    def expect(self, documents: NDArray[np.integer[Any]], near: Sequence[tuple[int, int]] = ()) -> None:
        """Say which documents the next step needs, and ranges [first, last] of those that may follow, nearest first.

        A store at a URL then fetches their shards; to another store it means nothing.
        """
        if not self.is_remote:
            return
        needed = np.unique(self._shard_of(np.asarray(documents, dtype=np.int64))).tolist()
        ranges = self._shard_of(np.array(near, dtype=np.int64).reshape(-1, 2)).tolist()
        soon = dict.fromkeys(number for first, last in ranges for number in range(first, last + 1))
        self._shards.expect(needed, list(soon))

    def _shard_of(self, documents: NDArray[Any]) -> NDArray[np.int64]:
        return np.searchsorted(self._first_document, documents, side="right") - 1

    def locate(self, documents: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shard of each document and its number there, int64 like `documents`.

        Raises IndexError when there is no such document.
        """
        documents = np.asarray(documents, dtype=np.int64)
        if len(documents) and not 0 <= int(documents.min()) <= int(documents.max()) < self.n_documents:
            raise IndexError(f"documents {documents.min()} to {documents.max()} of {self.n_documents}")
        shards: NDArray[np.int64] = self._shard_of(documents)
        return shards, documents - self._first_document[shards]

    def shard(self, number: int) -> Arrays:
        """The arrays of one shard, views of a memory map."""
        return self._shards.shard(number)

    def _locate(self, index: int) -> tuple[Arrays, int]:
        if not 0 <= index < self.n_documents:
            raise IndexError(f"document {index} of {self.n_documents}")
        number = int(self._shard_of(np.int64(index)))  # type: ignore[arg-type]
        return self._shards.shard(number), index - int(self._first_document[number])

    def _remote_file(self, name: str) -> RemoteFile:
        return self._remote[_key(self.fingerprint, name)]

    def _shared_plan(self, spec: PlanSpec, cache: ShardCache) -> RowPlan:
        """A plan computed once for a node. Its file is named by its content, so a damaged one is not used."""
        directory = cache.directory / self.fingerprint[:16] / "computed"
        deadline = time.monotonic() + cache.patience_seconds
        while True:
            for file in directory.glob(f"{spec.name}.*.safetensors"):
                if xxh3_of_file(file) == file.name.split(".")[-2]:
                    return _read_plan(file, spec)
                if cache.downloads:
                    file.unlink(missing_ok=True)
            if cache.downloads:
                plan = self.compute_plan(spec)
                with write_errors(directory):
                    directory.mkdir(parents=True, exist_ok=True)
                    temporary = directory / f".{spec.name}.{os.getpid()}"
                    temporary.unlink(missing_ok=True)
                    digest = write_arrays(temporary, {name: getattr(plan, name) for name in PLAN_ARRAYS}, {})
                    temporary.rename(directory / f"{spec.name}.{digest.xxh3_128}.safetensors")
            elif time.monotonic() > deadline:
                raise HangError(
                    f"the plan {spec.name} was not computed within {cache.patience_seconds:g} seconds",
                    "see the error of local rank 0",
                )
            else:
                time.sleep(0.05)


def open_store(
    location: Path | str,
    verify: bool = True,
    rank: int = 0,
    world_size: int = 1,
    cache: ShardCache | None = None,
) -> TokenStore:
    """Open the store at a path or URL (of any kind fsspec knows: http, s3, memory, ...).

    With `verify` every file's size and xxh3 are checked first (8 GiB/s). Ranks that open a local store together share
    the checking: rank r checks the files r, r + world_size, ... of the manifest. Together they check every file once,
    and only one of them finds a damaged one. Of a store at a URL only the manifest and the tokenizer are fetched now;
    every file is checked when it is opened.

    Raises:
        MissingInputError: nothing there, no store, or one that cannot be read (too many open files, no permission).
        DataError: the manifest or a file is damaged or missing; the message names it.
        UsageError: a URL without a cache.
    """
    if is_url(location):
        location = str(location).rstrip("/")
        if cache is None:
            raise UsageError(
                f"{location} is a URL", "give a directory on a local disk to fetch it into: data.cache_dir"
            )
        place = f"{location}/{MANIFEST}"
        manifest = _checked_manifest(fetch_bytes(place), place)
        directory = cache.directory / content_fingerprint(manifest)[:16]
        return TokenStore(location, directory, manifest, cache)
    path = Path(location)
    manifest = read_manifest(path)
    if verify:
        _check_files(path, manifest["files"][rank::world_size], thorough=False)
    return TokenStore(str(location), path, manifest, cache)


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


@contextmanager
def reading(location: Path | str, verify: bool = True) -> Iterator[TokenStore]:
    """The store at a path or URL, for one look at it; what is fetched of one at a URL is removed afterwards."""
    if not is_url(location):
        yield open_store(location, verify)
        return
    with (
        TemporaryDirectory(prefix="steadfast-store-") as directory,
        closing(ShardCache(Path(directory), FETCHED_BYTES)) as cache,
    ):
        yield open_store(location, cache=cache)


def verify_store(location: Path | str) -> VerifyReport:
    """Check a store completely: sha256 of every file, ids below the vocabulary size, spans in range, counts.

    Of a store at a URL every file of the manifest is fetched; what else lies there is not seen.

    Raises:
        MissingInputError: nothing there, or no store.
        DataError: the first thing that is wrong, with its file.
    """
    if not is_url(location):
        path = Path(location)
        manifest = read_manifest(path)
        # Before anything is opened: what is damaged cannot be read.
        _check_files(path, manifest["files"], thorough=True)
        known = {MANIFEST, *(file["name"] for file in manifest["files"])}
        for found in sorted(path.rglob("*")):
            if (found.is_symlink() or not found.is_dir()) and str(found.relative_to(path)) not in known:
                raise DataError(f"{found} does not belong to the store", "remove it")
    with reading(location, verify=False) as store:
        return _verified(store)


def _verified(store: TokenStore) -> VerifyReport:
    manifest = store.manifest
    tokens = supervised = 0
    for entry in manifest["files"]:
        file = store.file(entry["name"])
        if store.is_remote:
            _check_file(file, entry, thorough=True)
        if not entry["name"].startswith("tokens/"):
            continue
        with read_errors(file):
            arrays = read_arrays(file)
        _check_shard(file, arrays, manifest)
        tokens += len(arrays["ids"])
        spans = arrays["loss_spans"].astype(np.int64)
        supervised += int((spans[:, 1] - spans[:, 0]).sum())
    _check_plan(store)
    for name, counted in (("tokens", tokens), ("supervised_tokens", supervised)):
        if counted != manifest[name]:
            raise DataError(f"{store.location} holds {counted} {name}, its manifest says {manifest[name]}", REBUILD)
    return VerifyReport(
        path=store.location,
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
    with read_errors(file):
        return _checked_manifest(file.read_bytes(), str(file))


def _checked_manifest(content: bytes, file: str) -> dict[str, Any]:
    try:
        manifest = json.loads(content)
        expected = manifest["body_sha256"]
        # Numbers and escapes can be spelt in several ways, and what is not as we write it was changed.
        as_written = expected == body_hash(manifest) and content == manifest_text(manifest).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file} is damaged: it cannot be read", REBUILD) from error
    if not as_written:
        raise DataError(f"{file} is damaged: its content does not match its own hash", REBUILD)
    if manifest.get("schema") != SCHEMA_VERSION:
        raise DataError(
            f"{file} has schema {manifest.get('schema')}, this version reads {SCHEMA_VERSION}", "build it again"
        )
    if (wrong := what_is_wrong(manifest)) is not None:
        raise DataError(f"{file} is damaged: {wrong} is not what a store has there", REBUILD)
    names = [file["name"] for file in manifest["files"]]
    if foreign := [name for name in names if not is_plain_path(name)]:
        # A store of somebody else must read and write nothing beside itself and the cache.
        raise DataError(f"{file} names the file {foreign[0]!r}", "this is no store that was built here")
    return dict(manifest)


def _check_files(path: Path, files: Sequence[Mapping[str, Any]], *, thorough: bool) -> None:
    for entry in files:
        _check_file(path / entry["name"], entry, thorough=thorough)


def _check_file(file: Path, entry: Mapping[str, Any], *, thorough: bool) -> None:
    if not file.is_file():
        raise DataError(f"{file} is missing", REBUILD)
    size = file.stat().st_size
    if size != entry["bytes"]:
        raise DataError(f"{file} is damaged: {size} bytes instead of {entry['bytes']}", REBUILD)
    with read_errors(file):
        intact = sha256_of_file(file) == entry["sha256"] if thorough else xxh3_of_file(file) == entry["xxh3"]
    if not intact:
        raise DataError(f"{file} is damaged: its checksum does not match the manifest", REBUILD)


def _check_shard(file: Path, arrays: Mapping[str, NDArray[Any]], manifest: Mapping[str, Any]) -> None:
    ids, spans = arrays["ids"], arrays["loss_spans"].astype(np.int64)
    if len(ids) and int(ids.max()) >= manifest["vocabulary_size"]:
        raise DataError(
            f"{file}: id {int(ids.max())} is not below the vocabulary size {manifest['vocabulary_size']}", REBUILD
        )
    lengths = lengths_of(arrays["document_offsets"])
    documents = np.arange(len(lengths))
    owner = np.repeat(documents, lengths_of(arrays["span_offsets"]))
    good = (spans[:, 0] < spans[:, 1]) & (spans[:, 1] <= lengths[owner])
    rising = (owner[1:] != owner[:-1]) | (spans[1:, 0] >= spans[:-1, 1])
    if not (good.all() and rising.all()):
        raise DataError(f"{file}: supervised spans out of order or out of range", REBUILD)
    ends = arrays["turn_ends"].astype(np.int64)
    owner = np.repeat(documents, lengths_of(arrays["turn_offsets"]))
    rising = (owner[1:] != owner[:-1]) | (ends[1:] > ends[:-1])
    if not ((ends <= lengths[owner]).all() and rising.all()):
        raise DataError(f"{file}: ends of turns out of order or out of range", REBUILD)
    for name, limit in (("head", lengths + 1), ("source", len(manifest["sources"])), ("file", len(manifest["inputs"]))):
        if (arrays[name].astype(np.int64) >= limit).any():
            raise DataError(f"{file}: {name} out of range", REBUILD)


def _check_plan(store: TokenStore) -> None:
    """The stored plan must be the one that the documents give."""
    stored, computed = store.plan(), store.compute_plan(store.spec)
    for name in PLAN_ARRAYS:
        if not np.array_equal(getattr(stored, name), getattr(computed, name)):
            raise DataError(f"{store.path}: the stored plan does not fit the documents ({name})", REBUILD)


def _read_plan(file: Path, spec: PlanSpec) -> RowPlan:
    with read_errors(file):
        arrays = read_arrays(file)
    return RowPlan(**{name: arrays[name] for name in PLAN_ARRAYS}, spec=spec)


def _key(fingerprint: str, name: str) -> str:
    return f"{fingerprint[:16]}--{name.replace('/', '--')}"


def _remote_files(url: str, directory: Path, manifest: Mapping[str, Any]) -> list[RemoteFile]:
    fingerprint = content_fingerprint(manifest)
    return [
        RemoteFile(
            url=f"{url}/{file['name']}",
            path=directory / file["name"],
            bytes=file["bytes"],
            xxh3=file["xxh3"],
            key=_key(fingerprint, file["name"]),
            evictable=file["name"].startswith("tokens/"),
        )
        for file in manifest["files"]
    ]
