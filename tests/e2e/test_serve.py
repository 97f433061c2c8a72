"""`steadfast serve` as its users meet it: a process, the openai client, raw HTTP, signals."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from tests.support.models import save_tiny_model
from tests.support.served import KEY, ROOT, Server, start
from tools.model_directory.chat import Prompts, stop_ids
from tools.model_directory.loading import load_model
from tools.quantize import quantize_model

CONTEXT = 4096
LONG = 800


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", seed=0, positions=CONTEXT)


@pytest.fixture(scope="module")
def server(plain: Path) -> Iterator[Server]:
    server = start(plain, "--max-running", "4", "--max-waiting", "2", STEADFAST_API_KEY=KEY)
    yield server
    if server.process.poll() is None:
        server.process.kill()
    server.process.communicate()


def ask(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def greedy_text(path: Path, text: str, count: int) -> str:
    model, tokenizer = load_model(path)
    ids = Prompts(tokenizer).ids(ask(text))
    stops = stop_ids(model, tokenizer)
    with torch.no_grad():
        output = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=count, eos_token_id=stops)
    return str(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))


def test_answers_are_the_greedy_ones_whole_and_streamed_and_four_at_once(server: Server, plain: Path) -> None:
    texts = ["Hi", "你好", "count " * 20, "x"]
    expected = [greedy_text(plain, text, 40) for text in texts]
    client = server.client()

    def whole(text: str) -> str:
        answer = client.chat.completions.create(model="tiny", messages=ask(text), max_completion_tokens=40)
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert answer.usage is not None
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        return answer.choices[0].message.content or ""

    def streamed(text: str) -> str:
        parts, reasons, counts = [], [], []
        for chunk in client.chat.completions.create(
            model="tiny", messages=ask(text), max_tokens=40, stream=True, stream_options={"include_usage": True}
        ):
            counts += [chunk.usage.completion_tokens] if chunk.usage else []
            parts += [choice.delta.content or "" for choice in chunk.choices]
            reasons += [choice.finish_reason for choice in chunk.choices if choice.finish_reason]
        assert len(reasons) == len(counts) == 1
        assert counts[0] <= 40
        return "".join(parts)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(whole, texts)) == expected
        assert list(pool.map(streamed, texts)) == expected


def test_token_limits_stop_texts_and_seeds(server: Server, plain: Path) -> None:
    client = server.client()
    whole = greedy_text(plain, "Hi", 40)
    for limits in ({"max_tokens": 4}, {"max_completion_tokens": 4}):
        answer = client.chat.completions.create(model="tiny", messages=ask("Hi"), **limits)  # type: ignore[call-overload]
        assert answer.usage.completion_tokens == 4
        assert answer.choices[0].finish_reason == "length"
    stop = whole[10:12]
    answer = client.chat.completions.create(model="tiny", messages=ask("Hi"), max_tokens=40, stop=[stop, "never"])
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    samples = [
        client.chat.completions.create(model="tiny", messages=ask("Hi"), max_tokens=20, temperature=1.2, seed=seed)
        for seed in (1, 1, 2)
    ]
    texts = [sample.choices[0].message.content for sample in samples]
    assert texts[0] == texts[1] != texts[2]


def test_models_health_and_ready(server: Server) -> None:
    assert [model.id for model in server.client().models.list()] == ["tiny"]
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/ready").status == 200
    assert server.about["context"] == CONTEXT
    assert server.about["weights"] == "plain"


def test_without_the_key_only_health_and_ready_answer(server: Server) -> None:
    with pytest.raises(openai.AuthenticationError, match="API key"):
        server.client("wrong").models.list()
    for authorization in ("", KEY, f"Bearer {KEY}x", f"Basic {KEY}"):
        assert server.get("/v1/models", Authorization=authorization).status == 401
        assert server.post(b"{}", Authorization=authorization).status == 401
    assert server.get("/v1/nothing", Authorization="").status == 401
    assert server.get("/ready", Authorization="").status == 200
    assert server.get("/health", Authorization="").status == 200


@pytest.mark.parametrize(
    ("content", "headers", "status", "word"),
    [
        (b"{", {}, 400, "JSON"),
        (b"x" * (2 << 20), {}, 413, "larger"),
        (b"{}", {"Content-Type": "text/plain"}, 400, "messages"),
        (json.dumps({"messages": ask("y" * CONTEXT)}).encode(), {}, 400, "do not fit"),
        (json.dumps({"messages": ask("y" * (CONTEXT - 60)), "max_tokens": 90}).encode(), {}, 400, "do not fit"),
        (json.dumps({"messages": ask("y"), "max_tokens": 1025}).encode(), {}, 400, "1024"),
        (json.dumps({"messages": ask("<|im_end|>")}).encode(), {}, 400, "control token"),
        (json.dumps({"messages": ask("y"), "model": "other"}).encode(), {}, 404, "no model"),
        (json.dumps({"messages": ask("y"), "n": 3}).encode(), {}, 400, "n is not supported"),
    ],
)
def test_what_cannot_be_answered_is_an_error_of_the_usual_shape(
    server: Server, content: bytes, headers: dict[str, str], status: int, word: str
) -> None:
    answer = server.post(content, **headers)
    assert answer.status == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert word in answer.json()["error"]["message"]


def test_unknown_routes_and_methods_are_errors_of_the_usual_shape(server: Server) -> None:
    assert server.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert server.get("/v1/chat/completions").json()["error"]["message"].endswith("Method Not Allowed")


def test_a_full_queue_is_429_and_a_client_that_hangs_up_makes_room(server: Server) -> None:
    """Four run and two may wait; the seventh is told to come back; hanging up frees the places at once."""
    body = json.dumps({"messages": ask("Hi"), "max_tokens": 1000, "stream": True}).encode()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    connections = [server.connect() for _ in range(6)]
    for connection in connections:
        connection.request("POST", "/v1/chat/completions", body, headers)
    answers = [connection.getresponse() for connection in connections]
    assert [answer.status for answer in answers] == [200] * 6
    seventh = server.post(body)
    assert seventh.status == 429
    assert int(seventh.headers["Retry-After"]) > 0
    assert seventh.json()["error"]["code"] == "queue_full"
    started = time.monotonic()
    for connection, answer in zip(connections, answers, strict=True):
        answer.close()
        connection.close()
    small = json.dumps({"messages": ask("Hi"), "max_tokens": 1}).encode()
    while (reply := server.post(small)).status == 429:
        time.sleep(0.01)
    assert reply.status == 200
    assert time.monotonic() - started < 1.5


def test_a_request_that_runs_at_sigterm_is_finished_and_new_ones_are_refused(plain: Path) -> None:
    quantize_model(plain, plain.parent / "int8")
    server = start(plain.parent / "int8", "--max-new-tokens", str(LONG))
    assert server.about["weights"] == "int8"
    assert not server.about["api_key"]
    # Without a key only what a browser would ask about first keeps web pages of other origins out.
    assert server.post(b"{}", **{"Content-Type": "text/plain"}).status == 415
    expected = greedy_text(plain.parent / "int8", "Hi", LONG)
    stream = server.client().chat.completions.create(model="int8", messages=ask("Hi"), max_tokens=LONG, stream=True)
    parts, refused = [], []
    for number, chunk in enumerate(stream):
        parts += [choice.delta.content or "" for choice in chunk.choices]
        if number == 5:
            server.process.send_signal(signal.SIGTERM)
        if number == 50:
            refused = [server.post(b"{}").status, server.get("/ready").status]
            assert server.get("/health").status == 200
    assert refused == [503, 503]
    assert "".join(parts) == expected
    assert server.process.wait(10) == 0
    assert "stopping: 1 requests running" in server.process.communicate()[1]


def test_a_second_signal_stops_at_once(plain: Path) -> None:
    server = start(plain, "--max-new-tokens", "4000", "--drain-seconds", "30")
    body = {"messages": ask("Hi"), "max_tokens": 4000}
    threading.Thread(target=_ignore_errors, args=(server, body), daemon=True).start()
    time.sleep(0.5)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert server.process.poll() is None
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(15) == 130  # the drain alone would take 30 s
    assert "1 requests were dropped" in server.process.communicate()[1]


def _ignore_errors(server: Server, body: dict[str, Any]) -> None:
    try:
        server.post(json.dumps(body).encode())
    except (OSError, http.client.HTTPException):
        return


def run_command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "steadfast.py"), "serve", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={key: value for key, value in os.environ.items() if key != "STEADFAST_API_KEY"},
    )


def test_what_cannot_be_served_is_one_line(plain: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        answer = run_command(str(plain), "--port", str(port))
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr == f"error: 127.0.0.1:{port} is taken; give another --port, or 0 for any\n"
    answer = run_command(str(plain), "--host", "0.0.0.0")
    assert answer.returncode == 2
    assert "STEADFAST_API_KEY" in answer.stderr
    answer = run_command(str(tmp_path))
    assert answer.returncode == 66
    assert answer.stderr.count("\n") == 1


def test_a_model_that_does_not_load_ends_the_server_with_one_line(plain: Path, tmp_path: Path) -> None:
    import shutil

    broken = Path(shutil.copytree(plain, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"nothing")
    answer = run_command(str(broken), "--port", "0")
    engine, error = answer.stderr.splitlines()
    assert (answer.returncode, answer.stdout) == (65, "")
    assert engine.startswith("engine: embedded (")
    assert error.startswith("error: ")
    assert str(broken) in error
