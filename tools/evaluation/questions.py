"""Held-out conversations as questions: a prompt, the reference answer, and the slices it belongs to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.errors import DataError

if TYPE_CHECKING:
    from tools.model_directory.chat import Prompts

GROUPS = ("family", "source", "language")
"""Fields of a row that make slices. Rows without a language are sliced by the script most of their letters are of."""


@dataclass(frozen=True)
class Question:
    """One row of held-out data."""

    ids: list[int]
    """Token ids up to where the answer begins."""
    prompt: str
    """Its last message."""
    expected: str
    expected_tokens: int
    slices: tuple[str, ...]
    """Names like "family arithmetic" or "script latin"."""


def questions_of(rows: Sequence[dict[str, Any]], tokenizer: Any, prompts: Prompts, source: str) -> list[Question]:
    """A question for each row; `source` names the rows in errors. Raises DataError for one that cannot be asked."""
    if not rows:
        raise DataError(f"{source}: there are no rows", "give at least one")
    return [_question(row, tokenizer, prompts, f"{source}, row {number}") for number, row in enumerate(rows, 1)]


def _question(row: dict[str, Any], tokenizer: Any, prompts: Prompts, place: str) -> Question:
    messages = row.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError(f"{place}: there is no list of messages", 'give {"messages": [{"role": ..., "content": ...}]}')
    if len(messages) < 2 or messages[-1].get("role") != "assistant" or not isinstance(messages[-1].get("content"), str):
        raise DataError(f"{place}: the last message is not an assistant's answer", "end every row with its reference")
    tools = row.get("tools")
    try:
        ids = prompts.ids(messages[:-1], json.loads(tools) if isinstance(tools, str) else tools)
    except ValueError as error:
        raise DataError(f"{place}: {error}", "check its roles, their order and its texts") from error
    expected = messages[-1]["content"].strip()
    prompt = str(messages[-2].get("content"))
    return Question(
        ids=ids,
        prompt=prompt,
        expected=expected,
        expected_tokens=len(tokenizer.encode(expected, add_special_tokens=False)),
        slices=_slices(row, f"{prompt}\n{expected}"),
    )


def _slices(row: dict[str, Any], text: str) -> tuple[str, ...]:
    from trainer.data.quality.filters import script_shares

    named = [f"{group} {row[group]}" for group in GROUPS if row.get(group) is not None]
    if row.get("language") is None:
        shares = script_shares(text)
        if any(shares.values()):
            named.append(f"script {max(shares, key=lambda script: shares[script])}")
    return tuple(named)
