"""Which engine serves a model on this machine, and how its process is started.

An engine is a process with an OpenAI-compatible server on loopback. To the gateway it is an `EngineSpec` and nothing
more: a command line, how to see that it lives, and requests that it must answer before it gets traffic.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tools.serving.heads import head_of
from trainer.checkout import ROOT
from trainer.config.arguments import TRUST_REMOTE_CODE
from trainer.errors import UsageError

CHECK_TOKENS = 4


@dataclass(frozen=True)
class Machine:
    """What decides between engines."""

    gpu: bool
    cpu_flags: frozenset[str]
    modules: Callable[[str], bool]
    """Whether a Python module of that name is installed."""
    programs: Callable[[str], str | None]
    """The path of a program, if there is one."""


@dataclass(frozen=True)
class Wanted:
    """What is to be served, and the bounds an engine has to know."""

    model: Path
    name: str
    max_running: int
    max_new_tokens: int
    context: int | None
    trusted_code: str | None = None
    """Revision of the model's own code that may run (`trainer.model.remote_code`)."""


@dataclass(frozen=True)
class EngineSpec:
    """One engine, ready to be started."""

    name: str
    reason: str
    command: Callable[[int, str], list[str]]
    """The words of its command line, from port and key."""
    key_variables: tuple[str, ...]
    """Environment variables in which it finds its key."""
    checks: tuple[tuple[str, dict[str, Any]], ...]
    """Requests (path, body) of which one must succeed before traffic."""
    routes: tuple[str, ...]
    health: str = "/health"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Put into requests that lack these fields, where the engine's own defaults are others than ours."""
    notes: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    start_seconds: float = 900.0


GENERATE = ("/v1/chat/completions", "/v1/completions")
INSTALL = {
    "llamacpp": "pip install 'llama-cpp-python[server]', or put llama-server on PATH",
    "openvino": "put ovms, the OpenVINO model server, on PATH",
    "vllm": "pip install vllm in an environment of its own, and put its program vllm on PATH",
    "sglang": "pip install sglang beside Steadfast",
}


def this_machine() -> Machine:
    """What this machine has; starts nothing and imports no library."""
    gpu = any(Path(f"/dev/{name}").exists() for name in ("nvidia0", "kfd"))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return Machine(gpu, frozenset(flags), lambda name: find_spec(name) is not None, shutil.which)


def choose_engine(engine: str, wanted: Wanted, machine: Machine) -> EngineSpec:
    """The engine for a model; `engine` is `auto` or a name. UsageError when it cannot serve here, with the reason."""
    gguf = wanted.model.suffix == ".gguf"
    if engine == "auto":
        engine, reason = _best(wanted, machine, gguf=gguf)
    else:
        reason = "as asked with --engine"
    if gguf and engine != "llamacpp":
        raise UsageError(f"{engine} does not read GGUF", "leave --engine out, or give --engine llamacpp")
    if engine == "llamacpp" and not gguf:
        raise UsageError(f"{wanted.model} is not a GGUF file, which llama.cpp needs", "quantize it to GGUF first")
    if engine != "embedded":
        _refuse_heads(engine, wanted)
        if wanted.trusted_code is not None:
            # They would import whatever lies there by the time they load it.
            raise UsageError(f"{engine} cannot be bound to one revision of a model's code", "give --engine embedded")
    _refuse_hardware(engine, wanted.model, machine)
    return {
        "embedded": _embedded,
        "llamacpp": _llamacpp,
        "openvino": _openvino,
        "vllm": _vllm,
        "sglang": _sglang,
    }[engine](wanted, reason, machine)


def _best(wanted: Wanted, machine: Machine, *, gguf: bool) -> tuple[str, str]:
    if gguf:
        return "llamacpp", "a GGUF file"
    if (wanted.model / "quantization.json").is_file():
        return "embedded", "int8 of steadfast quantize, which only the embedded engine reads"
    if head_of(wanted.model):
        return "embedded", "a model with a head, which is batched here"
    if wanted.trusted_code is not None:
        return "embedded", "a model with code of its own, which is pinned here"
    if machine.gpu:
        for name in ("vllm", "sglang"):
            if _command_of(name, machine):
                return name, f"a GPU and {name} installed"
        return "embedded", f"a GPU, but neither vLLM nor SGLang; for many times the speed: {INSTALL['vllm']}"
    return "embedded", "no GPU; transformers continuous batching needs nothing else"


