"""A causal language model that returns its loss over supervised positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from trainer.objective.cross_entropy import summed_cross_entropy

NOT_SUPERVISED = -100


class SupervisedLanguageModel(nn.Module):
    """Wrap a transformers causal model; `language_model` keeps its own parameter names.

    The body runs as usual; the head sees supervised positions only. Packed rows are told apart by `position_ids` that
    restart: transformers builds the block mask from them only when there is neither a cache nor an attention mask.
    """

    def __init__(self, language_model: Any) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, targets: Tensor | None = None, logits_to_keep: int = 0
    ) -> Tensor:
        """Summed loss (scalar fp32) for `targets` [rows, length]; without targets the logits.

        All tensors int64 [rows, length]; `targets[r, t]` is the id that position t must predict, -100 where nothing is
        asked. Logits are [rows, length or logits_to_keep, vocabulary].
        """
        if targets is None:
            output = self.language_model(
                input_ids=input_ids, position_ids=position_ids, use_cache=False, logits_to_keep=logits_to_keep
            )
            logits: Tensor = output.logits
            return logits
        body = self.language_model.base_model
        hidden = body(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        supervised = targets != NOT_SUPERVISED
        head = self.language_model.get_output_embeddings()
        return summed_cross_entropy(hidden[supervised], head.weight, targets[supervised])
