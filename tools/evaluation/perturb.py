"""Questions asked less neatly: what people type, made from neat questions by a seed.

Only the last user message changes, and never its digits: another number would be another question.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

_TYPO_SHARE = 0.05
"""Of the letters, at least one."""
_WORD_SHARE = 0.1


def _typos(text: str, draw: random.Random) -> str:
    """Neighbouring letters change places."""
    letters = list(text)
    places = [i for i in range(len(text) - 1) if text[i].isalpha() and text[i + 1].isalpha() and text[i] != text[i + 1]]
    for place in draw.sample(places, min(len(places), max(1, round(len(places) * _TYPO_SHARE)))):
        letters[place], letters[place + 1] = letters[place + 1], letters[place]
    return "".join(letters)


def _lower_case(text: str, draw: random.Random) -> str:
    return text.lower()


def _white_space(text: str, draw: random.Random) -> str:
    """Spaces are doubled, and stand at both ends."""
    return f" {text.replace(' ', '  ')} "


def _dropped_words(text: str, draw: random.Random) -> str:
    """Words of letters only get lost."""
    words = text.split(" ")
    places = [number for number, word in enumerate(words) if word.isalpha()]
    lost = set(draw.sample(places, min(len(places), max(1, round(len(places) * _WORD_SHARE)))))
    return " ".join(word for number, word in enumerate(words) if number not in lost)


PERTURBATIONS: dict[str, Callable[[str, random.Random], str]] = {
    "typos": _typos,
    "lower case": _lower_case,
    "white space": _white_space,
    "dropped words": _dropped_words,
}


def perturbed(rows: Sequence[dict[str, Any]], kind: str, seed: int) -> list[dict[str, Any]]:
    """Copies of `rows` whose last user message was changed; the same for the same seed, row number and kind."""
    change = PERTURBATIONS[kind]
    found = []
    for number, row in enumerate(rows):
        messages = [dict(message) for message in row["messages"]]
        asked = next((message for message in reversed(messages[:-1]) if message.get("role") == "user"), None)
        if asked is not None and isinstance(asked.get("content"), str):
            asked["content"] = change(asked["content"], random.Random(f"{seed} {kind} {number}"))
        found.append(row | {"messages": messages})
    return found
