"""Choosing the next token, request by request, inside one batch.

The engine always takes the largest score. For a request with a temperature we add Gumbel noise to its scores first:
argmax(log p + G) with independent standard Gumbel G is an exact sample of p (Gumbel 1954; Maddison et al. 2014,
"A* Sampling"). Greedy requests are untouched, so their answers do not depend on who shares the batch, and a seed
gives the same answer whatever else is being answered, because the noise of a request is a function of its seed and
the position of the token alone.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.logits_process import LogitsProcessorList

from tools.serving.protocol import Sampling


def sample_scores(scores: torch.Tensor, sampling: Sampling, position: int) -> torch.Tensor:
    """Scores whose argmax is a sample: fp32 logits [vocabulary] of one request at token `position` in, same shape out.

    Temperature first, then the smallest set of tokens whose probability reaches top_p, then the noise.
    """
    scaled = scores / sampling.temperature
    if sampling.top_p < 1:
        ordered, order = scaled.sort(descending=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        dropped = before >= sampling.top_p
        dropped[0] = False  # the likeliest token stays even when top_p is 0
        scaled = scaled.index_fill(0, order[dropped], -torch.inf)
    digest = hashlib.blake2b(f"{sampling.seed}:{position}".encode(), digest_size=4).digest()
    # Drawn on the CPU: the same seed gives the same noise on every device.
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    exponential = torch.empty(scores.shape, dtype=torch.float32).exponential_(generator=generator)
    return scaled - exponential.clamp_(min=torch.finfo(torch.float32).tiny).log_().to(scores.device)


class PerRequestSampling(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Applies every request's own sampling to its row of the batch's scores.

    Rows are remembered when a batch is prepared and used in the forward pass that follows, which is sound only while
    batches are prepared one at a time (no asynchronous batching, no graphs); the engine sees to that.
    """

    supported_kwargs = {"sampling": Sampling}  # noqa: RUF012 - the interface of the base class
    ignored_kwargs = ()

    def __init__(self) -> None:
        self._rows: list[tuple[Sampling, int]] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """The engine's storage for arguments; ours do not fit 32 bits and stay here."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        """Note whose scores come next, in the order of their rows."""
        self._rows = []
        for request in requests_with_new_token:
            state = request.state
            sampling = state.logit_processor_kwargs.get("sampling", Sampling())
            self._rows.append((sampling, len(state.initial_tokens) + len(state.generated_tokens)))
        return torch.zeros(len(self._rows), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Scores [rows, vocabulary], those of sampling requests replaced."""
        for row, (sampling, position) in enumerate(self._rows):
            if not sampling.greedy:
                scores[row] = sample_scores(scores[row], sampling, position)
        return scores


def sampling_processors() -> ContinuousBatchingLogitsProcessorList:
    """The engine's list of processors with ours as the only one."""
    processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([PerRequestSampling()]))
    processors.tensors_required = 1
    return processors
