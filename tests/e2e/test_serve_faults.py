"""The gateway under attack and with a failing engine: real processes, raw sockets, signals."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import save_tiny_model
from tests.support.served import Server, served
from tests.support.waiting import until

BODY = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", seed=0, positions=4096)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "stderr"


@pytest.fixture(scope="module")
def server(plain: Path, log: Path) -> Iterator[Server]:
    with log.open("w") as stderr, served(plain, stderr=stderr) as running:
        yield running


def raw(server: Server, data: bytes) -> bytes:
    """Send bytes and return the beginning of what comes back."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(data)
        return connection.recv(65536)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b'{"messages": "\xff\xfe"}', "JSON"),
        (b"\x00" * 100, "JSON"),
        (b"[]", "object"),
        (b'"text"', "object"),
        (b'{"messages": []}', "messages"),
        (b'{"messages": [7]}', "messages"),
        (json.dumps({**BODY, "max_tokens": -1}).encode(), "max_tokens"),
        (json.dumps({**BODY, "max_completion_tokens": 1e400}).encode(), "max_completion_tokens"),
        (json.dumps({**BODY, "temperature": -0.5}).encode(), "temperature"),
        (json.dumps({**BODY, "seed": "x"}).encode(), "seed"),
        (json.dumps({**BODY, "stream": "yes"}).encode(), "stream"),
        (json.dumps({**BODY, "stream": True, "stream_options": 3}).encode(), "stream_options"),
        (json.dumps({**BODY, "unheard_of": 1}).encode(), "unheard_of"),
        (json.dumps({**BODY, "logprobs": True}).encode(), "logprobs is not supported by this engine"),
    ],
)
def test_a_bad_request_is_400_with_the_reason(server: Server, content: bytes, word: str) -> None:
    answer = server.post(content)
    assert answer.status == 400
    assert word in answer.json()["error"]["message"]


def test_broken_http_is_refused_and_the_server_goes_on(server: Server) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    huge = raw(server, head + b"X-Big: " + b"a" * 100_000 + b"\r\n\r\n")
    assert b" 400 " in huge
    assert b" 400 " in raw(server, head + b"Content-Length: -5\r\n\r\n")
    assert b" 400 " in raw(server, b"\x16\x03\x01\x00\xa5nonsense\r\n\r\n")
    # A body that ends early, and one that never comes: no answer is owed, nothing is left behind.
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(head + b"Content-Length: 1000\r\n\r\n{")
    assert server.ask("POST", "/v1/chat/completions", b"x" * (10 << 20)).status == 413
    assert server.chat("Hi", max_tokens=2).status == 200
    until_idle(server)


def test_pages_of_other_names_are_kept_out_where_no_key_does(server: Server) -> None:
    assert server.get("/v1/models", Host="evil.example").status == 421
    assert server.get("/v1/models", Host="localhost:1").status == 200


def test_completions_take_text_and_tokens(server: Server) -> None:
    client = server.client()
    text = client.completions.create(model="tiny", prompt="Hello", max_tokens=8)
    tokens = client.completions.create(model="tiny", prompt=_ids("Hello"), max_tokens=8)
    parts = client.completions.create(model="tiny", prompt="Hello", max_tokens=8, stream=True)
    streamed = "".join(part.choices[0].text for part in parts if part.choices)
    assert text.object == "text_completion"
    assert text.choices[0].text == tokens.choices[0].text == streamed
    assert text.usage.completion_tokens == 8
    assert server.ask("POST", "/v1/completions", b'{"prompt": [999999]}').status == 400
    assert "this model has no /v1/embeddings" in server.ask("POST", "/v1/embeddings", b"{}").json()["error"]["message"]


def _ids(text: str) -> list[int]:
    from tests.support.models import tiny_tokenizer

    return [int(token) for token in tiny_tokenizer()(text)["input_ids"]]


def test_usage_of_a_stream_is_counted_but_shown_only_when_asked(server: Server, log: Path) -> None:
    plain = server.chat("secret words", stream=True, max_tokens=5)
    asked = server.chat("Hi", stream=True, max_tokens=5, stream_options={"include_usage": True})
    assert b'"usage"' not in plain.body
    assert plain.body.endswith(b"data: [DONE]\n\n")
    assert b'"completion_tokens": 5' in asked.body
    # A request is logged after its last byte was sent.
    until(lambda: [line.get("completion_tokens") for line in logged(log)[-2:]] == [5, 5], "both are logged")
    assert "secret" not in log.read_text()
    metrics = server.get("/metrics").body.decode()
    assert 'steadfast_requests_total{route="/v1/chat/completions",status="200"}' in metrics


def test_a_client_that_leaves_in_mid_stream_frees_its_place(server: Server) -> None:
    connection = server.connect()
    body = json.dumps({**BODY, "max_tokens": 1000, "stream": True})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.read(50)
    assert b"steadfast_in_flight 1.0" in server.get("/metrics").body
    answer.close()
    connection.close()
    until_idle(server)


def until_idle(server: Server) -> None:
    until(lambda: b"steadfast_in_flight 0.0" in server.get("/metrics").body, "nothing in flight")


def logged(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]


def test_a_killed_engine_is_503_until_it_is_back_and_answers_the_same(server: Server) -> None:
    expected = server.chat("Hi", max_tokens=20).json()["choices"]
    results: list[bytes] = []
    thread = threading.Thread(target=lambda: results.append(server.chat("Hi", max_tokens=1000, stream=True).body))
    thread.start()
    while b"steadfast_in_flight 1.0" not in server.get("/metrics").body:
        time.sleep(0.01)
    time.sleep(0.05)
    os.kill(server.about["engine_pid"], signal.SIGKILL)
    thread.join()
    # The stream had begun: it ends with an error event and not as if it were complete.
    assert b'"engine_failed"' in results[0]
    assert b"[DONE]" not in results[0]
    down = server.wait_until("/ready", 503)
    assert down.json() == {"status": "starting"}
    refused = server.chat("Hi")
    assert refused.status == 503
    assert int(refused.headers["Retry-After"]) > 0
    assert server.get("/health").status == 200
    server.wait_until("/ready", 200)
    assert server.chat("Hi", max_tokens=20).json()["choices"] == expected
    assert b"steadfast_engine_restarts_total 1.0" in server.get("/metrics").body


def test_the_engine_dies_with_a_killed_gateway(server: Server) -> None:
    """The last test of this file: the server it shares is gone afterwards."""
    engine = _child_of(server.process.pid)
    server.process.kill()
    server.process.wait()
    deadline = time.monotonic() + 10
    while (words := Path(f"/proc/{engine}/cmdline")).is_file() and words.read_bytes():  # a zombie has none
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises((OSError, http.client.HTTPException)):
        server.get("/health")


def _child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
