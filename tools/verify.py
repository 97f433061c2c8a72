"""Is a model directory whole, complete and signed by whom it should be?

    steadfast verify out/model                 every byte against manifest.json, every tensor against the architecture
    steadfast verify out/adapter               adapters and quantized models: every byte
    steadfast verify out/model --key key.pub   and its signature (extra 'sign')

For models that Steadfast exported, merged or quantized; `steadfast checkpoint verify` does it for checkpoints. Exit
codes: 65 damaged or incomplete, 66 no model there, 1 not what the owner of the key signed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.errors import MissingInputError

OTHER_TENSORS = ("quantized model", "adapter")
"""Kinds of artefacts whose tensors are not those of the architecture that config.json names."""


@dataclass(frozen=True)
class VerifyReport:
    """What was found good."""

    model: str
    files: int
    bytes: int
    tensors: int | None
    """Tensors found complete and finite; None where they are not those of an architecture (quantized, adapter)."""
    signed_by: str | None
    """The public key that was given."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `steadfast verify`."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="exported, merged or quantized model, or adapter")
    parser.add_argument("--key", type=Path, metavar="PUB", help="PEM public key whose owner must have signed it")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Verify and say what was checked."""
    from tools.model_directory.writing import readable_bytes

    report = verify_model(arguments.model, arguments.key)
    if arguments.json:
        print(json.dumps(asdict(report)))
        return 0
    tensors = "" if report.tensors is None else f", {report.tensors} tensors complete and finite"
    signed = f", signed by the owner of {report.signed_by}" if report.signed_by else ""
    print(f"{report.model} is whole: {report.files} files, {readable_bytes(report.bytes)}{tensors}{signed}")
    return 0


def verify_model(model: Path, public_key: Path | None = None) -> VerifyReport:
    """Check every byte, every tensor, and with `public_key` the signature.

    Raises DataError naming the file or tensor that is wrong, MissingInputError when there is no model or no signature,
    NotEqualError when the signature is of another key or of other bytes.
    """
    from tools.model_directory.loading import load_config, quiet_transformers
    from tools.model_directory.signing import check_signature
    from tools.model_directory.tensors import ModelTensors, architecture_shapes, check_inventory
    from tools.model_directory.writing import read_manifest, verify_artefact

    # First, as it knows more: a manifest can be forged together with the files.
    if public_key is not None:
        check_signature(model, public_key)
    if not model.is_dir():
        raise MissingInputError(f"{model} is not a directory", "give a model directory, e.g. an export")
    verify_artefact(model)
    manifest = read_manifest(model)
    files, tensors = manifest["files"], None
    if manifest.get("kind") not in OTHER_TENSORS:
        quiet_transformers()
        found = ModelTensors(model)
        check_inventory(found, architecture_shapes(load_config(model)))
        tensors = len(found.shapes)
    return VerifyReport(
        model=str(model),
        files=len(files) + 1,
        bytes=sum(entry["bytes"] for entry in files.values()),
        tensors=tensors,
        signed_by=str(public_key) if public_key else None,
    )
