"""How close a changed model is to its original, on any prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainer.errors import DataError

MAX_PROMPT_TOKENS = 1024


@dataclass(frozen=True)
class Distance:
    """How far a changed model is from its original, over all positions of some prompts."""

    top1_agreement: float
    mean_kl: float
    """Mean over positions of KL(original || changed), in nats."""
    max_kl: float
    positions: int


def distance(original: Any, changed: Any, prompts: Sequence[Sequence[int]]) -> Distance:
    """Compare the next-token distributions of two models at every position of `prompts` (token ids, one by one).

    KL and argmax are computed in fp32. Raises DataError when `changed` gives logits that are not finite.
    """
    same, count, total, largest = 0, 0, 0.0, 0.0
    with torch.inference_mode():
        for row in _rows(prompts, original.device):
            first = torch.log_softmax(original(input_ids=row).logits[0].float(), dim=-1)
            second = torch.log_softmax(changed(input_ids=row).logits[0].float(), dim=-1)
            if not torch.isfinite(second).all():
                raise DataError("the changed model gives logits that are not finite", "keep the original")
            divergence = (first.exp() * (first - second)).sum(-1).clamp_(min=0)
            same += int((first.argmax(-1) == second.argmax(-1)).sum())
            count += row.shape[1]
            total += float(divergence.sum())
            largest = max(largest, float(divergence.max()))
    if count == 0:
        raise DataError("there is no prompt to compare the models on", "give some with --data")
    return Distance(same / count, total / count, largest, count)


def _rows(prompts: Sequence[Sequence[int]], device: Any) -> Iterator[torch.Tensor]:
    for prompt in prompts:
        if prompt:
            yield torch.tensor([list(prompt)[:MAX_PROMPT_TOKENS]], dtype=torch.long, device=device)
