"""The gateway: everything between clients and an engine that is not generating.

POST /v1/chat/completions  /v1/completions  /v1/embeddings  /v1/classify   what the engine has; the rest is 404
GET  /v1/models  /metrics                                                  with an API key, if there are any
GET  /health   the process lives    GET /ready   requests are welcome      GET /   the chat page

It knows who may ask, how much, and for how long; answers pass through event by event, unbuffered. A client that leaves
cancels its request in the engine. Of an engine's failures clients see 503 with Retry-After, or, once an answer has
begun, an error event.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import ipaddress
import json
import re
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web

from tools.serving.admission import Admission, Keys, Limits
from tools.serving.metrics import Metrics
from tools.serving.protocol import RequestError, check_model, max_new_tokens, parse_object
from tools.serving.supervisor import Supervisor
from tools.serving.usage_tap import UsageTap

RETRY_SECONDS = 2
OPEN_PATHS = ("/", "/health", "/ready")
GENERATE = ("/v1/chat/completions", "/v1/completions")
ROUTES = (*GENERATE, "/v1/embeddings", "/v1/classify")
CLIENT_GONE = 499
PAGE = Path(__file__).with_name("page.html")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class _Record:
    """What the access log and the metrics learn of one request: never its contents."""

    key: int | None = None
    first: float | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


SESSION: web.AppKey[aiohttp.ClientSession] = web.AppKey("session", aiohttp.ClientSession)
RECORD: web.RequestKey[_Record] = web.RequestKey("record", _Record)


class Gateway:
    """The web application in front of one supervised engine. Used in the event loop's thread only."""

    def __init__(self, name: str, engine: Supervisor, limits: Limits, keys: Keys, *, access_log: bool = True) -> None:
        self.name = name
        self.admission = Admission(limits)
        self._engine = engine
        self._limits = limits
        self._keys = keys
        self._access_log = access_log
        self._started = int(time.time())
        self._page, self._page_policy = _page()
        self._metrics = Metrics(lambda: self.admission.in_flight, lambda: float(engine.ready.is_set()))
        engine.on_restart = self._metrics.restarts.inc

    def app(self) -> web.Application:
        """The application; once."""
        app = web.Application(client_max_size=self._limits.max_body_bytes, middlewares=[self._record, self._guard])
        for path in self._engine.spec.routes:
            app.router.add_post(path, self._forward)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/metrics", self._show_metrics)
        app.router.add_get("/", self._chat_page)
        app.cleanup_ctx.append(_with_session)
        return app

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _ready(self, request: web.Request) -> web.Response:
        ready = self._engine.ready.is_set() and not self.admission.draining
        state = "ready" if ready else "stopping" if self.admission.draining else "starting"
        return web.json_response({"status": state}, status=200 if ready else 503)

    async def _models(self, request: web.Request) -> web.Response:
        facts = {"max_model_len": length} if (length := self._engine.facts.get("max_model_len")) else {}
        model = {"id": self.name, "object": "model", "created": self._started, "owned_by": "steadfast", **facts}
        return web.json_response({"object": "list", "data": [model]})

    async def _show_metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            body=self._metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    async def _chat_page(self, request: web.Request) -> web.Response:
        headers = {"Content-Security-Policy": self._page_policy, "X-Content-Type-Options": "nosniff"}
        return web.Response(text=self._page, content_type="text/html", headers=headers)

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        ready = self._engine.ready
        self.admission.check(ready=ready.is_set())
        if not self._keys and request.content_type != "application/json":
            # Keeps web pages of other origins out where no key does: a browser asks before it sends this type.
            raise RequestError(415, "the content type is not application/json")
        body, show_usage = self._prepare(request.path, await self._read_body(request))
        # The place is taken when the body is here: a client that sends slowly holds up nobody.
        with self.admission.admitted(ready=ready.is_set()):
            return await self._exchange(request, body, show_usage=show_usage)

    async def _read_body(self, request: web.Request) -> bytes:
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                return await request.read()
        except TimeoutError as error:
            raise RequestError(408, f"the body has not arrived within {self._limits.body_seconds:g} s") from error
        except web.RequestPayloadError as error:
            raise RequestError(400, "the body is broken") from error

    def _prepare(self, path: str, body: bytes) -> tuple[bytes, bool]:
        """The body for the engine, and whether the client wants the usage of a stream.

        What bounds the service is checked here, whatever the engine; what a field means is the engine's to say.
        """
        fields = parse_object(body)
        check_model(fields, self.name)
        fields["model"] = self.name
        if path not in GENERATE:
            return _dump(fields), False
        wanted = max_new_tokens(fields)
        if wanted is not None and wanted > self._limits.max_new_tokens:
            message = f"{wanted} new tokens are more than the {self._limits.max_new_tokens} this server allows"
            raise RequestError(400, message, param="max_completion_tokens")
        # One name for all: llama-cpp-python ignores the newer one without a word.
        fields.pop("max_completion_tokens", None)
        if wanted is not None:
            fields["max_tokens"] = wanted
        for name, value in self._engine.spec.defaults.items():
            if fields.get(name) is None:
                fields[name] = value
        for name in ("n", "best_of"):
            if fields.get(name, 1) != 1:
                raise RequestError(400, f"{name} is not supported; only 1", param=name)
        stream = fields.get("stream", False)
        options = fields.get("stream_options", {})
        if not isinstance(stream, bool):
            raise RequestError(400, "stream is neither true nor false", param="stream")
        if not isinstance(options, dict):
            raise RequestError(400, "stream_options is not an object", param="stream_options")
        if stream:
            fields["stream_options"] = {**options, "include_usage": True}
        return _dump(fields), options.get("include_usage") is True

    async def _exchange(self, request: web.Request, body: bytes, *, show_usage: bool) -> web.StreamResponse:
        began = time.monotonic()
        headers = {"Authorization": f"Bearer {self._engine.key}", "Content-Type": "application/json"}
        response: web.StreamResponse | None = None
        try:
            async with (
                asyncio.timeout(self._limits.request_seconds),
                request.app[SESSION].post(self._engine.url + request.path, data=body, headers=headers) as answer,
            ):
                request[RECORD].first = time.monotonic() - began
                if answer.status != 200 or answer.content_type != "text/event-stream":
                    return await _whole(request, answer)
                response = web.StreamResponse(
                    headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store"}
                )
                return await _stream(request, response, answer, UsageTap(show=show_usage))
        except TimeoutError:
            problem = RequestError(
                503, f"the answer took longer than {self._limits.request_seconds:g} s", code="too_slow"
            )
        except aiohttp.ClientError:
            problem = RequestError(503, "the engine failed; it is being started again", code="engine_failed")
        if response is None or not response.prepared:
            raise problem
        return await _end_with(request, response, problem)

    @web.middleware
    async def _record(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Every error in the OpenAI shape; one line of log and the metrics for every request."""
        began = time.monotonic()
        record = request[RECORD] = _Record()
        status = CLIENT_GONE
        try:
            response = await self._answer(request, handler)
            status = response.status
        except ConnectionError:
            # The client left while we were writing to it.
            return web.Response(status=CLIENT_GONE)
        finally:
            route = request.path if request.match_info.http_exception is None else "other"
            seconds = time.monotonic() - began
            self._metrics.count(route, status, seconds, record.first, record.usage)
            if self._access_log and route not in ("/health", "/ready"):
                _log(request, record, route, status, seconds)
        return response

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except RequestError as error:
            problem = error
        except web.HTTPRequestEntityTooLarge:
            problem = RequestError(413, f"the body is larger than {request.client_max_size} bytes")
        except web.HTTPException as error:
            problem = RequestError(error.status, f"{request.method} {request.path[:200]}: {error.reason}")
            if request.path in ROUTES and error.status == 404:
                has = ", ".join(self._engine.spec.routes)
                problem = RequestError(404, f"this model has no {request.path}; it has {has}")
        except ConnectionError:
            raise
        except Exception as error:
            sys.stderr.write(f"{request.method} {request.path}: {type(error).__name__}: {error} (a bug of ours)\n")
            problem = RequestError(500, "the server has made a mistake")
        request[RECORD].problem = problem.code or problem.message[:100] if problem.status >= 500 else problem.code
        headers = {"Retry-After": str(RETRY_SECONDS)} if problem.status in (429, 503) else {}
        if problem.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return web.json_response(problem.body(), status=problem.status, headers=headers)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if not self._keys:
            if not _is_local(request.headers.get("Host", "")):
                # A web page whose name was pointed at this machine (DNS rebinding) is of its own origin here.
                raise RequestError(421, "without an API key only this machine may ask, by its own name")
        elif request.path not in OPEN_PATHS:
            request[RECORD].key = self._keys.number(request.headers.get("Authorization", ""))
            if request[RECORD].key is None:
                raise RequestError(401, "the API key is missing or wrong", code="invalid_api_key")
        return await handler(request)


async def _with_session(app: web.Application) -> AsyncIterator[None]:
    # A connection each: engines close idle ones when they like, and a request must not meet one that is closing.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        app[SESSION] = session
        yield


async def _whole(request: web.Request, answer: aiohttp.ClientResponse) -> web.Response:
    """An answer in one piece, or an error: the engine's words in the OpenAI shape, its crashes as 503."""
    body = await answer.read()
    fields: Any = None
    with suppress(ValueError):
        fields = json.loads(body)
    if answer.status == 200 and isinstance(fields, dict):
        request[RECORD].usage = fields.get("usage") or {}
        return web.Response(body=body, content_type="application/json")
    if answer.status >= 500 or answer.status == 200 or answer.status in (401, 403):
        raise RequestError(503, "the engine failed at this request", code="engine_failed")
    if isinstance(fields, dict) and isinstance(fields.get("error"), dict):
        request[RECORD].problem = str(fields["error"].get("code"))
        return web.Response(body=body, status=answer.status, content_type="application/json")
    said = fields.get("message") or fields.get("detail") if isinstance(fields, dict) else None
    raise RequestError(answer.status, str(said or "the engine refused the request")[:1000])


async def _stream(
    request: web.Request, response: web.StreamResponse, answer: aiohttp.ClientResponse, tap: UsageTap
) -> web.StreamResponse:
    await response.prepare(request)
    async for data in answer.content.iter_any():
        if passed := tap.feed(data):
            await response.write(passed)
    request[RECORD].usage = tap.usage
    if tap.failed:
        request[RECORD].problem = "engine_failed"
    elif not tap.done:
        return await _end_with(request, response, RequestError(503, "the engine failed", code="engine_failed"))
    await response.write_eof()
    return response


async def _end_with(request: web.Request, response: web.StreamResponse, problem: RequestError) -> web.StreamResponse:
    """End a stream that has begun with an error event: the status line is long gone."""
    request[RECORD].problem = problem.code
    await response.write(b"data: " + _dump(problem.body()) + b"\n\n")
    await response.write_eof()
    return response


def _dump(fields: dict[str, Any]) -> bytes:
    # A lone surrogate, which JSON can say and UTF-8 cannot, stays an escape and is the engine's to judge.
    return json.dumps(fields).encode()


def _log(request: web.Request, record: _Record, route: str, status: int, seconds: float) -> None:
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "client": request.remote,
        "key": record.key,
        "method": request.method,
        "route": route,
        "status": status,
        "seconds": round(seconds, 4),
        "first_byte_seconds": None if record.first is None else round(record.first, 4),
        "prompt_tokens": record.usage.get("prompt_tokens"),
        "completion_tokens": record.usage.get("completion_tokens"),
        "problem": record.problem,
    }
    sys.stderr.write(json.dumps({name: value for name, value in line.items() if value is not None}) + "\n")


def _is_local(host: str) -> bool:
    """Whether a Host header names this machine as such."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _page() -> tuple[str, str]:
    """The chat page and its policy: its own script and style, its own server, nothing else."""
    text = PAGE.read_text("utf-8")

    def source(tag: str) -> str:
        found = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        content = found[1] if found else ""
        return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {source('script')}; style-src {source('style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy
