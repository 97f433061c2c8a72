"""Model directories as this room writes them: built aside, hashed while written, given their name when complete.

Every artefact carries `manifest.json` with size and sha256 of each file. Weights are written piece by piece, so the
memory that takes does not depend on the model. What a killed process leaves beside OUT is called `.OUT.unfinished`;
`unfinished.jsonl` in it says what was being built and which weight files are complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.durable import sha256_of_file, sync_directory, sync_file, write_errors, write_file
from trainer.errors import CannotWriteError, DataError, MissingInputError, UsageError
from trainer.locks import take_lock
from trainer.names import is_plain_path
from trainer.tensor_file import DTYPE_BYTES, TensorFileWriter

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = 1
SELF_HASH = "sha256_of_body"
UNFINISHED_NAME = "unfinished.jsonl"
SIGNATURE_NAME = "model.sig"
"""Signs all other files, the manifest too, so it is not listed there."""
SPARE_BYTES = 64 << 20
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

TensorPlan = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor name to (safetensors dtype, shape), in the order of writing."""

Pieces = Iterable[np.ndarray[Any, Any]]
"""Consecutive elements of one tensor, in the dtype of the file; bfloat16 as its 16-bit patterns."""


@dataclass(frozen=True)
class Entry:
    """One file of an artefact."""

    bytes: int
    sha256: str


