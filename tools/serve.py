"""Serve a model over an OpenAI-compatible HTTP interface, with a chat page at /.

    steadfast serve out/model                        the engine is chosen by what the machine has; the reason is printed
    steadfast serve model-q8_0.gguf --engine llamacpp
    STEADFAST_API_KEY=one,two steadfast serve out/model --host 0.0.0.0 --port 8000

A gateway (keys, limits, metrics, drain) in front of an engine process: on a CPU the embedded one (transformers
continuous batching), llama.cpp for GGUF, on a GPU vLLM or SGLang where installed. The engine gets requests after it
answered one; when it crashes it is started again, and requests get 503 with Retry-After meanwhile. Answers POST
/v1/chat/completions and /v1/completions (a classifier: /v1/classify; a model with a pooling: /v1/embeddings), GET
/v1/models, /health, /ready and /metrics. Answers are greedy unless the request gives a temperature or the model's
generation_config.json asks for sampling. SIGTERM lets running requests finish.
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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.arguments import add_trust_argument
from trainer.errors import Interrupted, MissingInputError, UsageError

if TYPE_CHECKING:
    from tools.serving.engines import EngineSpec
    from tools.serving.gateway import Gateway
    from tools.serving.supervisor import Supervisor

KEY_VARIABLE = "STEADFAST_API_KEY"
ENGINES = ("auto", "embedded", "llamacpp", "openvino", "vllm", "sglang")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `steadfast serve`."""
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="model directory (exported or quantized), or GGUF file"
    )
    parser.add_argument("--engine", choices=ENGINES, default="auto", help="what generates")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; others than loopback need a key")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one")
    parser.add_argument("--api-key", metavar="KEY", help=f"key clients must send (better: variable {KEY_VARIABLE})")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys clients may send, one a line")
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="most tokens of prompt and answer; by default what the model was made for",
    )
    parser.add_argument("--max-new-tokens", type=int, default=1024, metavar="N", help="most tokens of one answer")
    parser.add_argument("--max-running", type=int, default=16, metavar="N", help="requests answered at once")
    parser.add_argument("--max-waiting", type=int, default=64, metavar="N", help="requests that may wait; then 429")
    parser.add_argument(
        "--request-seconds", type=float, default=600.0, metavar="S", help="bound on one answer; then 503"
    )
    parser.add_argument("--drain-seconds", type=float, default=30.0, metavar="S", help="bound on finishing at SIGTERM")
    add_trust_argument(parser)
    parser.add_argument("--json", action="store_true", help="print the ready line as JSON")


