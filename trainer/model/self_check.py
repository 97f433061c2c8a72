"""Proof before training that the model computes what we believe it computes.

Packing saves most of the padding, and silently ruins training when samples of a row see each other: that depends on
the architecture, the attention kernel and the transformers version. So it is measured, once, on the real engine.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from trainer.data.feed import MicroBatch
from trainer.engine.protocol import Engine
from trainer.errors import DataError
from trainer.model.supervised import NOT_SUPERVISED

SAMPLE = 8
"""Tokens in each of the two samples of the probe row."""


def check_model(engine: Engine, vocabulary_size: int, *, packing: bool, dtype: str) -> None:
    """Refuse to train when packed samples leak into each other or the summed loss is not the model's own.

    All ranks call it together; every rank sees the same numbers. Costs three forwards of 16 tokens.
    """
    generator = np.random.default_rng(0)
    ids = generator.integers(0, vocabulary_size, 2 * SAMPLE)
    batch = _row(ids)
    logits = engine.logits(batch, 0)[0]
    if packing:
        other = ids.copy()
        other[:SAMPLE] = (other[:SAMPLE] + 1) % vocabulary_size
        difference = float((engine.logits(_row(other), 0)[0, SAMPLE:] - logits[SAMPLE:]).abs().max())
        if not difference <= 1e-6 * max(1.0, float(logits.abs().max())):
            raise DataError(
                f"packed samples see each other with this model and attention (logits move by {difference:.3g})",
                "set data.packing=false or another model.attention",
            )
    supervised = torch.from_numpy(batch.targets[0] != NOT_SUPERVISED)
    wanted = torch.from_numpy(batch.targets[0])[supervised]
    expected = float(functional.cross_entropy(logits[supervised], wanted, reduction="sum"))
    found = engine.evaluate_loss(batch)
    if not abs(found - expected) <= (1e-4 if dtype == "float32" else 2e-2) * max(1.0, abs(expected)):
        raise DataError(
            f"the loss over supervised positions ({found:.6g}) is not the model's own ({expected:.6g})",
            "this architecture does more between hidden states and logits than one matrix; it is not supported",
        )


def _row(ids: NDArray[np.int64]) -> MicroBatch:
    targets = np.roll(ids, -1)
    targets[[SAMPLE - 1, -1]] = NOT_SUPERVISED
    positions = np.tile(np.arange(SAMPLE), 2)
    return MicroBatch(ids[None].astype(np.int64), targets[None].astype(np.int64), positions[None].astype(np.int64))
