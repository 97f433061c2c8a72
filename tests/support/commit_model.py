"""A model of one tensor that tests commit without torch: what ranks write, and what a checkpoint of it must hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from trainer.checkpoint.commit import Exchange, Writer, commit_checkpoint
from trainer.checkpoint.slices import KINDS, SliceReader, rank_file, slice_key
from trainer.checkpoint.verify import Manifest, find_checkpoint
from trainer.errors import MissingInputError
from trainer.tensor_file import TensorFileWriter

ELEMENTS = 6_000


def commit_step(
    directory: Path,
    step: int,
    *,
    rank: int,
    world_size: int,
    exchange: Exchange,
    on_phase: Callable[[str], None] = lambda phase: None,
    elements: int = ELEMENTS,
    keep: int = 2,
) -> Path:
    """This rank's part in committing `step`: its share of a vector that holds `step` everywhere."""
    share = elements // world_size

    def write(place: Path) -> dict[str, dict[str, Any]]:
        name = rank_file(rank, world_size)
        keys = [slice_key(kind, rank * share, "weight") for kind in KINDS]
        with TensorFileWriter(place / name, dict.fromkeys(keys, ("F32", (share,)))) as file:
            for key in keys:
                file.write(key, np.full(share, step, np.float32))
                on_phase("middle of the file")
        return {name: {"bytes": file.finished.bytes, "xxh3_128": file.finished.xxh3_128}}

    def describe(files: dict[str, Any]) -> Manifest:
        parameters = {"weight": {"shape": [share * world_size], "dtype": "float32"}}
        return Manifest(step, world_size, files, parameters, {}, {}, {}, {})

    return commit_checkpoint(directory, step, Writer(rank, write, exchange, on_phase), describe, keep)


def newest_step(directory: Path, announced: int) -> int:
    """The step that a resume would load; 0 when there is none and none was announced.

    AssertionError when it is older than `announced`, or holds other numbers than those of its step; CheckpointError
    when there are checkpoints and all are damaged.
    """
    try:
        path = find_checkpoint(directory)
    except MissingInputError:
        assert announced == 0, f"step {announced} was announced, and there is no checkpoint"
        return 0
    reader = SliceReader(path)
    step = reader.manifest.step
    assert step >= announced, f"step {announced} was announced, the newest valid one is {step}"
    for kind in KINDS:
        assert (reader.read(kind, "weight") == step).all(), f"{path.name} holds other numbers than its own"
    return step
