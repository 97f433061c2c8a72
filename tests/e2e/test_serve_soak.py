"""A minute of good, bad and rude clients at once: `make soak`, or pytest -m soak tests/e2e/test_serve_soak.py -s."""

from __future__ import annotations

import http.client
import json
import random
import signal
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.e2e.test_serve import greedy_text
from tests.support.models import save_tiny_model
from tests.support.served import Server, served

SECONDS = 60
WARM_SECONDS = 15
NEW_TOKENS = 40
MOST_GROWTH_MB = 30
TEXTS = ["Hi", "你好", "count " * 20, "x", "one two three", "zzz", "y" * 90, "end"]
MALFORMED = [
    b"", b"{", b"\xff\xfe", b"[" * 50_000, b'{"messages": 1}', b'{"messages": [{"role": "user"}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": -3}',
    b'{"messages": [{"role": "user", "content": "x"}], "n": 4}',
]  # fmt: skip


class Soak:
    """What all clients saw together."""

    def __init__(self, server: Server, expected: dict[str, str]) -> None:
        self.server = server
        self.expected = expected
        self.over = threading.Event()
        self.statuses: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.lost: list[str] = []
        self.lock = threading.Lock()

    def saw(self, kind: str, status: int) -> None:
        with self.lock:
            self.statuses[f"{kind} {status}"] += 1

    def compare(self, text: str, answer: str) -> None:
        if answer != self.expected[text]:
            self.wrong.append(f"{text[:10]!r}: {answer[:60]!r}")

    def good(self, seed: int) -> None:
        """Whole and streamed answers, all compared; asks on until the server refuses."""
        choose = random.Random(seed)
        while not self.over.is_set():
            text, stream = choose.choice(TEXTS), choose.random() < 0.5
            try:
                connection = self.server.connect()
                connection.connect()
            except ConnectionError:
                return  # the server has ended
            body = {"messages": [{"role": "user", "content": text}], "max_tokens": NEW_TOKENS, "stream": stream}
            try:
                connection.request("POST", "/v1/chat/completions", json.dumps(body), JSON)
                reply = connection.getresponse()
                data = reply.read()
            except (ConnectionError, http.client.HTTPException) as error:
                self.lost.append(f"{type(error).__name__} {error}")
                continue
            finally:
                connection.close()
            self.saw("good", reply.status)
            if reply.status == 200:
                self.compare(text, _streamed(data) if stream else _whole(data))
            elif reply.status in (429, 503):
                time.sleep(0.2)
            else:
                self.wrong.append(f"{reply.status} {data[:100]!r}")

    def aborting(self, seed: int) -> None:
        """Leaves after a few bytes."""
        choose = random.Random(seed)
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 500, "stream": True}
        while not self.over.is_set():
            connection = self.server.connect()
            connection.request("POST", "/v1/chat/completions", json.dumps(body), JSON)
            if choose.random() < 0.7:
                reply = connection.getresponse()
                self.saw("aborting", reply.status)
                reply.read(choose.randrange(1, 2000))
                reply.close()
            connection.close()
            time.sleep(choose.random() / 10)

    def slow(self, seed: int) -> None:
        """Sends and reads a few bytes at a time, and is answered rightly all the same."""
        choose = random.Random(seed)
        while not self.over.is_set():
            text = choose.choice(TEXTS)
            body = json.dumps(
                {"messages": [{"role": "user", "content": text}], "max_tokens": NEW_TOKENS, "stream": True}
            ).encode()
            head = f"POST /v1/chat/completions HTTP/1.0\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            data = head.encode() + b"Content-Type: application/json\r\n\r\n" + body
            with socket.create_connection(("127.0.0.1", self.server.port), timeout=60) as connection:
                for start in range(0, len(data), 40):
                    connection.sendall(data[start : start + 40])
                    time.sleep(0.02)
                received = b""
                while part := connection.recv(200):
                    received += part
                    time.sleep(0.01)
            head_lines, _, content = received.partition(b"\r\n\r\n")
            status = int(head_lines.split()[1])
            self.saw("slow", status)
            if status == 200:
                self.compare(text, _streamed(content))

    def malformed(self, seed: int) -> None:
        choose = random.Random(seed)
        while not self.over.is_set():
            self.saw("malformed", self.server.post(choose.choice(MALFORMED)).status)
            time.sleep(0.05)

    def large(self, seed: int) -> None:
        content = b'{"messages": "' + b"x" * (10 << 20) + b'"}'
        while not self.over.is_set():
            try:
                self.saw("large", self.server.post(content).status)
            except ConnectionError:
                self.saw("large", 0)  # it may close before the whole body is sent
            time.sleep(0.1)


JSON = {"Content-Type": "application/json"}


def _whole(data: bytes) -> str:
    return str(json.loads(data)["choices"][0]["message"]["content"])


def _streamed(data: bytes) -> str:
    events = [line[6:] for line in data.decode().splitlines() if line.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        return f"<a stream without its end: {events[-1:]}>"
    pieces = (json.loads(event)["choices"] for event in events[:-1])
    return "".join(choice["delta"].get("content", "") for choices in pieces for choice in choices)


def _megabytes(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_minute_of_good_bad_and_rude_clients(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "tiny", seed=0, positions=4096)
    expected = {text: greedy_text(model, text, NEW_TOKENS) for text in TEXTS}
    log = tmp_path / "stderr"
    with log.open("w") as stderr, served(model, "--max-running", "8", "--max-waiting", "32", stderr=stderr) as server:
        soak = Soak(server, expected)
        good = [threading.Thread(target=soak.good, args=(seed,)) for seed in range(6)]
        rude_ones = (soak.aborting, soak.aborting, soak.slow, soak.slow, soak.malformed, soak.large)
        rude = [threading.Thread(target=client, args=(seed,)) for seed, client in enumerate(rude_ones)]
        for thread in (*good, *rude):
            thread.start()
        pids = {"gateway": server.process.pid, "engine": server.about["engine_pid"]}
        time.sleep(WARM_SECONDS)
        before = {name: _megabytes(pid) for name, pid in pids.items()}
        time.sleep(SECONDS - WARM_SECONDS)
        after = {name: _megabytes(pid) for name, pid in pids.items()}
        soak.over.set()
        for thread in rude:
            thread.join()
        for thread in good:
            thread.join()
        # Only good clients now, all of them asking when the signal comes.
        soak.over.clear()
        last = [threading.Thread(target=soak.good, args=(seed,)) for seed in range(100, 108)]
        for thread in last:
            thread.start()
        time.sleep(1.0)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        soak.over.set()
        for thread in last:
            thread.join()
        print(f"\nanswers: {dict(sorted(soak.statuses.items()))}")
        print(f"memory MB after {WARM_SECONDS} s: {before}, after {SECONDS} s: {after}")
        print(f"wrong: {len(soak.wrong)}, lost: {len(soak.lost)}; {log.read_text().splitlines()[-2:]}")
        codes = {int(name.split()[1]) for name in soak.statuses}
        assert not soak.wrong, soak.wrong[:5]
        assert not soak.lost, soak.lost[:5]
        assert codes <= {0, 200, 400, 413, 429, 503}
        assert soak.statuses["good 200"] > 50
        for name in pids:
            assert after[name] - before[name] < MOST_GROWTH_MB, (name, before, after)
