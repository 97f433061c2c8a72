"""The safetensors files of a transformers directory: which they are, and a fingerprint of all they hold. Torch-free."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from trainer.durable import write_file, xxh3_of_file
from trainer.errors import DataError, MissingInputError
from trainer.names import is_plain_name

STEM = "model.safetensors"
INDEX = f"{STEM}.index.json"


def weight_files(path: Path) -> list[Path]:
    """All weight files in the directory, by name. Raises DataError or MissingInputError when one is not there."""
    index = path / INDEX
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise DataError(f"{index} is not readable", "download the model again") from error
    elif (path / STEM).is_file():
        files = [STEM]
    else:
        raise MissingInputError(f"{path} has no safetensors weights", "convert the model to safetensors first")
    for file in files:
        if not is_plain_name(file):
            raise DataError(f"{index} names the file {file!r}", "weights lie beside their index")
        if not (path / file).is_file():
            raise MissingInputError(f"{path} lacks {file}", "the download is incomplete: fetch it again")
    return [path / file for file in files]


def weights_fingerprint(path: Path, remembered: Path | None = None) -> str:
    """16 hex digits that two directories share when their weight files have equal bytes; one process calls it.

    Every byte is read, so the answer is kept in the file `remembered` and holds there as long as the weight files have
    the sizes and times of modification that they had.
    """
    files = weight_files(path)
    looks = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    seen = {"path": str(path.absolute()), "files": looks}
    if remembered is not None:
        with suppress(OSError, ValueError, TypeError, KeyError):
            known = json.loads(remembered.read_text())
            if known["seen"] == seen:
                return str(known["fingerprint"])
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.name} {file.stat().st_size} {xxh3_of_file(file)}\n".encode())
    fingerprint = total.hexdigest()[:16]
    if remembered is not None:
        write_file(remembered, json.dumps({"fingerprint": fingerprint, "seen": seen}, indent=1) + "\n")
    return fingerprint
