"""`steadfast serve` as a process, and raw ways to talk to it."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KEY = "correct horse"


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    about: dict[str, Any]

    @property
    def port(self) -> int:
        return int(self.url.split(":")[2].split("/")[0])

    def client(self, key: str = KEY) -> Any:
        import openai

        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=60)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(self, method: str, path: str, content: bytes | None = None, **headers: str) -> Reply:
        connection = self.connect()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"} | headers
        connection.request(method, path, content, headers)
        answer = connection.getresponse()
        reply = Reply(answer.status, dict(answer.getheaders()), answer.read())
        connection.close()
        return reply

    def get(self, path: str, **headers: str) -> Reply:
        return self.ask("GET", path, **headers)

    def post(self, content: bytes, **headers: str) -> Reply:
        return self.ask("POST", "/v1/chat/completions", content, **headers)

    def chat(self, text: str, **fields: Any) -> Reply:
        return self.post(json.dumps({"messages": [{"role": "user", "content": text}], **fields}).encode())

    def wait_until(self, path: str, status: int, seconds: float = 60) -> Reply:
        """Ask until `path` has `status`."""
        deadline = time.monotonic() + seconds
        while (reply := self.get(path)).status != status:
            assert time.monotonic() < deadline, reply
            time.sleep(0.05)
        return reply


def start(model: Path, *words: str, stderr: Any = subprocess.PIPE, **environment: str) -> Server:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "steadfast.py"), "serve", str(model), "--port", "0", "--json", *words],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        process.kill()
        raise AssertionError(process.communicate()[1])
    about = json.loads(line)
    return Server(process, about["url"], about)


@contextmanager
def served(model: Path, *words: str, stderr: Any = subprocess.PIPE, **environment: str) -> Iterator[Server]:
    """A server for a `with` block."""
    server = start(model, *words, stderr=stderr, **environment)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.terminate()
        server.process.communicate()
