"""Copy a model that Steadfast wrote to object storage.

    steadfast push out/model s3://bucket/model      (any fsspec URL: file, s3, gs, memory ...)

The files go first and `manifest.json` last: a copy that has one is complete. `steadfast export --push URL` does both.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `steadfast push`."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="exported, merged or quantized model")
    parser.add_argument("url", metavar="URL", help="where its files go")


def run(arguments: argparse.Namespace) -> int:
    """Copy and say where it is now."""
    push(arguments.model, arguments.url)
    print(f"{arguments.model} is now at {arguments.url}")
    return 0


def push(model: Path, url: str) -> None:
    """Copy the artefact `model` to `url` (any fsspec file system); a complete equal copy is left as it is.

    Until its `manifest.json` is there, nobody takes the copy for a model: an older one is removed first. Raises
    UsageError when fsspec knows no such file system, CannotWriteError when the storage keeps failing.
    """
    from tools.model_directory.writing import MANIFEST_NAME, SIGNATURE_NAME, check_sizes, read_manifest
    from trainer.remote import Destination, open_destination

    filesystem, root = open_destination(url, "--push")
    there = Destination(filesystem, root, f"{model} stays; steadfast push {model} {url} tries again")
    files = set(read_manifest(model)["files"])
    check_sizes(model)
    text = (model / MANIFEST_NAME).read_bytes()
    found = there.content(MANIFEST_NAME)
    if found != text:
        if found is not None:
            there.remove(MANIFEST_NAME)
        for name in sorted(files):
            there.put(model / name, name)
    if (model / SIGNATURE_NAME).is_file():
        there.put(model / SIGNATURE_NAME, SIGNATURE_NAME)
    if found != text:
        there.put(model / MANIFEST_NAME, MANIFEST_NAME)
