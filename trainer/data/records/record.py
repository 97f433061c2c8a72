"""The canonical records: what a row is to the rest of the pipeline, whatever its file called things."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """A conversation in the form chat templates read. `place` is `file:line`.

    Messages have `role` system, user, assistant or tool, text `content`, and `tool_calls` whose arguments are an
    object, never a JSON string (a template would quote it twice).

    `trained` says for each message whether it is trained on, from the flags of the row; None when it has none.
    `pinned` is the text whose end is the end of what every window of the conversation shall begin with; "" for none.
    """

    messages: tuple[Message, ...]
    tools: list[dict[str, Any]] | None
    place: str
    trained: tuple[bool, ...] | None = None
    pinned: str = ""

    @property
    def empty_answer(self) -> bool:
        """An assistant turn to be trained without text and without a tool call: it would teach to say nothing."""
        return any(
            message["role"] == "assistant"
            and not message["content"].strip()
            and not message.get("tool_calls")
            and (self.trained is None or self.trained[index])
            for index, message in enumerate(self.messages)
        )


@dataclass(frozen=True)
class PlainText:
    """`text` to be trained on after `prompt`, which is not; with prompt "" all of it is."""

    prompt: str
    text: str
    place: str

    @property
    def empty_answer(self) -> bool:
        """Nothing but white space to train on."""
        return not self.text.strip()


@dataclass(frozen=True)
class TokenIds:
    """A row that is tokenised already: `ids` int64 [tokens], `spans` the (start, stop) positions trained on."""

    ids: NDArray[np.int64]
    spans: tuple[tuple[int, int], ...]
    place: str

    @property
    def empty_answer(self) -> bool:
        """No token is trained on."""
        return not self.spans


Record = Conversation | PlainText | TokenIds
