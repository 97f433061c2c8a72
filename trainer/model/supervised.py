"""A causal language model that returns its loss over supervised positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.data.micro_batch import IGNORED
from trainer.objective.cross_entropy import summed_cross_entropy
from trainer.objective.distillation import Distillation, summed_distillation

BENT_LOGITS = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}
"""Settings of architectures that do more to logits than the head's product; None or 1 means they do not."""


class SupervisedLanguageModel(nn.Module):
    """Wrap a transformers causal model; `language_model` keeps its own parameter names.

    The body runs as usual; the head sees supervised positions only. Packed rows are told apart by `position_ids` that
    restart: transformers builds the block mask from them only when there is neither a cache nor an attention mask.
    """

    def __init__(self, language_model: Any, distillation: Distillation | None = None) -> None:
        super().__init__()
        self.language_model = language_model
        self.distillation = distillation
        """How much is learned from a teacher, when its predictions come with the targets."""
        self.positions_to_keep = 0
        """Of the first row of the next forward with targets: the logits of so many positions go to `kept_logits`."""
        self.kept_logits: Tensor | None = None

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        targets: Tensor | None = None,
        logits_to_keep: int = 0,
        candidates: Tensor | None = None,
        log_probabilities: Tensor | None = None,
    ) -> Tensor:
        """Summed loss (scalar fp32) for `targets` [rows, length]; without targets the logits.

        All tensors int64 [rows, length]; `targets[r, t]` is the id that position t must predict, -100 where nothing is
        asked. Logits are [rows, length, vocabulary], or those of the last `logits_to_keep` positions when it is not 0.
        A teacher's `candidates` int64 [targets, k] and `log_probabilities` fp32 [targets, k + 1] make it the loss of
        `distillation`; without them it is the cross entropy.
        """
        if targets is None:
            output = self.language_model(
                input_ids=input_ids, position_ids=position_ids, use_cache=False, logits_to_keep=logits_to_keep
            )
            logits: Tensor = output.logits
            return logits
        body = self.language_model.base_model
        hidden = body(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        supervised = targets != IGNORED
        head = self.language_model.get_output_embeddings()
        wanted = hidden[supervised], head.weight, targets[supervised]
        if self.distillation is None or candidates is None or log_probabilities is None:
            loss = summed_cross_entropy(*wanted)
        else:
            loss = summed_distillation(*wanted, candidates, log_probabilities, self.distillation)
        if self.positions_to_keep:
            with torch.no_grad():
                kept = functional.linear(hidden[:1, : self.positions_to_keep], head.weight)
            self.kept_logits, self.positions_to_keep = kept.float().cpu(), 0
        return loss


def unsupported_head(language_model: Any) -> str | None:
    """Why the loss of `SupervisedLanguageModel` would not be the model's own, or None.

    Found by name because fresh weights hide it: logits near zero pass through a soft cap unchanged.
    """
    if getattr(language_model.get_output_embeddings(), "bias", None) is not None:
        return "its head has a bias"
    for name, neutral in BENT_LOGITS.items():
        value = getattr(language_model.config, name, None)
        if value is not None and value != neutral:
            return f"its logits are bent ({name} = {value})"
    return None