def parse_size(text: str) -> int:
    """Bytes meant by `5GB`, `200MB`, `1GiB` or a plain number; UsageError otherwise."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise UsageError(f"'{text}' is not a size", "write it like 5GB or 200MB")
    size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size < 1:
        raise UsageError(f"'{text}' is no room for anything", "write it like 5GB or 200MB")
    return size


def tensor_bytes(plan: TensorPlan) -> int:
    """Bytes of all tensors of a plan, headers not counted."""
    return sum(_size(*entry) for entry in plan.values())


def refuse_existing(out: Path) -> None:
    """CannotWriteError when `out` is there already: an artefact never replaces another one."""
    if out.exists() or out.is_symlink():
        raise CannotWriteError(f"{out} exists already", "choose another name or remove it first")


@contextmanager
def new_directory(out: Path, expected_bytes: int, recipe: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """A directory beside `out` to build in; it becomes `out` when the block ends well and disappears when it does not.

    A process that is killed leaves it. With the same `recipe` (everything that decides what the weight files contain)
    the next one goes on from there: `write_shards` keeps the files that are complete. Otherwise it starts afresh.

    Checks first that `out` does not exist and that its disk has room for `expected_bytes`; both are CannotWriteError.
    RunLockedError when another process is building `out`.
    """
    refuse_existing(out)
    out = out.absolute()
    building = out.with_name(f".{out.name}.unfinished")
    with write_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with _only_builder(out):
        refuse_existing(out)
        with write_errors(building):
            if building.exists() and (recipe is None or _read_unfinished(building)[0] != _plain(recipe)):
                shutil.rmtree(building)
            there = sum(file.stat().st_size for file in building.glob("*")) if building.exists() else 0
            needed = max(0, expected_bytes - there) + SPARE_BYTES
            if (free := shutil.disk_usage(out.parent).free) < needed:
                raise CannotWriteError(
                    f"{out} needs {readable_bytes(needed)} and its disk has {readable_bytes(free)}",
                    "free disk space or choose another place",
                )
            building.mkdir(exist_ok=True)
        try:
            if recipe is not None and not (building / UNFINISHED_NAME).exists():
                write_file(building / UNFINISHED_NAME, json.dumps(_plain(recipe)) + "\n")
            yield building
            refuse_existing(out)
            with write_errors(out):
                sync_directory(building)
                building.rename(out)
                sync_directory(out.parent)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise


@contextmanager
def _only_builder(out: Path) -> Iterator[None]:
    """Hold the lock `.OUT.lock`; it is removed at the end. RunLockedError when another process has it."""
    file = out.with_name(f".{out.name}.lock")
    while True:
        stream = take_lock(file, str(out), "wait for it or choose another OUT")
        # Whoever had it before us removed its name at the end: then we hold a lock that nobody else will ever see.
        if file.exists() and os.fstat(stream.fileno()).st_ino == file.stat().st_ino:
            break
        stream.close()
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        stream.close()


def _plain(recipe: Mapping[str, Any]) -> Any:
    """The recipe as it reads back from JSON."""
    return json.loads(json.dumps(recipe))


def _read_unfinished(building: Path) -> tuple[Any, dict[str, Entry]]:
    """What was being built, and its complete weight files; a line that was cut short by a kill is left out."""
    lines: list[Any] = []
    with suppress(OSError, ValueError):
        lines.extend(map(json.loads, (building / UNFINISHED_NAME).read_text().splitlines()))
    if not lines:
        return None, {}
    return lines[0], {line["file"]: Entry(line["bytes"], line["sha256"]) for line in lines[1:]}


def _note_finished(building: Path, file: str, entry: Entry) -> None:
    path = building / UNFINISHED_NAME
    if not path.exists():
        return
    with write_errors(path), path.open("a") as stream:
        stream.write(json.dumps({"file": file, **asdict(entry)}) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def write_weights(
    directory: Path,
    stem: str,
    plan: TensorPlan,
    read: Callable[[str], np.ndarray[Any, Any]],
    max_shard_bytes: int,
) -> dict[str, Entry]:
    """As `write_shards`, for tensors that come whole."""
    return write_shards(directory, stem, plan, lambda name: [read(name)], max_shard_bytes)


def write_shards(
    directory: Path, stem: str, plan: TensorPlan, pieces: Callable[[str], Pieces], max_shard_bytes: int
) -> dict[str, Entry]:
    """Write `stem.safetensors`, or numbered shards with `stem.safetensors.index.json` when it takes more than one.

    `pieces(name)` is called once per tensor in order and must give the bytes the plan announces. A file that an earlier
    process finished in this directory is kept if it still has the sha256 it was written with. Returns the entries of
    all files.
    """
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    room = max_shard_bytes
    for name, tensor in plan.items():
        size = _size(*tensor)
        if shards[-1] and size > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor
        room -= size
    _, finished = _read_unfinished(directory)
    entries: dict[str, Entry] = {}
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards, 1):
        single = len(shards) == 1
        file = f"{stem}.safetensors" if single else f"{stem}-{index:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        path = directory / file
        if file in finished and path.is_file() and describe(path) == finished[file]:
            entries[file] = finished[file]
            continue
        path.unlink(missing_ok=True)
        with TensorFileWriter(path, shard, {"format": "pt"}, with_sha256=True) as writer:
            for name in shard:
                writer.write_pieces(name, pieces(name))
        entries[file] = Entry(writer.finished.bytes, str(writer.finished.sha256))
        _note_finished(directory, file, entries[file])
    if len(shards) > 1:
        index_file = directory / f"{stem}.safetensors.index.json"
        index_content = {"metadata": {"total_size": tensor_bytes(plan)}, "weight_map": weight_map}
        write_file(index_file, json.dumps(index_content, indent=2, sort_keys=True) + "\n")
        entries[index_file.name] = describe(index_file)
    return entries


def copy_files(sources: Iterator[Path] | list[Path], directory: Path) -> dict[str, Entry]:
    """Copy small files (tokenizer, configuration) into `directory`, synced, and describe them."""
    entries = {}
    for source in sources:
        target = directory / source.name
        with write_errors(target):
            shutil.copyfile(source, target)
        sync_file(target)
        entries[target.name] = describe(target)
    return entries


def describe(path: Path) -> Entry:
    """Size and sha256 of a finished file."""
    return Entry(path.stat().st_size, sha256_of_file(path))


def write_manifest(directory: Path, entries: Mapping[str, Entry], about: Mapping[str, Any]) -> None:
    """Write `manifest.json`: `about` (what the artefact is and comes from) and every file with size and sha256.

    The artefact is complete then: what was noted for a process that goes on is removed.
    """
    files = {name: {"bytes": entry.bytes, "sha256": entry.sha256} for name, entry in sorted(entries.items())}
    write_file(directory / MANIFEST_NAME, _manifest_text({"format": MANIFEST_FORMAT, **about, "files": files}))
    with write_errors(directory):
        (directory / UNFINISHED_NAME).unlink(missing_ok=True)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of an artefact; MissingInputError when there is none, DataError when it is not as it was written."""
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise MissingInputError(f"{directory} has no {MANIFEST_NAME}", "only models that Steadfast wrote have one")
    text = path.read_bytes()
    try:
        body: dict[str, Any] = json.loads(text)
        # Before anything it says is believed: a name that was changed must not blame the file.
        as_written = _manifest_text({key: value for key, value in body.items() if key != SELF_HASH}).encode() == text
        names = [str(name) for name in body["files"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is not readable", "export or quantize the model again") from error
    if not as_written:
        raise DataError(f"{path} is not as it was written", "export or quantize the model again")
    if outside := [name for name in names if not is_plain_path(name.lstrip("."))]:
        raise DataError(f"{path} names the file {outside[0]!r}", "a model's files lie in its directory")
    return body


def verify_artefact(directory: Path) -> None:
    """Check every byte of an artefact: its manifest, sizes, sha256 of all files, and that nothing else lies there.

    Raises DataError naming the file that is wrong, MissingInputError when the directory has no manifest. A signature
    may lie beside; whether it is good is another question (`tools.model_directory.signing`).
    """
    files = read_manifest(directory)["files"]
    check_sizes(directory)
    for file in sorted(directory.rglob("*")):
        if file.is_dir() and not file.is_symlink():
            continue
        name = str(file.relative_to(directory))
        if name in (MANIFEST_NAME, SIGNATURE_NAME):
            continue
        if name not in files:
            raise DataError(f"{file} does not belong to the model", "remove it")
        if sha256_of_file(file) != files[name]["sha256"]:
            raise DataError(f"{file} does not match its sha256", "export or quantize the model again, or copy it again")


def _manifest_text(body: Mapping[str, Any]) -> str:
    """JSON with the sha256 of everything before it."""
    text = json.dumps(body, indent=2, ensure_ascii=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({**body, SELF_HASH: digest}, indent=2, ensure_ascii=False) + "\n"


def check_sizes(directory: Path) -> None:
    """DataError when a file of an artefact is missing or has another size than its manifest says (cheap, no hashing).

    A directory without `manifest.json` (a model from elsewhere) passes.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        return
    for name, entry in read_manifest(directory)["files"].items():
        file, size = directory / name, entry["bytes"]
        if not file.is_file() or file.stat().st_size != size:
            state = f"has {file.stat().st_size} bytes where {path.name} says {size}" if file.is_file() else "is missing"
            raise DataError(f"{file} {state}", "export or quantize the model again, or copy it again")


def readable_bytes(count: float) -> str:
    """`count` bytes for people, decimal units."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * DTYPE_BYTES[dtype]