@dataclass(frozen=True)
class _Address:
    host: str
    port: int
    keys: tuple[str, ...]

    @property
    def url_host(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    from tools.serving.admission import read_keys
    from tools.serving.engines import Wanted, choose_engine, this_machine

    least = {"max_new_tokens": 1, "max_running": 1, "max_waiting": 0, "drain_seconds": 0, "request_seconds": 1}
    for name, bound in least.items():
        if not getattr(arguments, name) >= bound:  # also what is not a number
            raise UsageError(f"--{name.replace('_', '-')} is less than {bound}", "give a larger number")
    if arguments.context is not None and arguments.context < 2:
        raise UsageError("--context is less than 2", "give a larger number")
    if not 0 <= arguments.port < 1 << 16:
        raise UsageError(f"port {arguments.port} does not exist", "give one between 0 and 65535")
    keys = read_keys(arguments.api_key, arguments.api_key_file, os.environ.get(KEY_VARIABLE))
    if not keys and not is_loopback(arguments.host):
        raise UsageError(
            f"{arguments.host} can be reached from other machines and there is no API key",
            f"set {KEY_VARIABLE} or listen on 127.0.0.1",
        )
    model = arguments.model.resolve()
    _check_model(model, arguments.trust_remote_code)
    wanted = Wanted(
        model,
        model.name,
        arguments.max_running,
        arguments.max_new_tokens,
        arguments.context,
        arguments.trust_remote_code,
    )
    spec = choose_engine(arguments.engine, wanted, this_machine())
    return asyncio.run(_serve(arguments, spec, _Address(arguments.host, arguments.port, tuple(keys))))


def _check_model(model: Path, trusted_code: str | None) -> None:
    from tools.model_directory.loading import check_model_directory
    from trainer.model.remote_code import checked_code

    if model.suffix == ".gguf":
        if not model.is_file():
            raise MissingInputError(f"{model} does not exist", "check the path")
        return
    check_model_directory(model)
    checked_code(model, trusted_code)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _serve(arguments: argparse.Namespace, spec: EngineSpec, address: _Address) -> int:
    from aiohttp import web

    from tools.serving.admission import Keys, Limits
    from tools.serving.gateway import Gateway
    from tools.serving.supervisor import Supervisor

    limits = Limits(
        arguments.max_new_tokens,
        arguments.max_running,
        arguments.max_waiting,
        request_seconds=arguments.request_seconds,
    )
    engine = Supervisor(spec)
    gateway = Gateway(arguments.model.resolve().name, engine, limits, Keys(address.keys))
    # A client that hangs up cancels its handler, which takes the request out of the engine.
    runner = web.AppRunner(gateway.app(), handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        port = await _listen(web.TCPSite(runner, address.host, address.port), runner, address)
        for line in (f"engine: {spec.name} ({spec.reason})", *(f"note: {note}" for note in spec.notes)):
            sys.stderr.write(f"{line}\n")
        # The port answers from here on (/health yes, /ready no): a taken one is noticed before a large model loads.
        return await _until_stopped(arguments, gateway, engine, lambda: _tell(arguments, engine, address, port))
    finally:
        await runner.cleanup()
        await engine.stop()


async def _listen(site: Any, runner: Any, address: _Address) -> int:
    try:
        await site.start()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"{address.host}:{address.port} is taken", "give another --port, or 0 for any") from error
        reason = error.strerror or str(error)
        raise UsageError(f"cannot listen on {address.host}:{address.port}: {reason}", "check --host, --port") from error
    return int(runner.addresses[0][1])


async def _until_stopped(arguments: argparse.Namespace, gateway: Gateway, engine: Supervisor, told: Any) -> int:
    """Run the engine until a signal, then finish what runs; a second signal stops at once."""
    stop, now = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (now if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    running = asyncio.ensure_future(engine.run())
    telling = asyncio.ensure_future(told())
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({running, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        admission = gateway.admission
        sys.stderr.write(f"stopping: {admission.in_flight} requests running, at most {arguments.drain_seconds:g} s\n")
        drain = asyncio.ensure_future(admission.drain(arguments.drain_seconds))
        hurry = asyncio.ensure_future(now.wait())
        await asyncio.wait({drain, hurry}, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not drain.done():
            drain.cancel()
            raise Interrupted(f"stopped at once; {admission.in_flight} requests were dropped")
        sys.stderr.write("stopped\n" if drain.result() else f"stopped; {admission.in_flight} requests were dropped\n")
        return 0
    finally:
        for task in (running, telling, stopped):
            task.cancel()


async def _tell(arguments: argparse.Namespace, engine: Supervisor, address: _Address, port: int) -> None:
    """Say that the server is ready, once it is, and how to ask it."""
    await engine.ready.wait()
    url = f"http://{address.url_host}:{port}/v1"
    name, facts = engine.spec.name, engine.facts
    about = {
        "url": url,
        "model": arguments.model.resolve().name,
        "weights": facts.get("weights"),
        "dtype": facts.get("dtype"),
        "device": facts.get("device"),
        "engine": name,
        "reason": engine.spec.reason,
        "engine_pid": engine.pid,
        "context": facts.get("max_model_len"),
        "api_key": bool(address.keys),
    }
    if arguments.json:
        print(json.dumps(about), flush=True)
        return
    details = [f"{about['weights']} weights, {about['dtype']} on {about['device']}"] if about["weights"] else []
    details += [f"{about['context']} tokens a request"] if about["context"] else []
    details += [f"{arguments.max_running} at once"]
    details += ["an API key is needed" if address.keys else "no API key: only this machine can ask"]
    print(f"ready: {url} serves {about['model']} with {name}; {'; '.join(details)}; chat: {url.removesuffix('v1')}")
    route = engine.spec.routes[0]
    question: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32}
    body = question if route == "/v1/chat/completions" else {"input": "Hello"}
    # The key itself is not repeated: what a terminal shows ends up in logs.
    shown = f"${KEY_VARIABLE}" if os.environ.get(KEY_VARIABLE) else "KEY"
    key = ["-H", f"Authorization: Bearer {shown}"] if address.keys else []
    words = ["curl", f"{url}{route.removeprefix('/v1')}", "-H", "Content-Type: application/json"]
    words += ["-d", json.dumps(body)]
    quoted = [shlex.quote(word) for word in words] + [f'"{word}"' if " " in word else word for word in key]
    print(f"next: {' '.join(quoted)}", flush=True)
