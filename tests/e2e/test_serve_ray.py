"""The Ray Serve application on a real local Ray."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.test_serve import greedy_text
from tests.support.models import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, sys, urllib.request
import ray
from ray import serve
from tools.serving.ray_app import application
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
serve.run(application({"model": sys.argv[1], "engine": "embedded"}))
def ask(stream):
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20, "stream": stream}
    request = urllib.request.Request(f"http://127.0.0.1:{sys.argv[2]}/v1/chat/completions",
        json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=60).read().decode()
print("answers", json.dumps([json.loads(ask(False))["choices"][0]["message"]["content"], ask(True)]))
serve.shutdown()
ray.shutdown()
"""


def test_a_local_ray_serves_the_same_answers(tmp_path: Path) -> None:
    pytest.importorskip("ray.serve", reason="ray[serve] is not installed", exc_type=ImportError)
    model = save_tiny_model(tmp_path / "tiny", seed=0, positions=1024)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(model), str(port)],
        capture_output=True, text=True, timeout=200, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    whole, streamed = json.loads(re.search(r"^answers (.*)$", done.stdout, re.MULTILINE)[1])
    assert whole == greedy_text(model, "Hi", 20)
    events = [line[6:] for line in streamed.splitlines() if line.startswith("data: {")]
    pieces = [choice["delta"].get("content", "") for event in events for choice in json.loads(event)["choices"]]
    assert "".join(pieces) == whole
