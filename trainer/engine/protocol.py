"""What the loop and the checkpoints need of an engine."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from trainer.data.micro_batch import MicroBatch
from trainer.engine.device import DeviceType
from trainer.engine.partitions import OwnedSlice


class Engine(Protocol):
    """A model that is trained by all ranks together. Every method is collective: all ranks call it in step."""

    @property
    def learning_rate(self) -> float:
        """Rate the next step will use."""

    def summed_loss(self, batch: MicroBatch) -> Tensor:
        """Forward: this rank's summed loss over its supervised positions, scalar fp32 with graph.

        Cross entropy, mixed with the divergence from a teacher where the batch has its predictions.
        """

    def backward(self, summed_loss: Tensor, global_supervised_tokens: int) -> None:
        """Add the gradient of summed_loss / global_supervised_tokens, to be summed over micro-batches and ranks."""

    def step(self) -> tuple[float, bool]:
        """Optimizer step after the last micro-batch: (global gradient norm before clipping, was it applied)."""

    def evaluate_loss(self, batch: MicroBatch) -> float:
        """This rank's summed cross entropy without gradients, in evaluation mode."""

    def logits(self, batch: MicroBatch, keep: int) -> Tensor:
        """Logits of the last `keep` positions [rows, keep, vocabulary], fp32 on the CPU, in evaluation mode."""


class SavableEngine(Engine, Protocol):
    """An engine whose state can be taken apart and put together again."""

    kind: DeviceType

    @property
    def language_model(self) -> Any:
        """The transformers model, with its own parameter names (sharded under ZeRO-3)."""

    def saved_parameters(self) -> dict[str, Any]:
        """The parameters that checkpoints hold, by name in model order: all, or under LoRA those of the adapter."""

    def owned_slices(self) -> list[OwnedSlice]:
        """Live views of what this rank saves: master weights, moments, its share of frozen weights; not collective."""

    def held_slices(self) -> list[OwnedSlice]:
        """Live views of all state on this rank, to be overwritten when a run resumes; not collective."""

    def watch_training(self, positions: int) -> bool:
        """Have the next forward keep the logits of up to `positions` first positions of its first row; costs nothing.

        False, and nothing is kept, when they are not those of evaluation, because the model has dropout.
        """

    def watched(self) -> tuple[Any, Tensor] | None:
        """That, of one sample: token ids int64 [1, n] and logits fp32 [1, n, vocabulary]. None before the forward."""

    def counters(self) -> dict[str, Any]:
        """Step counts of optimizer and schedule: plain values."""

    def resume(self, counters: dict[str, Any]) -> None:
        """After the tensors of `held_slices` were overwritten: set the counters, publish the weights."""
