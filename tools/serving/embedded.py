"""The embedded engine as a process: an OpenAI server on loopback that only the gateway talks to.

    python -m tools.serving.embedded MODEL --port P --max-running N --max-new-tokens N [--context N] [...]

It has a process of its own so that a crash takes no gateway along, and looks to the gateway like any other engine:
GET /health, GET /v1/models, POST /v1/chat/completions and /v1/completions; for models with a head or a pooling of
their own POST /v1/classify and /v1/embeddings instead. Limits of the service, metrics and logs are the gateway's.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from tools.serving.protocol import (
    MAX_BODY_BYTES,
    Answer,
    Defaults,
    GenerationRequest,
    RequestError,
    models_list,
    parse_chat_request,
    parse_completion_request,
    usage,
)
from trainer.config.arguments import add_trust_argument
from trainer.errors import SteadfastError

if TYPE_CHECKING:
    from tools.serving.service import Piece, Service

KEY_VARIABLE = "STEADFAST_ENGINE_KEY"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def main() -> int:
    """Serve until SIGTERM; user-facing errors are one line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    for name in ("port", "max-running", "max-new-tokens"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--context", type=int)
    add_trust_argument(parser)
    try:
        asyncio.run(_serve(parser.parse_args()))
    except SteadfastError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


async def _serve(arguments: argparse.Namespace) -> None:
    from tools.serving.heads import head_of, make_head_app

    name = arguments.model.name
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    close = None
    if route := head_of(arguments.model):
        app = make_head_app(arguments.model, route, arguments.max_running, arguments.context)
    else:
        service, facts = _load(arguments)
        app, close = make_app(service, name, facts), service.engine.close
    app.middlewares.insert(0, errors)
    app.middlewares.append(_only_the_gateway(os.environ[KEY_VARIABLE]))
    # A request that the gateway gives up cancels its handler, which takes it out of the batch.
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", arguments.port).start()
        await stop.wait()
    finally:
        await runner.cleanup()
        if close:
            close()


def _load(arguments: argparse.Namespace) -> tuple[Service, dict[str, Any]]:
    from tools.model_directory.chat import stop_ids
    from tools.model_directory.loading import is_quantized, load_model
    from tools.serving.engine import Engine
    from tools.serving.service import Service
    from trainer.model.remote_code import trust_remote_code

    trust_remote_code(arguments.model, arguments.trust_remote_code)
    model, tokenizer = load_model(arguments.model)
    engine = Engine(
        model, stop_ids(model, tokenizer), max_running=arguments.max_running, most_context=arguments.context
    )
    facts = {
        "max_model_len": engine.context,
        "weights": "int8" if is_quantized(arguments.model) else "plain",
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
    }
    return Service(engine, tokenizer, _defaults(model), arguments.max_new_tokens), facts


def _defaults(model: Any) -> Defaults:
    """How to choose tokens for a request that does not say: as the model's generation configuration asks."""
    configured = model.generation_config
    if configured is None or not configured.do_sample:
        return Defaults()
    temperature = 1.0 if configured.temperature is None else float(configured.temperature)
    return Defaults(temperature, 1.0 if configured.top_p is None else float(configured.top_p))


def make_app(service: Service, name: str, facts: dict[str, Any]) -> web.Application:
    """The routes of a model that generates; `facts` go into its entry of /v1/models."""
    started = int(time.time())

    async def health(request: web.Request) -> web.Response:
        return web.json_response({}, status=200 if service.engine.alive else 500)

    async def models(request: web.Request) -> web.Response:
        return web.json_response(models_list(name, started, facts))

    async def chat(request: web.Request) -> web.StreamResponse:
        asked = parse_chat_request(await request.read(), name, service.defaults)
        return await _answer(request, service, Answer.new(name, chat=True), asked, await service.prompt(asked))

    async def complete(request: web.Request) -> web.StreamResponse:
        asked = parse_completion_request(await request.read(), name, service.defaults)
        return await _answer(request, service, Answer.new(name, chat=False), asked, await service.prompt(asked))

    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.router.add_get("/health", health)
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_post("/v1/completions", complete)
    return app


async def _answer(
    request: web.Request, service: Service, answer: Answer, asked: GenerationRequest, prompt: tuple[list[int], int]
) -> web.StreamResponse:
    ids, max_new_tokens = prompt
    async with aclosing(service.answer(asked, ids, max_new_tokens)) as pieces:  # type: ignore[type-var]
        if asked.stream:
            return await _send_stream(request, answer, asked.include_usage, len(ids), pieces)
        texts = []
        async for last in pieces:
            texts.append(last.text)
    counts = usage(len(ids), last.completion_tokens)
    return web.json_response(answer.whole("".join(texts), last.finish_reason or "length", counts))


async def _send_stream(
    request: web.Request, answer: Answer, include_usage: bool, prompt_tokens: int, pieces: AsyncIterator[Piece]
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    if answer.chat:
        await _send_event(response, answer.opening())
    try:
        async for last in pieces:
            if last.text:
                await _send_event(response, answer.chunk(last.text))
    except SteadfastError as error:
        # The status line is long gone; clients look for an error event.
        await _send_event(response, RequestError(503, error.fact, code="engine_failed").body())
        return response
    await _send_event(response, answer.chunk("", last.finish_reason))
    if include_usage:
        await _send_event(response, answer.usage_chunk(usage(prompt_tokens, last.completion_tokens)))
    await response.write(b"data: [DONE]\n\n")
    return response


async def _send_event(response: web.StreamResponse, content: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n")


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error in the OpenAI shape."""
    try:
        return await handler(request)
    except RequestError as error:
        problem = error
    except web.HTTPException as error:
        problem = RequestError(error.status, f"{request.method} {request.path}: {error.reason}")
    except SteadfastError as error:
        problem = RequestError(503, error.fact, code="engine_failed")
    return web.json_response(problem.body(), status=problem.status)


def _only_the_gateway(key: str) -> Any:
    expected = f"Bearer {key}".encode()

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not hmac.compare_digest(request.headers.get("Authorization", "").encode("utf-8", "replace"), expected):
            raise RequestError(401, "only the gateway may ask")
        return await handler(request)

    return check


if __name__ == "__main__":
    sys.exit(main())
