"""Learning rate as a share of its peak, a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from trainer.config.schema import Schedule


def share_of_peak(schedule: Schedule, max_steps: int) -> Callable[[int], float]:
    """The function step (from 0) -> share of the peak learning rate used by that optimizer step.

    Linear warm-up over `warmup_steps` steps (the first step already moves), then cosine or linear decay that reaches
    `final_ratio` at the last step, or the constant 1.
    """
    warmup, final = schedule.warmup_steps, schedule.final_ratio

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if schedule.type == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, max_steps - 1 - warmup))
        falling = 1.0 - progress if schedule.type == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return final + (1.0 - final) * falling

    return share
