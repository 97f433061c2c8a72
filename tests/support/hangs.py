"""What ranks of `fork_ranks` do before they train, to go wrong in ways that a fault at a phase cannot."""

import os

import torch
import torch.distributed as dist

from trainer import collectives
from trainer.observe import stragglers


def mismatched_collectives() -> None:
    """In its fourth step rank 1 gathers where rank 0 adds up."""
    original, steps = collectives.add_up, 0

    def add_up(values):
        nonlocal steps
        # The sum of a step also carries the time of every rank.
        steps += len(values) > 3
        if steps == 4 and os.environ["RANK"] == "1":
            dist.all_gather([torch.zeros(1), torch.zeros(1)], torch.zeros(1))
        return original(values)

    collectives.add_up = add_up


def impatient() -> None:
    """Slow ranks are named after three steps."""
    stragglers.STEPS = stragglers.ENOUGH = 3
