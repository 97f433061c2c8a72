"""How close a changed model is to its original. Needs torch only: it also runs beside other versions of the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from trainer.errors import DataError

MAX_PROMPT_TOKENS = 1024


@dataclass(frozen=True)
class Quality:
    """How far a changed model is from its original, over all positions of some prompts."""

    top1_agreement: float
    """Share of positions where both models rank the same token first."""
    mean_kl: float
    """Mean over positions of KL(original || changed), in nats."""
    p99_kl: float
    max_kl: float
    perplexity_before: float
    """Of the original, over every token of the prompts but the first."""
    perplexity_after: float
    positions: int


def quality(original: Any, changed: Any, prompts: Sequence[Sequence[int]]) -> Quality:
    """Compare the next-token distributions of two models at every position of `prompts` (token ids, one by one).

    All is computed in fp32. Raises DataError when `changed` gives logits that are not finite.
    """
    same, losses, tokens = 0, [0.0, 0.0], 0
    found: list[torch.Tensor] = []
    with torch.inference_mode():
        for row in _rows(prompts, original.device):
            first, second = (
                torch.log_softmax(model(input_ids=row).logits[0].float(), dim=-1) for model in (original, changed)
            )
            if not torch.isfinite(second).all():
                raise DataError("the changed model gives logits that are not finite", "keep the original")
            found.append((first.exp() * (first - second)).sum(-1).clamp_(min=0).cpu())
            same += int((first.argmax(-1) == second.argmax(-1)).sum())
            tokens += row.shape[1] - 1
            for number, log_shares in enumerate((first, second)):
                losses[number] += float(functional.nll_loss(log_shares[:-1], row[0, 1:], reduction="sum"))
    if not found:
        raise DataError("there is no prompt to compare the models on", "give some with --data")
    divergences = torch.cat(found).double()
    before, after = (math.exp(loss / tokens) if tokens else math.nan for loss in losses)
    return Quality(
        top1_agreement=same / len(divergences),
        mean_kl=float(divergences.mean()),
        p99_kl=float(divergences.quantile(0.99)) if len(divergences) < 1 << 24 else math.nan,
        max_kl=float(divergences.max()),
        perplexity_before=before,
        perplexity_after=after,
        positions=len(divergences),
    )


def _rows(prompts: Sequence[Sequence[int]], device: Any) -> Iterator[torch.Tensor]:
    for prompt in prompts:
        if prompt:
            yield torch.tensor([list(prompt)[:MAX_PROMPT_TOKENS]], dtype=torch.long, device=device)
