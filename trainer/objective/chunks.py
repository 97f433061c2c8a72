"""A loss over a language-model head without ever holding the [positions x vocabulary] matrix.

Logits are computed for one chunk of positions at a time. Because the loss is linear in the incoming gradient, the
gradients with respect to hidden states and head weight are computed in the forward pass while a chunk's logits are
there, and merely scaled in the backward pass: each logit is computed once, and the head's weight is needed (under
ZeRO-3: gathered) once per forward on every rank, however many chunks a rank has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CHUNK_ELEMENTS = 1 << 24
"""Logits held at once; 64 MiB in fp32."""
LEAST_ROWS_ON_A_GPU = 1024
"""Smaller products leave a GPU idle, and each chunk adds a gradient of the head's full size."""

ChunkLoss = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor | None]]
"""(logits fp32 [chunk, vocabulary], which positions they are of, is the gradient wanted) -> (summed loss float64
scalar, its gradient with respect to the logits). The logits may be overwritten."""


def summed_over_chunks(hidden: Tensor, weight: Tensor, chunk_loss: ChunkLoss) -> Tensor:
    """Sum of `chunk_loss` over chunks of positions; scalar fp32.

    `hidden` [positions, width], `weight` [vocabulary, width], both of the compute dtype. Logits and losses are fp32,
    the sum over positions float64. No positions give 0 with a gradient of zeros.
    """
    # Asked here, because inside an autograd function gradients look wanted even under no_grad.
    differentiate = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    result: Tensor = _SummedOverChunks.apply(hidden, weight, chunk_loss, differentiate)  # type: ignore[no-untyped-call]
    return result


class _SummedOverChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, chunk_loss: ChunkLoss, differentiate: bool) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        hidden_gradient = torch.zeros_like(hidden) if differentiate else None
        # fp32 also for a bfloat16 head: thousands of chunks may be added up.
        weight_gradient = (
            torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if differentiate else None
        )
        rows = max(LEAST_ROWS_ON_A_GPU if hidden.is_cuda else 1, CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            piece = slice(start, start + rows)
            loss, gradient = chunk_loss(functional.linear(hidden[piece], weight).float(), piece, differentiate)
            total += loss
            if gradient is None or hidden_gradient is None or weight_gradient is None:
                continue
            gradient = gradient.to(hidden.dtype)
            hidden_gradient[piece] = gradient @ weight
            weight_gradient += gradient.T @ hidden[piece]
        if hidden_gradient is not None and weight_gradient is not None:
            ctx.save_for_backward(hidden_gradient, weight_gradient.to(weight.dtype))
        return total.float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        scale = gradients[0]
        hidden_gradient = hidden_gradient * scale.to(hidden_gradient.dtype)
        return hidden_gradient, weight_gradient * scale.to(weight_gradient.dtype), None, None
