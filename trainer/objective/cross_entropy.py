"""Cross entropy of a language-model head."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.objective.chunks import summed_over_chunks


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log softmax(hidden @ weight.T)[target] over positions; scalar fp32.

    `targets` int64 [positions], all valid ids; see `summed_over_chunks` for the rest.
    """
    return summed_over_chunks(
        hidden, weight, lambda logits, piece, differentiate: cross_entropy(logits, targets[piece], differentiate)
    )


def cross_entropy(logits: Tensor, targets: Tensor, differentiate: bool) -> tuple[Tensor, Tensor | None]:
    """Summed loss (float64) of `logits` fp32 [positions, vocabulary], which then hold its gradient."""
    wanted = targets.unsqueeze(1)
    log_normaliser = torch.logsumexp(logits, dim=1, keepdim=True)
    loss = (log_normaliser - logits.gather(1, wanted)).sum(dtype=torch.float64)
    if not differentiate:
        return loss, None
    # d loss / d logit = softmax - one_hot(target)
    logits.sub_(log_normaliser).exp_()
    return loss, logits.scatter_add_(1, wanted, torch.full_like(log_normaliser, -1.0))
