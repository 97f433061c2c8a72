"""What the embedded engine does with a request: make its prompt and answer it piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tools.model_directory.chat import Prompts
from tools.serving.protocol import ChatRequest, CompletionRequest, Defaults, GenerationRequest, RequestError
from tools.serving.text import TextStream

if TYPE_CHECKING:
    from tools.serving.engine import Engine


@dataclass(frozen=True)
class Piece:
    """A part of an answer: text, and at the end why it ended. `completion_tokens` counts up to here."""

    text: str
    completion_tokens: int
    finish_reason: str | None = None


class Service:
    """Answers requests with one model. Used in the event loop's thread only."""

    def __init__(self, engine: Engine, tokenizer: Any, defaults: Defaults, max_new_tokens: int) -> None:
        self.engine = engine
        self.defaults = defaults
        self._max_new_tokens = max_new_tokens
        self._tokenizer = tokenizer
        self._prompts = Prompts(tokenizer) if tokenizer.chat_template else None
        self._encoding = asyncio.Lock()

    async def prompt(self, request: ChatRequest | CompletionRequest) -> tuple[list[int], int]:
        """Token ids of a request's prompt and the most tokens of its answer; RequestError 400 when they do not fit."""
        engine = self.engine
        field = "messages" if isinstance(request, ChatRequest) else "prompt"
        try:
            # In a thread, one at a time: a long text must not hold up the answers that are being sent.
            async with self._encoding:
                ids = await asyncio.to_thread(self._ids, request)
        except ValueError as error:
            raise RequestError(400, str(error), param=field) from error
        if not ids:
            raise RequestError(400, "the prompt has no tokens", param=field)
        room = engine.context - len(ids)
        wanted = request.max_new_tokens
        if wanted is not None and wanted > self._max_new_tokens:
            message = f"{wanted} new tokens are more than the {self._max_new_tokens} this server allows"
            raise RequestError(400, message, param="max_completion_tokens")
        if room < (wanted or 1):
            asked = f" and {wanted} new ones" if wanted else ""
            message = f"{len(ids)} prompt tokens{asked} do not fit the context of {engine.context} tokens"
            raise RequestError(400, message, param=field, code="context_length_exceeded")
        return ids, wanted or min(room, self._max_new_tokens)

    def _ids(self, request: ChatRequest | CompletionRequest) -> list[int]:
        if isinstance(request, ChatRequest):
            if self._prompts is None:
                raise ValueError("this model has no chat template; ask /v1/completions")
            return self._prompts.ids(request.messages, request.tools)
        if isinstance(request.prompt, str):
            return [int(token) for token in self._tokenizer(request.prompt)["input_ids"]]
        if (largest := max(request.prompt)) >= (known := len(self._tokenizer)):
            raise ValueError(f"there is no token {largest}; the model knows {known}")
        return request.prompt

    async def answer(self, request: GenerationRequest, ids: list[int], max_new_tokens: int) -> AsyncIterator[Piece]:
        """Yield the pieces of an answer; the last one has the finish reason."""
        engine = self.engine
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
