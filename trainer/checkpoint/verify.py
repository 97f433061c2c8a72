"""Which checkpoints exist, and whether each is exactly what was committed.

Torch-free: export and repair tools read checkpoints through this module too.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.durable import xxh3_of_file
from trainer.errors import CheckpointError, MissingInputError

FORMAT = 1
MANIFEST_NAME = "MANIFEST.json"
CHECKPOINTS = "checkpoints"
_STEP_NAME = re.compile(r"step-(\d{8,})")
_SAFE_NAME = re.compile(r"(model/)?[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Manifest:
    """What a committed checkpoint consists of."""

    step: int
    """Optimizer steps taken."""
    world_size: int
    """Ranks that wrote it; any number of ranks can read it."""
    files: dict[str, dict[str, Any]]
    """Relative file name to {bytes, xxh3_128}; every file but the manifest itself."""
    parameters: dict[str, dict[str, Any]]
    """Parameter name to {shape, dtype of the live model, frozen if it is}, in model order; no tied aliases."""
    tied: dict[str, str]
    """Alias of a tied parameter to the name it is stored under."""
    buffers: dict[str, dict[str, Any]]
    """Persistent buffer name to {shape, dtype of the live model}."""
    identity: dict[str, str]
    """Fingerprints a resumed run must share (see trainer.prepare.run_identity)."""
    provenance: dict[str, Any]
    """Where it came from: tokens seen, versions, data source, time."""
    format: int = FORMAT


def step_directory(checkpoints: Path, step: int) -> Path:
    """The place of the checkpoint of `step`."""
    return checkpoints / f"step-{step:08d}"


def committed_steps(checkpoints: Path) -> list[int]:
    """Steps that have a committed directory, newest first (not yet verified)."""
    if not checkpoints.is_dir():
        return []
    matches = (_STEP_NAME.fullmatch(path.name) for path in checkpoints.iterdir() if path.is_dir())
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def manifest_text(manifest: Manifest) -> str:
    """The manifest as it is written: JSON with the sha256 of its own body."""
    body = dict(vars(manifest))
    return json.dumps({**body, "sha256_of_body": _hash_of_body(body)}, indent=1, ensure_ascii=False) + "\n"


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint directory `path`; CheckpointError when it is absent or not as written."""
    try:
        text = (path / MANIFEST_NAME).read_bytes()
        body = json.loads(text)
        digest = body.pop("sha256_of_body")
        if digest != _hash_of_body(body):
            raise damaged(path, f"{MANIFEST_NAME} does not match its own hash")
        if body["format"] != FORMAT:
            raise damaged(path, f"format {body['format']} is not the format {FORMAT} this version reads")
        manifest = Manifest(**body)
        if manifest_text(manifest).encode() != text:
            # Numbers and escapes can be spelt in several ways: what is not byte for byte ours was changed.
            raise damaged(path, f"{MANIFEST_NAME} is not as it was written")
    except FileNotFoundError as error:
        raise damaged(path, f"{MANIFEST_NAME} is missing") from error
    except OSError as error:
        raise damaged(path, f"{MANIFEST_NAME} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, f"{MANIFEST_NAME} is not readable") from error
    if not _is_sound(manifest):
        raise damaged(path, f"{MANIFEST_NAME} is not what this version writes")
    named = _STEP_NAME.fullmatch(path.name)
    if named and int(named[1]) != manifest.step:
        raise damaged(path, f"{MANIFEST_NAME} is that of step {manifest.step}")
    for name in manifest.files:
        if not _SAFE_NAME.fullmatch(name) or ".." in name:
            raise damaged(path, f"{MANIFEST_NAME} names a file outside: {name!r}")
    return manifest


def _is_sound(manifest: Manifest) -> bool:
    """Whether every value is of its type: whoever made a checkpoint made the hash of its manifest too."""

    def is_count(value: object) -> bool:
        return type(value) is int and 0 <= value < 1 << 62

    def are_texts(value: object) -> bool:
        return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())

    def are_shapes(value: object) -> bool:
        return isinstance(value, dict) and all(
            isinstance(entry, dict)
            and isinstance(entry.get("dtype"), str)
            and isinstance(entry.get("shape"), list)
            and all(map(is_count, entry["shape"]))
            for entry in value.values()
        )

    return (
        is_count(manifest.step)
        and is_count(manifest.world_size)
        and manifest.world_size > 0
        and isinstance(manifest.files, dict)
        and all(
            isinstance(entry, dict) and is_count(entry.get("bytes")) and isinstance(entry.get("xxh3_128"), str)
            for entry in manifest.files.values()
        )
        and are_shapes(manifest.parameters)
        and are_shapes(manifest.buffers)
        and are_texts(manifest.tied)
        and are_texts(manifest.identity)
        and isinstance(manifest.provenance, dict)
    )


