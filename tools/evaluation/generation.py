"""Greedy answers to many questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tools.evaluation.questions import Question

SPARE_TOKENS = 8


@dataclass(frozen=True)
class Answers:
    """`texts` in the order of the questions; `too_long` prompts left no room for an answer, theirs is empty."""

    texts: list[str]
    too_long: int


def answer(
    model: Any, tokenizer: Any, questions: Sequence[Question], *, batch_size: int, max_new_tokens: int | None = None
) -> Answers:
    """Answer every question, stripped of white space at both ends.

    `max_new_tokens` defaults to the longest reference plus a few tokens: a longer answer cannot match anyway.
    """
    from tools.model_directory.chat import context_length, stop_ids

    limit = max_new_tokens or max(question.expected_tokens for question in questions) + SPARE_TOKENS
    context = context_length(model)
    stops = stop_ids(model, tokenizer)
    texts = [""] * len(questions)
    fitting = [i for i, question in enumerate(questions) if context is None or len(question.ids) < context]
    # Neighbours in length share a batch: little padding, and short answers end together.
    fitting.sort(key=lambda i: (len(questions[i].ids), questions[i].expected_tokens))
    for begin in range(0, len(fitting), batch_size):
        indices = fitting[begin : begin + batch_size]
        prompts = [questions[i].ids for i in indices]
        room = limit if context is None else min(limit, context - max(map(len, prompts)))
        for index, text in zip(indices, _generate(model, tokenizer, prompts, room, stops), strict=True):
            texts[index] = text
    return Answers(texts, len(questions) - len(fitting))


def _generate(model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int, stops: list[int]) -> list[str]:
    """Greedy answers to `prompts`, generated together, padded on the left."""
    import torch
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0]
    # Also replaces what the model's own configuration would add (sampling, penalties).
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stops or None, pad_token_id=pad
    )
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    with torch.inference_mode():
        generated = model.generate(input_ids=ids, attention_mask=mask)[:, longest:].tolist()
    texts = []
    for tokens in generated:
        end = next((position for position, token in enumerate(tokens) if token in stops), len(tokens))
        texts.append(tokenizer.decode(tokens[:end], skip_special_tokens=True).strip())
    return texts
