"""Serve a model over an OpenAI-compatible HTTP interface.

    steadfast serve out/model --port 8000 --api-key KEY

Serves what `steadfast export` and `steadfast quantize` write. Answers POST /v1/chat/completions (whole or streamed)
and GET /v1/models; GET /health says that the process lives, GET /ready that it has loaded the model, generated once
and takes requests. Answers are greedy unless the request gives a temperature or the model's generation_config.json
asks for sampling. Tools are shown to the model through its chat template; its calls come back as text. SIGTERM lets
running requests finish.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import ipaddress
import json
import os
import shlex
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import Interrupted, SteadfastError, UsageError

if TYPE_CHECKING:
    from tools.serving.service import Service

KEY_VARIABLE = "STEADFAST_API_KEY"
WATCH_SECONDS = 1.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `steadfast serve`."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="model directory (exported or quantized)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; others than loopback need a key")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one")
    parser.add_argument("--api-key", metavar="KEY", help=f"key clients must send (better: variable {KEY_VARIABLE})")
    parser.add_argument("--max-new-tokens", type=int, default=1024, metavar="N", help="most tokens of one answer")
    parser.add_argument("--max-running", type=int, default=16, metavar="N", help="requests answered at once")
    parser.add_argument("--max-waiting", type=int, default=64, metavar="N", help="requests that may wait; then 429")
    parser.add_argument("--drain-seconds", type=float, default=30.0, metavar="S", help="bound on finishing at SIGTERM")
    parser.add_argument("--json", action="store_true", help="print the ready line as JSON")


@dataclass(frozen=True)
class _Address:
    host: str
    port: int
    api_key: str | None


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    from tools.models import check_model_directory

    for name, least in (("max_new_tokens", 1), ("max_running", 1), ("max_waiting", 0), ("drain_seconds", 0)):
        if getattr(arguments, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} is less than {least}", "give a larger number")
    if not 0 <= arguments.port < 1 << 16:
        raise UsageError(f"port {arguments.port} does not exist", "give one between 0 and 65535")
    api_key = os.environ.get(KEY_VARIABLE) if arguments.api_key is None else arguments.api_key
    if api_key is not None and not api_key.strip():
        raise UsageError("the API key is empty", f"give one with --api-key or {KEY_VARIABLE}, or none at all")
    if api_key is None and not is_loopback(arguments.host):
        raise UsageError(
            f"{arguments.host} can be reached from other machines and there is no API key",
            f"set {KEY_VARIABLE} or listen on 127.0.0.1",
        )
    check_model_directory(arguments.model)
    return asyncio.run(_serve(arguments, _Address(arguments.host, arguments.port, api_key)))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _serve(arguments: argparse.Namespace, address: _Address) -> int:
    from aiohttp import web

    from tools.serving.app import make_app
    from tools.serving.service import Limits, Service

    limits = Limits(arguments.max_new_tokens, arguments.max_running, arguments.max_waiting)
    service = Service(arguments.model.resolve().name, limits)
    # A client that hangs up cancels its handler, which takes the request out of the batch.
    runner = web.AppRunner(
        make_app(service, address.api_key), handler_cancellation=True, access_log=None, shutdown_timeout=1.0
    )
    await runner.setup()
    try:
        port = await _listen(web.TCPSite(runner, address.host, address.port), runner, address)
        # The port answers from here on (/health yes, /ready no): a taken one is noticed before a large model loads.
        return await _until_stopped(arguments, service, address, port)
    finally:
        await runner.cleanup()
        if service.engine is not None:
            service.engine.close()


async def _listen(site: Any, runner: Any, address: _Address) -> int:
    try:
        await site.start()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"{address.host}:{address.port} is taken", "give another --port, or 0 for any") from error
        reason = error.strerror or str(error)
        raise UsageError(f"cannot listen on {address.host}:{address.port}: {reason}", "check --host, --port") from error
    return int(runner.addresses[0][1])


async def _until_stopped(arguments: argparse.Namespace, service: Service, address: _Address, port: int) -> int:
    stop, now = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (now if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    start = asyncio.ensure_future(_start(arguments, service, address, port))
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({start, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if start.done():
            start.result()
        while not stop.is_set():
            if service.failed:
                raise SteadfastError("the engine has failed", "see the lines above; restart the server")
            await asyncio.wait({stopped}, timeout=WATCH_SECONDS)
    finally:
        start.cancel()
        stopped.cancel()
    sys.stderr.write(f"stopping: {service.in_flight} requests running, at most {arguments.drain_seconds:g} s\n")
    drain = asyncio.ensure_future(service.drain(arguments.drain_seconds))
    hurry = asyncio.ensure_future(now.wait())
    await asyncio.wait({drain, hurry}, return_when=asyncio.FIRST_COMPLETED)
    hurry.cancel()
    if not drain.done():
        drain.cancel()
        raise Interrupted(f"stopped at once; {service.in_flight} requests were dropped")
    sys.stderr.write("stopped\n" if drain.result() else f"stopped; {service.in_flight} requests were dropped\n")
    return 0


async def _start(arguments: argparse.Namespace, service: Service, address: _Address, port: int) -> None:
    """Load the model, let it answer once, and say that the server is ready."""
    from tools.chat import check_chat_template, stop_ids
    from tools.models import is_quantized
    from tools.serving.engine import NAME, Engine

    model, tokenizer = await _in_thread(arguments.model)
    check_chat_template(tokenizer, arguments.model)
    engine = Engine(model, stop_ids(model, tokenizer), max_running=arguments.max_running)
    await service.start(engine, tokenizer, _defaults(model))
    host = f"[{address.host}]" if ":" in address.host else address.host
    url = f"http://{host}:{port}/v1"
    kind = "int8" if is_quantized(arguments.model) else "plain"
    about = {
        "url": url,
        "model": service.name,
        "weights": kind,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "engine": NAME,
        "context": engine.context,
        "api_key": address.api_key is not None,
    }
    if arguments.json:
        print(json.dumps(about), flush=True)
        return
    guard = "an API key is needed" if address.api_key else "no API key: only this machine can ask"
    print(
        f"ready: {url} serves {service.name} ({kind} weights, {about['dtype']} on {about['device']}); engine: {NAME} "
        f"(embedded, needs nothing else); {engine.context} tokens a request, {arguments.max_running} at once; {guard}"
    )
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32}
    # The key itself is not repeated: what a terminal shows ends up in logs.
    shown = f"${KEY_VARIABLE}" if os.environ.get(KEY_VARIABLE) else "KEY"
    key = ["-H", f"Authorization: Bearer {shown}"] if address.api_key else []
    words = ["curl", f"{url}/chat/completions", "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    quoted = [shlex.quote(word) for word in words] + [f'"{word}"' if " " in word else word for word in key]
    print(f"next: {' '.join(quoted)}", flush=True)


async def _in_thread(path: Path) -> tuple[Any, Any]:
    """Load the model in a thread that a stop request need not wait for."""
    from tools.models import load_model

    loop = asyncio.get_running_loop()
    loaded: asyncio.Future[tuple[Any, Any]] = loop.create_future()

    def tell(result: tuple[Any, Any] | None, error: Exception | None) -> None:
        if loaded.cancelled():
            return
        if error is not None:
            loaded.set_exception(error)
        elif result is not None:
            loaded.set_result(result)

    def work() -> None:
        try:
            result, problem = load_model(path), None
        except Exception as error:
            result, problem = None, error
        if not loop.is_closed():
            loop.call_soon_threadsafe(tell, result, problem)

    threading.Thread(target=work, daemon=True).start()
    return await loaded


def _defaults(model: Any) -> Any:
    """How to choose tokens for a request that does not say: as the model's generation configuration asks."""
    from tools.serving.protocol import Defaults

    configured = model.generation_config
    if configured is None or not configured.do_sample:
        return Defaults()
    temperature = 1.0 if configured.temperature is None else float(configured.temperature)
    return Defaults(temperature, 1.0 if configured.top_p is None else float(configured.top_p))