def check_sizes(path: Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Compare the sizes of `names` (default: all) with the manifest; CheckpointError names the first bad file."""
    for name in manifest.files if names is None else names:
        file = path / name
        if file.is_symlink() or not file.is_file():
            raise damaged(path, f"{name} is missing" if not file.exists() else f"{name} is no regular file")
        if (size := file.stat().st_size) != (committed := manifest.files[name]["bytes"]):
            raise damaged(path, f"{name} has {size} bytes, committed were {committed}")


def verify_files(path: Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Compare sizes and hashes of `names` (default: all) with the manifest.

    Raises CheckpointError naming the first bad file.
    """
    for name in manifest.files if names is None else names:
        check_sizes(path, manifest, [name])
        try:
            digest = xxh3_of_file(path / name)
        except OSError as error:
            # A bad sector is damage like any other: an earlier checkpoint may be whole.
            raise damaged(path, f"{name} cannot be read: {error.strerror}") from error
        if digest != manifest.files[name]["xxh3_128"]:
            raise damaged(path, f"{name} does not match its hash")


def refuse_foreign_files(path: Path, manifest: Manifest) -> None:
    """CheckpointError naming a file that lies in the checkpoint and was not committed with it."""
    present = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_symlink() or not file.is_dir()}
    if foreign := sorted(present - {*manifest.files, MANIFEST_NAME}):
        raise damaged(path, f"{foreign[0]} does not belong to it")


def verify_checkpoint(path: Path) -> Manifest:
    """Read the manifest and check every file; foreign files inside are damage too."""
    manifest = read_manifest(path)
    refuse_foreign_files(path, manifest)
    verify_files(path, manifest)
    return manifest


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is the directory of one checkpoint, whole or damaged."""
    return (path / MANIFEST_NAME).is_file() or (path.is_dir() and bool(_STEP_NAME.fullmatch(path.name)))


def inspect_checkpoint(path: Path) -> Manifest:
    """The part of `verify_checkpoint` that reads no file but the manifest: names and sizes."""
    manifest = read_manifest(path)
    refuse_foreign_files(path, manifest)
    check_sizes(path, manifest)
    return manifest


def newest_valid_step(
    checkpoints: Path, check: Callable[[Path], Manifest] = verify_checkpoint
) -> tuple[int | None, list[str]]:
    """Step of the newest checkpoint that passes `check`, and what is wrong with the newer ones."""
    problems = []
    for step in committed_steps(checkpoints):
        try:
            check(step_directory(checkpoints, step))
        except CheckpointError as error:
            problems.append(error.fact)
        else:
            return step, problems
    return None, problems


def find_checkpoint(source: Path, check: Callable[[Path], Manifest] = verify_checkpoint) -> Path:
    """The valid checkpoint `source` stands for: itself, or the newest valid one of a run directory.

    Valid is what passes `check`, by default every byte.

    A damaged newer one is named on stderr. Raises MissingInputError when there is none, CheckpointError when all are
    damaged.
    """
    if is_checkpoint(source):
        check(source)
        return source
    checkpoints = source / CHECKPOINTS if (source / CHECKPOINTS).is_dir() else source
    if not committed_steps(checkpoints):
        raise MissingInputError(f"{source} holds no checkpoint", "give a run directory or checkpoints/step-...")
    step, problems = newest_valid_step(checkpoints, check)
    if step is None:
        raise CheckpointError(f"no valid checkpoint in {checkpoints}: {problems[0]}", "restore one from a copy")
    path = step_directory(checkpoints, step)
    if problems:
        sys.stderr.write(f"warning: {problems[0]}; using {path.name} instead\n")
    return path


def damaged(path: Path, reason: str) -> CheckpointError:
    """The error for a checkpoint that is not as committed."""
    return CheckpointError(f"checkpoint {path} is damaged: {reason}", "use an earlier checkpoint or a copy")


def _hash_of_body(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
