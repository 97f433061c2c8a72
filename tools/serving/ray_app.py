"""The gateway on a Ray cluster: each replica is `steadfast serve` on loopback, Ray Serve sends requests to it.

    serve deploy serve.yaml            with, in serve.yaml:

    applications:
      - name: chat
        route_prefix: /
        import_path: tools.serving.ray_app:application
        args: {model: /shared/out/model, engine: auto, options: [--max-running, "32"], num_replicas: 2, num_gpus: 1}

Needs `pip install 'ray[serve]'` and this checkout as the working directory. API keys: STEADFAST_API_KEY, or a key file
in `options`, the same on all replicas. Ray's HTTP proxy listens on loopback unless told otherwise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
from ray import serve
from starlette.requests import Request
from starlette.responses import StreamingResponse

ROOT = Path(__file__).resolve().parents[2]
PASSED_ON = ("authorization", "content-type")


class Replica:
    """One gateway and its engine, in processes of their own that end with the replica."""

    def __init__(self, model: str, engine: str, options: list[str]) -> None:
        words = [sys.executable, "-m", "tools.serving.leash", str(os.getpid()), sys.executable]
        words += [str(ROOT / "steadfast.py"), "serve", model, "--engine", engine, "--port", "0", "--json", *options]
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise RuntimeError(f"steadfast serve ended with code {self._process.wait()}; its reason is in this log")
        self._url = str(json.loads(line)["url"]).removesuffix("/v1")

    async def __call__(self, request: Request) -> StreamingResponse:
        """Pass a request on and its answer back, as it comes."""
        session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
        headers = {name: value for name, value in request.headers.items() if name in PASSED_ON}
        try:
            answer = await session.request(
                request.method, self._url + request.url.path, data=await request.body(), headers=headers
            )
        except BaseException:
            await session.close()
            raise

        async def content() -> AsyncIterator[bytes]:
            async with session, answer:
                async for part in answer.content.iter_any():
                    yield part

        kept = {name: answer.headers[name] for name in ("Content-Type", "Retry-After") if name in answer.headers}
        return StreamingResponse(content(), status_code=answer.status, headers=kept)

    async def check_health(self) -> None:
        """Ray replaces a replica whose gateway has ended; an engine that crashed is the gateway's to restart."""
        if self._process.poll() is not None:
            raise RuntimeError(f"steadfast serve ended with code {self._process.returncode}")

    def __del__(self) -> None:
        """Let running requests finish."""
        if hasattr(self, "_process"):
            self._process.terminate()


def application(args: dict[str, Any]) -> serve.Application:
    """The Ray Serve application; `args` as shown above, all but `model` optional."""
    deployment = serve.deployment(
        num_replicas=args.get("num_replicas", 1),
        max_ongoing_requests=args.get("max_ongoing_requests", 80),
        ray_actor_options={"num_cpus": args.get("num_cpus", 1), "num_gpus": args.get("num_gpus", 0)},
        graceful_shutdown_timeout_s=60,
    )(Replica)
    return deployment.bind(args["model"], args.get("engine", "auto"), list(args.get("options", [])))
