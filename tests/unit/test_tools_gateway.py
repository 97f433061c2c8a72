"""Which engine is chosen, keys, the token counts of a stream, and an engine that does not stay up."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.serving.admission import Keys, Limits, read_keys
from tools.serving.engines import EngineSpec, Machine, Wanted, choose_engine
from tools.serving.gateway import Gateway
from tools.serving.supervisor import Patience, Supervisor
from tools.serving.usage_tap import UsageTap
from trainer.errors import DataError, MissingInputError, SteadfastError, UsageError


def machine(*, gpu: bool = False, modules: str = "", programs: str = "", flags: str = "avx2") -> Machine:
    return Machine(
        gpu,
        frozenset(flags.split()),
        lambda name: name in modules.split(),
        lambda name: f"/bin/{name}" if name in programs.split() else None,
    )


def wanted(path: Path, config: dict[str, Any] | None = None) -> Wanted:
    if path.suffix != ".gguf":
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(config or {"architectures": ["LlamaForCausalLM"]}))
    return Wanted(path, path.name, 16, 100, 2048)


def test_the_engine_is_chosen_by_machine_and_model_with_a_reason(tmp_path: Path) -> None:
    model, gguf = wanted(tmp_path / "m"), wanted(tmp_path / "m.gguf")
    cases = [
        (model, machine(), "embedded", "no GPU"),
        (model, machine(gpu=True, modules="vllm sglang"), "vllm", "a GPU and vllm"),
        (model, machine(gpu=True, programs="vllm"), "vllm", "a GPU and vllm"),
        (model, machine(gpu=True, modules="sglang"), "sglang", "a GPU and sglang"),
        (model, machine(gpu=True), "embedded", "pip install vllm"),
        (gguf, machine(programs="llama-server", modules="llama_cpp uvicorn"), "llamacpp", "/bin/llama-server"),
        (gguf, machine(modules="llama_cpp uvicorn"), "llamacpp", "llama-cpp-python"),
    ]
    for what, here, name, reason in cases:
        spec = choose_engine("auto", what, here)
        assert (spec.name, reason in spec.reason) == (name, True), spec
        words = spec.command(1234, "secret-key")
        assert "1234" in words
        assert str(what.model) in words
        assert "secret-key" not in words or name == "sglang"


def test_engines_of_others_are_greedy_unless_the_model_asks_for_sampling(tmp_path: Path) -> None:
    both = machine(programs="llama-server vllm", modules="sglang", gpu=True)
    cases = [
        (wanted(tmp_path / "m"), "vllm", {}),
        (wanted(tmp_path / "m"), "sglang", {"max_tokens": 100}),
        (wanted(tmp_path / "m.gguf"), "llamacpp", {"max_tokens": 100}),
    ]
    asked = {"temperature": 0.6, "top_p": None, "top_k": 20}
    for configured, sampling in (
        (None, {"temperature": 0}),
        (asked, {"temperature": 0}),
        (asked | {"do_sample": True}, {"temperature": 0.6, "top_p": 1.0}),
    ):
        for what, engine, bound in cases:
            directory = tmp_path if what.model.suffix else what.model
            (directory / "generation_config.json").write_text("" if configured is None else json.dumps(configured))
            assert choose_engine(engine, what, both).defaults == bound | sampling
    assert choose_engine("embedded", cases[0][0], both).defaults == {}


def test_defaults_fill_what_a_request_leaves_out(tmp_path: Path) -> None:
    spec = choose_engine("auto", wanted(tmp_path / "m.gguf"), machine(programs="llama-server"))
    gateway = Gateway("m", Supervisor(spec), Limits(100, 16, 64), Keys([]))

    def sent(**fields: Any) -> dict[str, Any]:
        body, _ = gateway._prepare("/v1/completions", json.dumps({"prompt": "a", **fields}).encode())
        return {name: value for name, value in json.loads(body).items() if name not in ("model", "prompt")}

    assert sent() == {"max_tokens": 100, "temperature": 0}
    assert sent(temperature=None) == {"max_tokens": 100, "temperature": 0}
    assert sent(temperature=0.5, max_completion_tokens=7) == {"max_tokens": 7, "temperature": 0.5}


def test_what_cannot_work_is_refused_before_the_start(tmp_path: Path) -> None:
    model, gguf = wanted(tmp_path / "m"), wanted(tmp_path / "m.gguf")
    groups = {"group_0": {"weights": {"num_bits": 4}}}
    small = wanted(tmp_path / "w4", {"quantization_config": {"config_groups": groups}})
    head = wanted(tmp_path / "head", {"architectures": ["LlamaForSequenceClassification"]})
    cases = [
        ("vllm", model, "is not installed; pip install vllm"),
        ("sglang", model, "is not installed; pip install sglang"),
        ("openvino", model, "is not installed; put ovms"),
        ("auto", gguf, "is not installed; pip install 'llama-cpp-python"),
        ("embedded", gguf, "does not read GGUF"),
        ("llamacpp", model, "is not a GGUF file"),
        ("vllm", head, "not used for classifiers"),
        ("auto", small, "AVX512"),
    ]
    for engine, what, word in cases:
        with pytest.raises(UsageError) as refused:
            choose_engine(engine, what, machine())
        assert word in str(refused.value)
        assert "\n" not in str(refused.value)
    assert choose_engine("auto", small, machine(flags="avx2 avx512f")).name == "embedded"
    assert choose_engine("auto", head, machine(gpu=True, modules="vllm")).routes == ("/v1/classify",)


def test_keys_come_from_a_file_a_word_or_a_variable(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst-key\n\n second-key \n")
    assert read_keys("word", file, "variable") == ["first-key", "second-key"]
    assert read_keys("word", None, "variable") == ["word"]
    assert read_keys(None, None, "one,two") == ["one", "two"]
    assert read_keys(None, None, None) == []
    for variable in ("", "one,,two", "ab"):
        with pytest.raises(UsageError):
            read_keys(None, None, variable)
    with pytest.raises(MissingInputError):
        read_keys(None, tmp_path / "none", None)
    keys = Keys(["first-key", "second-key"])
    assert keys.number("Bearer second-key") == 2
    for header in ("", "first-key", "Basic first-key", "Bearer first-key ", "Bearer \udcff", "Bearer first-keyy"):
        assert keys.number(header) is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.booleans(), st.sampled_from(["\n", "\r\n"]))
def test_a_stream_passes_unchanged_however_it_is_cut(sizes: list[int], show: bool, newline: str) -> None:
    pieces = [
        {"choices": [{"delta": {"content": text}}]} for text in ("a", '"usage"', "\u4f60", "data: [DONE]", "x\n\ny")
    ]
    counts = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5}}
    events = [f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in (*pieces, counts)]
    events.append("data: [DONE]\n\n")
    data = "".join(events).replace("\n", newline).encode()
    tap, passed, number = UsageTap(show=show), b"", 0
    while data:
        size = sizes[number % len(sizes)]
        passed += tap.feed(data[:size])
        data, number = data[size:], number + 1
    expected = events if show else [*events[:-2], events[-1]]
    assert passed.decode() == "".join(expected)
    assert tap.usage == counts["usage"]
    assert tap.done
    assert not tap.failed


def engine(script: str) -> EngineSpec:
    """An engine that is a Python script with `PORT` in it."""
    return EngineSpec(
        "other", "", lambda port, key: [sys.executable, "-c", script.replace("PORT", str(port))], (),
        (("/v1/completions", {}),), ("/v1/completions",), start_seconds=20,
    )  # fmt: skip


SERVER = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b'{"data": [{"id": "m"}]}')
    def do_POST(self):
        STATEMENT
    def log_message(self, *words): pass
http.server.HTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
"""
ANSWER = "self.send_response(200); self.end_headers(); self.wfile.write(b'{}')"
FAST = Patience(poll=0.02, watch=0.05, first_wait=0.01, longest_wait=0.02, most_failures=2, stop=2)


