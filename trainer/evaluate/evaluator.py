"""Loss on held-out rows, exact for any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from trainer import collectives
from trainer.data.micro_batch import IGNORED, MicroBatch
from trainer.engine.protocol import Engine


def evaluate_loss(
    engine: Engine, batches: Iterable[MicroBatch], begins: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Mean cross entropy (nats) per supervised token and its exponential, over all ranks' batches.

    All ranks call it with the same number of batches. `begins` is called before each of them.
    """
    summed, supervised = 0.0, 0
    for batch in batches:
        begins()
        summed += engine.evaluate_loss(batch)
        supervised += int(np.count_nonzero(batch.targets != IGNORED))
    total, count = collectives.add_up([summed, float(supervised)])
    loss = total / count
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
