"""What the loop needs of an engine."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from trainer.data.feed import MicroBatch


class Engine(Protocol):
    """A model that is trained by all ranks together. Every method is collective: all ranks call it in step."""

    @property
    def learning_rate(self) -> float:
        """Rate the next step will use."""

    def summed_loss(self, batch: MicroBatch) -> Tensor:
        """Forward: this rank's summed cross entropy over its supervised positions, scalar fp32 with graph."""

    def backward(self, summed_loss: Tensor, global_supervised_tokens: int) -> None:
        """Add the gradient of summed_loss / global_supervised_tokens, to be summed over micro-batches and ranks."""

    def step(self) -> tuple[float, bool]:
        """Optimizer step after the last micro-batch: (global gradient norm before clipping, was it applied)."""

    def evaluate_loss(self, batch: MicroBatch) -> float:
        """This rank's summed cross entropy without gradients, in evaluation mode."""

    def logits(self, batch: MicroBatch, keep: int) -> Tensor:
        """Logits of the last `keep` positions [rows, keep, vocabulary], fp32 on the CPU, in evaluation mode."""