def test_an_engine_that_keeps_dying_is_given_up_after_its_bound() -> None:
    """It proves itself each time and then exits: three runs, two restarts, one clear error."""
    restarts = []
    dying = SERVER.replace("STATEMENT", ANSWER + "; self.wfile.flush(); import threading, os; "
                           "threading.Timer(0.2, os._exit, [3]).start()")  # fmt: skip

    async def main() -> None:
        supervisor = Supervisor(engine(dying), FAST, on_restart=lambda: restarts.append(1))
        with pytest.raises(SteadfastError, match="failed 3 times in a row: ended with code 3"):
            await supervisor.run()

    asyncio.run(main())
    assert len(restarts) == 2


def test_an_engine_that_hangs_is_killed_and_counts_as_failed() -> None:
    """It answers until it proved itself, then nothing, SIGTERM included."""
    hangs = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SERVER.replace(
        "STATEMENT", ANSWER + "; Handler.do_GET = lambda self: self.path == '/health' and __import__('time').sleep(100)"
    )
    impatient = Patience(poll=0.02, watch=0.02, missed_health=2, health=0.2, most_failures=0, stop=2)

    async def main() -> None:
        supervisor = Supervisor(engine(hangs), impatient)
        with pytest.raises(SteadfastError, match="no answer from its health route 2 times in a row"):
            await supervisor.run()
        assert supervisor.pid is None

    asyncio.run(main())


def test_health_alone_is_not_enough() -> None:
    """An engine whose first real answer fails gets no traffic, and what it said is in the error."""
    broken = SERVER.replace("STATEMENT", "self.send_error(500, 'no kernel')")

    async def main() -> None:
        supervisor = Supervisor(engine(broken), FAST)
        with pytest.raises(SteadfastError, match="first answer failed: /v1/completions: 500"):
            await supervisor.run()
        assert not supervisor.ready.is_set()
        assert supervisor.pid is None

    asyncio.run(main())


def test_an_engine_that_cannot_start_is_not_tried_again() -> None:
    async def main() -> None:
        supervisor = Supervisor(engine("import sys; sys.exit('no such device')"), FAST)
        with pytest.raises(SteadfastError, match="did not start: ended with code 1: no such device") as failed:
            await supervisor.run()
        assert not isinstance(failed.value, DataError)

    asyncio.run(main())