def _refuse_heads(engine: str, wanted: Wanted) -> None:
    if head_of(wanted.model):
        raise UsageError(f"{engine} is not used for classifiers and embeddings here", "give --engine embedded")


def _refuse_hardware(engine: str, model: Path, machine: Machine) -> None:
    """UsageError for weights that this machine's engine would load and then fail on at the first token."""
    if (model / "quantization.json").is_file() and engine != "embedded":
        raise UsageError(f"{engine} does not read int8 of steadfast quantize", "give --engine embedded")
    try:
        config = json.loads((model / "config.json").read_bytes()).get("quantization_config") or {}
    except (OSError, ValueError, AttributeError):
        return
    groups = (config.get("config_groups") or {}).values() if isinstance(config, dict) else ()
    bits = {(group.get("weights") or {}).get("num_bits") for group in groups if isinstance(group, dict)}
    if 4 in bits and not machine.gpu and "avx512f" not in machine.cpu_flags:
        raise UsageError(
            f"{model} has 4-bit weights, whose CPU kernels need AVX512, and this CPU has none",
            "serve int8 or GGUF here",
        )
    if engine in ("vllm", "sglang") and not machine.gpu and "avx2" not in machine.cpu_flags:
        raise UsageError(f"{engine} needs a GPU or a CPU with AVX2", "give --engine embedded")


def _command_of(name: str, machine: Machine) -> list[str] | None:
    """How to start vLLM or SGLang, or None where they are not installed.

    The program `vllm` comes first: it may belong to an environment of its own, as its pinned versions ask for.
    """
    if name == "vllm" and (program := machine.programs("vllm")):
        return [program, "serve"]
    module = {"vllm": "vllm.entrypoints.openai.api_server", "sglang": "sglang.launch_server"}[name]
    return [sys.executable, "-m", module] if machine.modules(name) else None


def _missing(name: str) -> UsageError:
    return UsageError(f"the engine {name} is not installed", INSTALL[name])


def _chat_checks(wanted: Wanted) -> tuple[tuple[str, dict[str, Any]], ...]:
    common = {"model": wanted.name, "max_tokens": CHECK_TOKENS, "temperature": 0}
    return (
        ("/v1/chat/completions", {**common, "messages": [{"role": "user", "content": "Hello"}]}),
        # A template may demand a system message, a base model has none: the engine is what is checked.
        ("/v1/completions", {**common, "prompt": "Hello"}),
    )


def _defaults(wanted: Wanted) -> dict[str, Any]:
    """What an engine that is not ours would choose otherwise: most sample when a request gives no temperature."""
    return {"max_tokens": wanted.max_new_tokens, **_sampling_of(wanted.model)}


def _sampling_of(model: Path) -> dict[str, Any]:
    """As the generation_config.json in a model's directory, or beside a GGUF file, asks; greedy where it does not."""
    directory = model.parent if model.suffix == ".gguf" else model
    try:
        asked = json.loads((directory / "generation_config.json").read_bytes())
    except (OSError, ValueError):
        asked = {}
    if not (isinstance(asked, dict) and asked.get("do_sample")):
        return {"temperature": 0}
    return {name: asked[name] if asked.get(name) is not None else 1.0 for name in ("temperature", "top_p")}


def _embedded(wanted: Wanted, reason: str, machine: Machine) -> EngineSpec:
    head = head_of(wanted.model)
    extra = [] if wanted.context is None else ["--context", str(wanted.context)]
    if wanted.trusted_code is not None:
        extra += [TRUST_REMOTE_CODE, wanted.trusted_code]

    def command(port: int, key: str) -> list[str]:
        return [
            *(sys.executable, "-m", "tools.serving.embedded", str(wanted.model), "--port", str(port)),
            *("--max-running", str(wanted.max_running), "--max-new-tokens", str(wanted.max_new_tokens), *extra),
        ]

    return EngineSpec(
        name="embedded",
        reason=reason,
        command=command,
        key_variables=("STEADFAST_ENGINE_KEY",),
        checks=((f"/v1/{head}", {"model": wanted.name, "input": "Hello"}),) if head else _chat_checks(wanted),
        routes=(f"/v1/{head}",) if head else GENERATE,
    )


