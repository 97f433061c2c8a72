"""Learning from a teacher: cross entropy with the data, mixed with the divergence from a teacher's predictions.

The teacher's distribution is known for its k most probable tokens; all others are one class, the rest, with the
probability that is left. The divergence between two distributions over these k + 1 classes is never more than that over
the vocabulary, and like that one it is zero only where the student gives the k tokens the teacher's probabilities.
Taking the k alone, made to add up to 1, would teach the student to forget every other token.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015: temperature, and its square as a factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.objective.chunks import summed_over_chunks
from trainer.objective.cross_entropy import cross_entropy


@dataclass(frozen=True)
class Distillation:
    """How much is learned from a teacher."""

    share: float
    """Of the loss: 0 is cross entropy alone, 1 the teacher alone."""
    temperature: float
    """What logits of both are divided by; the teacher's were when its predictions were stored."""


def summed_distillation(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    candidates: Tensor,
    log_probabilities: Tensor,
    settings: Distillation,
) -> Tensor:
    """Sum over positions of (1 - share) * cross entropy + share * temperature^2 * KL(teacher || student); scalar fp32.

    `targets` int64 [positions]; `candidates` int64 [positions, k] are the teacher's tokens, `log_probabilities` fp32
    [positions, k + 1] theirs, the last that of all others. See `summed_over_chunks` for the rest.
    """
    share = settings.share

    def chunk_loss(logits: Tensor, piece: slice, differentiate: bool) -> tuple[Tensor, Tensor | None]:
        scaled = logits / settings.temperature
        apart, pull = _divergence(scaled, candidates[piece], log_probabilities[piece], differentiate)
        loss, gradient = cross_entropy(logits, targets[piece], differentiate)
        loss = (1 - share) * loss + share * settings.temperature**2 * apart
        if gradient is not None and pull is not None:
            gradient.mul_(1 - share).add_(pull, alpha=share * settings.temperature)
        return loss, gradient

    return summed_over_chunks(hidden, weight, chunk_loss)


def _divergence(
    logits: Tensor, candidates: Tensor, log_probabilities: Tensor, differentiate: bool
) -> tuple[Tensor, Tensor | None]:
    """Summed KL (float64) and its gradient with respect to the logits, which are overwritten."""
    # What was stored is rounded: made to add up to 1 again.
    teacher = log_probabilities.log_softmax(dim=1)
    log_normaliser = torch.logsumexp(logits, dim=1, keepdim=True)
    student = logits.gather(1, candidates) - log_normaliser
    others = logits.scatter(1, candidates, -torch.inf)
    log_rest = torch.logsumexp(others, dim=1, keepdim=True)
    student = torch.cat([student, log_rest - log_normaliser], dim=1)
    probabilities = teacher.exp()
    loss = (probabilities * (teacher - student)).sum(dtype=torch.float64)
    if not differentiate:
        return loss, None
    # d KL / d logit = softmax - p(token) for the k tokens, and for the others softmax - p(rest) * softmax among them.
    gradient = logits.sub_(log_normaliser).exp_()
    gradient.sub_(others.sub_(log_rest).exp_().mul_(probabilities[:, -1:]))
    return loss, gradient.scatter_add_(1, candidates, -probabilities[:, :-1])
