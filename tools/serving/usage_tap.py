"""Reads the token counts of a streamed answer on its way to the client."""

from __future__ import annotations

import json
from typing import Any

END = b"\n\n"
DONE = b"data: [DONE]"


class UsageTap:
    """Passes whole server-sent events on and keeps the usage that one of them holds.

    The gateway asks every engine for the usage. The event that holds nothing else is passed on only with `show`, that
    is, when the client asked for it. No event is parsed but that one: a stream costs a search, not a decoder.
    """

    def __init__(self, *, show: bool) -> None:
        self.usage: dict[str, Any] = {}
        self.failed = False
        """Whether the engine ended the stream with an error event."""
        self.done = False
        """Whether the end of the stream was seen."""
        self._show = show
        self._half = b""

    def feed(self, data: bytes) -> bytes:
        """Take bytes from the engine, return those for the client."""
        # llama-cpp-python and others of the sse-starlette family end lines with \r\n.
        data = (self._half + data).replace(b"\r\n", b"\n")
        whole, end, self._half = data.rpartition(END)
        if not end:
            return b""
        if b'"usage"' not in whole and DONE not in whole and b'"error"' not in whole:
            return whole + end
        return b"".join(event + END for event in whole.split(END) if self._passes(event))

    def _passes(self, event: bytes) -> bool:
        if event == DONE:
            self.done = True
            return True
        if not event.startswith(b"data: ") or (b'"usage"' not in event and b'"error"' not in event):
            return True
        try:
            fields = json.loads(event[6:])
        except ValueError:
            return True
        if not isinstance(fields, dict):
            return True
        self.failed |= "error" in fields
        if isinstance(fields.get("usage"), dict):
            self.usage = fields["usage"]
            return bool(self._show or fields.get("choices"))
        return True
