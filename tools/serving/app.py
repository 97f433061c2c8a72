"""The routes: authentication, bodies, JSON and server-sent events around a `Service`.

POST /v1/chat/completions   GET /v1/models   with the API key, if there is one
GET /health   the process lives and its engine has not failed
GET /ready    requests are welcome: the model is loaded, has answered once, and the server is not stopping
"""

from __future__ import annotations

import hmac
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from aiohttp import web

from tools.serving.protocol import Answer, ChatRequest, RequestError, parse_chat_request, usage
from tools.serving.service import RETRY_SECONDS, Piece, Service
from trainer.errors import SteadfastError

OPEN_PATHS = ("/health", "/ready")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(service: Service, api_key: str | None) -> web.Application:
    """The web application of a service; with `api_key` every route but /health and /ready asks for it."""
    routes = _Routes(service, open_to_all=api_key is None)
    app = web.Application(
        client_max_size=service.limits.max_body_bytes, middlewares=[_errors, _authentication(api_key)]
    )
    app.router.add_post("/v1/chat/completions", routes.chat)
    app.router.add_get("/v1/models", routes.models)
    app.router.add_get("/health", routes.health)
    app.router.add_get("/ready", routes.is_ready)
    return app


class _Routes:
    def __init__(self, service: Service, *, open_to_all: bool) -> None:
        self._service = service
        self._open_to_all = open_to_all
        self._started = int(time.time())

    async def health(self, request: web.Request) -> web.Response:
        failed = self._service.failed
        return web.json_response({"status": "failed" if failed else "ok"}, status=500 if failed else 200)

    async def is_ready(self, request: web.Request) -> web.Response:
        ready = self._service.ready and not self._service.failed
        state = "ready" if ready else "stopping" if self._service.draining else "starting"
        return web.json_response({"status": state}, status=200 if ready else 503)

    async def models(self, request: web.Request) -> web.Response:
        model = {"id": self._service.name, "object": "model", "created": self._started, "owned_by": "steadfast"}
        return web.json_response({"object": "list", "data": [model]})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        # Admission first: a full server does not spend time on parsing. It ends when the answer is sent.
        started = time.monotonic()
        self._service.admit()
        try:
            if self._open_to_all and request.content_type != "application/json":
                # Keeps web pages of other origins out where no key does: a browser asks before it sends this type.
                raise RequestError(415, "the content type is not application/json")
            chat = parse_chat_request(await request.read(), self._service.name, self._service.defaults)
            ids, max_new_tokens = await self._service.prompt(chat)
            pieces = self._service.answer(chat, ids, max_new_tokens)
            send = self._send_stream if chat.stream else self._send_whole
            response, last = await send(request, chat, len(ids), pieces)
        finally:
            self._service.release()
        _log(f"{len(ids)} prompt tokens, {last.completion_tokens} new, {last.finish_reason}", started)
        return response

    async def _send_whole(
        self, request: web.Request, chat: ChatRequest, prompt_tokens: int, pieces: AsyncIterator[Piece]
    ) -> tuple[web.StreamResponse, Piece]:
        texts = []
        last = Piece("", 0)
        async with aclosing(pieces):  # type: ignore[type-var]
            async for last in pieces:
                texts.append(last.text)
        counts = usage(prompt_tokens, last.completion_tokens)
        body = Answer.new(self._service.name).whole("".join(texts), last.finish_reason or "length", counts)
        return web.json_response(body), last

    async def _send_stream(
        self, request: web.Request, chat: ChatRequest, prompt_tokens: int, pieces: AsyncIterator[Piece]
    ) -> tuple[web.StreamResponse, Piece]:
        answer = Answer.new(self._service.name)
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store"}
        )
        last = Piece("", 0)
        async with aclosing(pieces):  # type: ignore[type-var]
            await response.prepare(request)
            try:
                await _send_event(response, answer.chunk({"role": "assistant", "content": ""}))
                async for last in pieces:
                    if last.text:
                        await _send_event(response, answer.chunk({"content": last.text}))
                await _send_event(response, answer.chunk({}, last.finish_reason))
                if chat.include_usage:
                    await _send_event(response, answer.usage_chunk(usage(prompt_tokens, last.completion_tokens)))
                await response.write(b"data: [DONE]\n\n")
            except SteadfastError as error:
                # The status line is long gone; clients look for an error event.
                await _send_event(response, RequestError(500, error.fact).body())
        await response.write_eof()
        return response, last


async def _send_event(response: web.StreamResponse, content: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n")


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error in the OpenAI shape."""
    try:
        return await handler(request)
    except RequestError as error:
        problem = error
    except web.HTTPRequestEntityTooLarge:
        problem = RequestError(413, f"the body is larger than {request.client_max_size} bytes")
    except web.HTTPException as error:
        problem = RequestError(error.status, f"{request.method} {request.path}: {error.reason}")
    except SteadfastError as error:
        problem = RequestError(500, error.fact)
    except ConnectionError:
        raise
    except Exception as error:
        _log(f"{request.method} {request.path}: {type(error).__name__}: {error} (a bug of ours)", time.monotonic())
        problem = RequestError(500, "the server has made a mistake")
    headers = {"Retry-After": str(RETRY_SECONDS)} if problem.status in (429, 503) else {}
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return web.json_response(problem.body(), status=problem.status, headers=headers)


def _authentication(api_key: str | None) -> Any:
    expected = None if api_key is None else f"Bearer {api_key}".encode()

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if expected is not None and request.path not in OPEN_PATHS:
            given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
            if not hmac.compare_digest(given, expected):
                raise RequestError(401, "the API key is missing or wrong", code="invalid_api_key")
        return await handler(request)

    return check


def _log(text: str, started: float) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}, {time.monotonic() - started:.2f} s\n")
