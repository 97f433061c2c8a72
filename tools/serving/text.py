"""From tokens to text while they arrive: no half characters, and nothing past a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "�"


class TextStream:
    """Turns the tokens of one answer into text, piece by piece; the pieces joined are the answer.

    A piece is held back while it may still change: half a character (one may take several tokens), or the beginning of
    a stop text. `stopped` turns true when a stop text was met; it and what follows are not part of the answer.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._tokens: list[int] = []
        self._context = 0  # tokens before this one no longer influence the text
        self._shown = 0  # tokens whose text has been decoded
        self._held = ""

    def feed(self, tokens: Sequence[int]) -> str:
        """Add tokens and return the text that is now certain."""
        pieces = []
        for token in tokens:
            if self.stopped:
                break
            self._tokens.append(token)
            pieces.append(self._release(self._decode(final=False), final=False))
        return "".join(pieces)

    def finish(self) -> str:
        """The rest of the text; call once, after the last token."""
        return "" if self.stopped else self._release(self._decode(final=True), final=True)

    def _decode(self, *, final: bool) -> str:
        before = self._text(self._context, self._shown)
        now = self._text(self._context, len(self._tokens))
        if now.endswith(REPLACEMENT) and not final:
            return ""
        self._context, self._shown = self._shown, len(self._tokens)
        return now[len(before) :]

    def _text(self, start: int, stop: int) -> str:
        return str(self._tokenizer.decode(self._tokens[start:stop], skip_special_tokens=True))

    def _release(self, text: str, *, final: bool) -> str:
        text = self._held + text
        self._held = ""
        found = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        if not final:
            keep = max((_overlap(text, stop) for stop in self._stops), default=0)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
