"""Ways to spoil an export between its writing and its proof, as a bug or a disk would."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch

from tools.exporting.proof import Claim
from tools.model_directory.writing import describe

WEIGHTS = "model.safetensors"
Tensors = dict[str, torch.Tensor]


def flip_a_byte(path: Path) -> None:
    """Flip the lowest bit of a byte in the middle of the file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rewrite(claim: Claim, change: Callable[[Tensors], None]) -> Claim:
    """Let the exporter have written other tensors: the file and its hash agree."""
    path = Path(claim.model, WEIGHTS)
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    return replace(claim, files={**claim.files, WEIGHTS: describe(path)})


def set_config(claim: Claim, **settings: object) -> Claim:
    """The same for config.json."""
    path = Path(claim.model, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return replace(claim, files={**claim.files, path.name: describe(path)})


def swap(tensors: Tensors, first: str, second: str) -> None:
    """Exchange two tensors of one shape."""
    assert tensors[first].shape == tensors[second].shape
    assert not torch.equal(tensors[first], tensors[second])
    tensors[first], tensors[second] = tensors[second].clone(), tensors[first].clone()