def _llamacpp(wanted: Wanted, reason: str, machine: Machine) -> EngineSpec:
    context = wanted.context or 4096
    if native := machine.programs("llama-server"):

        def command(port: int, key: str) -> list[str]:
            return [
                *(native, "-m", str(wanted.model), "--alias", wanted.name, "--host", "127.0.0.1", "--port", str(port)),
                # llama-server divides its context among the slots.
                *("--parallel", str(wanted.max_running), "--ctx-size", str(context * wanted.max_running)),
                *("--n-predict", str(wanted.max_new_tokens), "--no-webui"),
            ]

        return EngineSpec(
            "llamacpp", f"{reason}; {native}", command, ("LLAMA_API_KEY",), _chat_checks(wanted), GENERATE,
            defaults=_defaults(wanted),
        )  # fmt: skip
    if not (machine.modules("llama_cpp") and machine.modules("uvicorn")):
        raise _missing("llamacpp")

    def serial(port: int, key: str) -> list[str]:
        return [
            *(sys.executable, "-m", "llama_cpp.server", "--model", str(wanted.model), "--model_alias", wanted.name),
            *("--host", "127.0.0.1", "--port", str(port), "--n_ctx", str(context), "--interrupt_requests", "false"),
        ]

    # Its server punishes repetition when it is not told otherwise: greedy answers would not be the model's.
    return EngineSpec(
        "llamacpp", f"{reason}; llama-cpp-python, as no llama-server is on PATH", serial, ("API_KEY",),
        _chat_checks(wanted), GENERATE, health="/v1/models", defaults={**_defaults(wanted), "repeat_penalty": 1.0},
        notes=("llama-cpp-python answers one request at a time; llama-server on PATH answers many",),
    )  # fmt: skip


def _openvino(wanted: Wanted, reason: str, machine: Machine) -> EngineSpec:
    program = machine.programs("ovms")
    if program is None:
        raise _missing("openvino")
    if not (wanted.model / "openvino_model.xml").is_file():
        raise UsageError(
            f"{wanted.model} holds no OpenVINO model", "optimum-cli export openvino --model MODEL OUT makes one"
        )

    def command(port: int, key: str) -> list[str]:
        return [
            *(program, "--rest_port", str(port), "--rest_bind_address", "127.0.0.1"),
            *("--model_path", str(wanted.model), "--model_name", wanted.name, "--task", "text_generation"),
            *("--max_num_seqs", str(wanted.max_running)),
        ]

    return EngineSpec(
        "openvino", f"{reason}; {program}", command, ("API_KEY",), _chat_checks(wanted), GENERATE,
        health="/v2/health/live", defaults=_defaults(wanted),
    )  # fmt: skip


def _vllm(wanted: Wanted, reason: str, machine: Machine) -> EngineSpec:
    start = _command_of("vllm", machine)
    if start is None:
        raise _missing("vllm")
    # `vllm serve` takes the model as a word, its module as an option.
    model = [str(wanted.model)] if start[-1] == "serve" else ["--model", str(wanted.model)]
    extra = [] if wanted.context is None else ["--max-model-len", str(wanted.context)]

    def command(port: int, key: str) -> list[str]:
        return [
            *(*start, *model, "--served-model-name", wanted.name, "--host", "127.0.0.1"),
            *("--port", str(port), "--max-num-seqs", str(wanted.max_running), *extra),
            *("--override-generation-config", json.dumps({"max_new_tokens": wanted.max_new_tokens})),
        ]

    return EngineSpec(
        "vllm", reason, command, ("VLLM_API_KEY",), _chat_checks(wanted), GENERATE, defaults=_sampling_of(wanted.model),
        environment={"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
    )  # fmt: skip


def _sglang(wanted: Wanted, reason: str, machine: Machine) -> EngineSpec:
    start = _command_of("sglang", machine)
    if start is None:
        raise _missing("sglang")
    extra = [] if wanted.context is None else ["--context-length", str(wanted.context)]

    def command(port: int, key: str) -> list[str]:
        return [
            *(*start, "--model-path", str(wanted.model), "--served-model-name", wanted.name, "--host", "127.0.0.1"),
            *("--port", str(port), "--max-running-requests", str(wanted.max_running), "--api-key", key, *extra),
        ]

    return EngineSpec(
        "sglang", reason, command, (), _chat_checks(wanted), GENERATE, defaults=_defaults(wanted),
        environment={"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def environment_of(spec: EngineSpec, key: str) -> dict[str, str]:
    """The environment of an engine's process: ours, without the keys of our clients."""
    ours = {name: value for name, value in os.environ.items() if name != "STEADFAST_API_KEY"}
    path = os.pathsep.join(filter(None, (str(ROOT), ours.get("PYTHONPATH"))))
    return {**ours, **spec.environment, **dict.fromkeys(spec.key_variables, key), "PYTHONPATH": path}
