"""Proof before training that the model computes what we believe it computes.

Packing saves most of the padding, and silently ruins training when samples of a row see each other: that depends on
the architecture, the attention kernel, the transformers version, and on how many rows share a micro-batch. So it is
measured, once, on the real engine and in the shape of training.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from trainer.data.micro_batch import IGNORED, MicroBatch
from trainer.engine.protocol import Engine
from trainer.errors import DataError

LENGTH = 16
"""Tokens of a probe row: two samples, cut at another place in every row."""


def check_model(engine: Engine, vocabulary_size: int, *, micro_batch_size: int, packing: bool, dtype: str) -> None:
    """Refuse to train when packed samples leak into each other or the summed loss is not the model's own.

    So are models that write into what they are given: micro-batches share their position ids. All ranks call it
    together; every rank sees the same numbers. Costs three forwards of 16 tokens a row. Raises DataError.
    """
    generator = np.random.default_rng(0)
    ids = generator.integers(0, vocabulary_size, (micro_batch_size, LENGTH))
    cuts = [4 + row % 8 for row in range(micro_batch_size)]
    batch = _rows(ids, cuts)
    logits = engine.logits(batch, 0)
    untouched = _rows(ids, cuts)
    for given, before, name in (
        (batch.input_ids, untouched.input_ids, "input_ids"),
        (batch.position_ids, untouched.position_ids, "position_ids"),
    ):
        if not np.array_equal(given, before):
            raise DataError(f"the model changes its {name} in place", "it is not supported; let it work on a copy")
    if packing:
        other = ids.copy()
        for row, cut in enumerate(cuts):
            other[row, :cut] = (other[row, :cut] + 1) % vocabulary_size
        moved = (engine.logits(_rows(other, cuts), 0) - logits).abs()
        difference = max(float(moved[row, cut:].max()) for row, cut in enumerate(cuts))
        if not difference <= 1e-6 * max(1.0, float(logits.abs().max())):
            raise DataError(
                f"packed samples see each other with this model and attention (logits move by {difference:.3g})",
                "set train.micro_batch_size=1, another model.attention, or data.packing=false",
            )
    targets = torch.from_numpy(batch.targets)
    supervised = targets != IGNORED
    expected = float(functional.cross_entropy(logits[supervised], targets[supervised], reduction="sum"))
    found = engine.evaluate_loss(batch)
    if not abs(found - expected) <= (1e-4 if dtype == "float32" else 2e-2) * max(1.0, abs(expected)):
        raise DataError(
            f"the loss over supervised positions ({found:.6g}) is not the model's own ({expected:.6g})",
            "this architecture does more between hidden states and logits than one matrix; it is not supported",
        )


def _rows(ids: NDArray[np.int64], cuts: list[int]) -> MicroBatch:
    targets = np.roll(ids, -1, axis=1)
    targets[:, -1] = IGNORED
    positions = np.tile(np.arange(LENGTH), (len(cuts), 1))
    for row, cut in enumerate(cuts):
        targets[row, cut - 1] = IGNORED
        positions[row, cut:] -= cut
    return MicroBatch(ids.astype(np.int64), targets.astype(np.int64), positions.astype(np.int64))
