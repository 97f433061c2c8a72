"""Committed slice checkpoints without a model: written by the product's own code, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trainer.checkpoint.commit import Writer, commit_checkpoint
from trainer.checkpoint.contents import RankContents, from_array, write_contents
from trainer.checkpoint.slices import KINDS, rank_file, slice_key
from trainer.checkpoint.verify import Manifest


def slice_checkpoint(
    checkpoints: Path, step: int, elements: int = 600, keep: int = 9, evaluation_loss: float | None = None
) -> Path:
    """Commit a checkpoint of one rank that holds one parameter of `elements` elements, all equal to `step`."""
    value = np.full(elements, step, np.float32)
    about = checkpoints.parent / "about"
    about.mkdir(parents=True, exist_ok=True)
    (about / "config.json").write_text('{"model_type": "llama"}\n')
    contents = RankContents(
        {
            rank_file(0, 1): {slice_key(kind, 0, "weight"): from_array(value, "F32") for kind in KINDS},
            "probe.safetensors": {"logits": from_array(value[:7], "F32")},
        },
        texts={"state.json": '{"progress": {}}\n'},
        copies={"model/config.json": about / "config.json"},
    )

    def describe(files: dict[str, dict[str, Any]]) -> Manifest:
        evaluation = {} if evaluation_loss is None else {"eval/held-out/loss": evaluation_loss}
        provenance = {"saved": "2026-01-01T00:00:00+00:00", "loss": 0.30000000000000004, "evaluation": evaluation}
        parameters = {"weight": {"shape": [elements], "dtype": "float32"}}
        return Manifest(step, 1, files, parameters, {}, {}, {"data": "d41d8c"}, provenance)

    writer = Writer(0, lambda place: write_contents(contents, place), lambda message: [message])
    return commit_checkpoint(checkpoints, step, writer, describe, keep)
