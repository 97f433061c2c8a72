"""What the server does with a request: admit it, answer it, and finish what runs when it is told to stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tools.chat import Prompts
from tools.serving.protocol import ChatRequest, Defaults, RequestError, Sampling
from tools.serving.text import TextStream

if TYPE_CHECKING:
    from tools.serving.engine import Engine

RETRY_SECONDS = 2
CHECK_PROMPT = [{"role": "user", "content": "Hello"}]
CHECK_TOKENS = 4


@dataclass(frozen=True)
class Limits:
    """Bounds of the service."""

    max_new_tokens: int
    """Most tokens of one answer."""
    max_running: int
    """Requests answered at once."""
    max_waiting: int
    """Requests that may wait for their turn; more are refused with 429."""
    max_body_bytes: int = 1 << 20


@dataclass(frozen=True)
class Piece:
    """A part of an answer: text, and at the end why it ended. `completion_tokens` counts up to here."""

    text: str
    completion_tokens: int
    finish_reason: str | None = None


class Service:
    """Answers chat requests with one model. Used in the event loop's thread only."""

    def __init__(self, name: str, limits: Limits) -> None:
        self.name = name
        self.limits = limits
        self.defaults = Defaults()
        self.ready = False
        self.draining = False
        self.in_flight = 0
        self.engine: Engine | None = None
        self._tokenizer: Any = None
        self._prompts: Prompts | None = None
        self._encoding = asyncio.Lock()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def failed(self) -> bool:
        """Whether the engine was started and is gone."""
        return self.engine is not None and not self.engine.alive

    async def start(self, engine: Engine, tokenizer: Any, defaults: Defaults) -> None:
        """Take the engine into service after one real generation; raises EngineError when that fails."""
        self.engine, self._tokenizer, self.defaults = engine, tokenizer, defaults
        self._prompts = Prompts(tokenizer)
        try:
            ids = self._prompts.ids(CHECK_PROMPT)
        except ValueError:  # a template may want a system message first; the model is what we check
            ids = tokenizer.encode(CHECK_PROMPT[0]["content"])
        async for _ in engine.generate(ids, CHECK_TOKENS, Sampling()):
            pass
        self.ready = not self.draining

    def admit(self) -> None:
        """Count a request in; RequestError 503 while not ready, 429 when too many wait. `release` counts it out."""
        if self.draining or not self.ready or self.failed:
            raise RequestError(503, "the server is not ready for requests", code="not_ready")
        if self.in_flight >= self.limits.max_running + self.limits.max_waiting:
            raise RequestError(429, f"{self.in_flight} requests are here already; try again later", code="queue_full")
        self.in_flight += 1
        self._idle.clear()

    def release(self) -> None:
        """Count a request out."""
        self.in_flight -= 1
        if self.in_flight == 0:
            self._idle.set()

    async def drain(self, seconds: float) -> bool:
        """Refuse new requests and wait for the running ones; False when some still ran after `seconds`."""
        self.draining, self.ready = True, False
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def prompt(self, request: ChatRequest) -> tuple[list[int], int]:
        """Token ids of a request's prompt and the most tokens of its answer; RequestError 400 when they do not fit."""
        engine, prompts = self._engine_and_prompts()
        try:
            # In a thread, one at a time: a long text must not hold up the answers that are being sent.
            async with self._encoding:
                ids = await asyncio.to_thread(prompts.ids, request.messages, request.tools)
        except ValueError as error:
            raise RequestError(400, str(error), param="messages") from error
        if not ids:
            raise RequestError(400, "the prompt has no tokens", param="messages")
        room = engine.context - len(ids)
        wanted = request.max_new_tokens
        if wanted is not None and wanted > self.limits.max_new_tokens:
            message = f"{wanted} new tokens are more than the {self.limits.max_new_tokens} this server allows"
            raise RequestError(400, message, param="max_completion_tokens")
        if room < (wanted or 1):
            asked = f" and {wanted} new ones" if wanted else ""
            message = f"{len(ids)} prompt tokens{asked} do not fit the context of {engine.context} tokens"
            raise RequestError(400, message, param="messages", code="context_length_exceeded")
        return ids, wanted or min(room, self.limits.max_new_tokens)

    async def answer(self, request: ChatRequest, ids: list[int], max_new_tokens: int) -> AsyncIterator[Piece]:
        """Yield the pieces of an answer; the last one has the finish reason."""
        engine, _ = self._engine_and_prompts()
        text = TextStream(self._tokenizer, request.stops)
        count = 0
        ended = False
        tokens = engine.generate(ids, max_new_tokens, request.sampling)
        try:
            async for new in tokens:
                count += len(new)
                ended = new[-1] in engine.stop_tokens
                piece = text.feed(new[:-1] if ended else new)
                if text.stopped:
                    yield Piece(piece, count, "stop")
                    return
                if piece:
                    yield Piece(piece, count)
        finally:
            await tokens.aclose()  # type: ignore[attr-defined]
        piece = text.finish()
        yield Piece(piece, count, "stop" if ended or text.stopped else "length")

    def _engine_and_prompts(self) -> tuple[Engine, Prompts]:
        if self.engine is None or self._prompts is None:
            raise RequestError(503, "the server is not ready for requests", code="not_ready")
        return self.engine, self._prompts
