"""Copy an artefact to object storage: the files first, `manifest.json` last, so that what has one is complete."""

from __future__ import annotations

from pathlib import Path

from tools.artefact import MANIFEST_NAME, read_manifest
from trainer.remote import Destination, open_destination


def push(model: Path, url: str) -> None:
    """Copy the artefact `model` to `url` (any fsspec file system); a complete equal copy is left as it is.

    Until its `manifest.json` is there, nobody takes the copy for a model: an older one is removed first. Raises
    UsageError when fsspec knows no such file system, CannotWriteError when the storage keeps failing.
    """
    filesystem, root = open_destination(url, "--push")
    there = Destination(filesystem, root, f"{model} stays; push it again with steadfast push")
    text = (model / MANIFEST_NAME).read_bytes()
    found = there.content(MANIFEST_NAME)
    if found == text:
        return
    if found is not None:
        there.remove(MANIFEST_NAME)
    files = set(read_manifest(model)["files"])
    beside = {path.name for path in model.iterdir()} - files - {MANIFEST_NAME}  # the signature
    for name in [*sorted(files), *sorted(beside), MANIFEST_NAME]:
        there.put(model / name, name)
