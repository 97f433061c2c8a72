"""Serving: what the gateway costs, and what answering together gains over one by one.

Engine and gateway take turns under the same load, round by round; both run the embedded engine on the same model, a
Llama of random weights. A busy machine moves tokens a second by more than a gateway costs, so CPU seconds are told
too: what the gateway process spent beside its engine, for the same answers. `generate` is transformers' own, one
request after another in a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tools.benchmarks import load
from tools.benchmarks.measure import ENVIRONMENT, Contender, Facts, Line, Say, run_rounds
from tools.serving.engines import Wanted, choose_engine, this_machine
from tools.serving.supervisor import Supervisor
from trainer.checkout import ROOT

SECTION = "serve"
UNIT = "tokens/s"
CLIENTS = (1, 16)
MAX_RUNNING = 16
GATEWAY_GOAL = 0.95
TOGETHER_GOAL = 3.0


def run(work: Path, rounds: int, seed: int, say: Say, *, quick: bool) -> list[Line]:
    """The report's lines; `quick` takes a tiny model and few tokens."""
    # The engine inherits this environment: one thread, so that figures are per core.
    os.environ |= ENVIRONMENT
    model = work / "served"
    hidden, layers, new_tokens, requests = (32, 2, 8, {1: 2, 16: 16}) if quick else (384, 8, 64, {1: 3, 16: 32})
    _make_model(model, hidden, layers, seed)
    prompts = {
        clients: [f"Tell me about number {index}." for index in range(count)] for clients, count in requests.items()
    }
    measured = asyncio.run(_both(model, prompts, new_tokens, rounds, say))
    lines = [line for clients in CLIENTS for line in _gateway_lines(measured, clients)]
    arguments = {"model": str(model), "prompts": prompts[16], "new_tokens": new_tokens}
    alone = Contender("generate, one by one", "tools.benchmarks.serving:one_by_one", arguments)
    outcome = run_rounds([alone], max(1, rounds // 2), lambda text: say(f"{SECTION}: {text}"))[0]
    if outcome.facts is None:
        return [*lines, Line(SECTION, alone.name, None, UNIT, note=outcome.why_not)]
    speed = float(outcome.facts["tokens"]) / float(outcome.facts["cpu"])
    together = statistics.median(seen.tokens / seen.engine_cpu for seen in measured["engine", 16])
    note = "engine alone, 16 clients, to this"
    return [*lines, Line(SECTION, alone.name, speed, "tokens/CPU s", together / speed, TOGETHER_GOAL, note=note)]


@dataclass(frozen=True)
class _Seen:
    """One load: tokens a second of wall time, and the CPU seconds of the processes that served it."""

    speed: float
    tokens: int
    engine_cpu: float
    gateway_cpu: float


def _gateway_lines(measured: dict[tuple[str, int], list[_Seen]], clients: int) -> list[Line]:
    engine, gateway = measured["engine", clients], measured["gateway", clients]
    who = f"{clients} client{'s' if clients > 1 else ''}"
    ratio = statistics.median(mine.speed / theirs.speed for mine, theirs in zip(gateway, engine, strict=True))
    share = statistics.median(seen.engine_cpu / (seen.engine_cpu + seen.gateway_cpu) for seen in gateway)
    cpu = [statistics.median(getattr(seen, name) for seen in gateway) for name in ("gateway_cpu", "engine_cpu")]
    note = f"gateway {cpu[0]:.2f} s beside the engine's {cpu[1]:.2f} s; ratio: the engine's share"
    return [
        Line(
            SECTION, f"engine alone, {who}", statistics.median(seen.speed for seen in engine), UNIT,
            facts={"rounds": [asdict(seen) for seen in engine]},
        ),
        Line(
            SECTION, f"through the gateway, {who}", statistics.median(seen.speed for seen in gateway), UNIT, ratio,
            GATEWAY_GOAL, note="ratio: to the engine alone, median of the rounds",
            facts={"rounds": [asdict(seen) for seen in gateway]},
        ),
        Line(SECTION, f"CPU through the gateway, {who}", sum(cpu), "CPU s", share, GATEWAY_GOAL, note=note),
    ]  # fmt: skip


async def _both(
    model: Path, prompts: dict[int, list[str]], new_tokens: int, rounds: int, say: Say
) -> dict[tuple[str, int], list[_Seen]]:
    """What every round saw, by (who, clients)."""
    engine = Supervisor(choose_engine("embedded", Wanted(model, model.name, MAX_RUNNING, 1024, None), this_machine()))
    keeping = asyncio.create_task(engine.run())
    found: dict[tuple[str, int], list[_Seen]] = {}
    try:
        ready = asyncio.create_task(engine.ready.wait())
        await asyncio.wait({ready, keeping}, return_when=asyncio.FIRST_COMPLETED)
        if keeping.done():
            keeping.result()
        with _gateway(model) as (url, gateway_pid, behind):
            for number in range(rounds + 1):
                for clients, texts in prompts.items():
                    pair = [
                        ("engine", f"{engine.url}/v1", engine.key, engine.pid),
                        ("gateway", url, None, behind),
                    ]
                    for who, at, key, pid in pair if number % 2 else reversed(pair):
                        before = cpu_seconds(pid or 0), cpu_seconds(gateway_pid)
                        seen = await load.run(at, key, model.name, texts, clients=clients, new_tokens=new_tokens)
                        say(f"{SECTION}: round {number}, {who}, {clients}: {seen.tokens_per_second:.1f} {UNIT}")
                        if number:  # the first is for warming up
                            spent = cpu_seconds(pid or 0) - before[0], cpu_seconds(gateway_pid) - before[1]
                            found.setdefault((who, clients), []).append(
                                _Seen(seen.tokens_per_second, seen.tokens, *spent)
                            )
    finally:
        keeping.cancel()
        await engine.stop()
    return found


@contextmanager
def _gateway(model: Path) -> Iterator[tuple[str, int, int]]:
    """Its URL, its process id, and that of its engine."""
    words = [sys.executable, str(ROOT / "steadfast.py"), "serve", str(model), "--port", "0", "--json"]
    words += ["--engine", "embedded", "--max-running", str(MAX_RUNNING)]
    environment = {name: value for name, value in os.environ.items() if name != "STEADFAST_API_KEY"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    try:
        about = json.loads(process.stdout.readline() if process.stdout else "{}")
        yield str(about["url"]), process.pid, int(about["engine_pid"])
    finally:
        process.terminate()
        process.wait()


def cpu_seconds(pid: int) -> float:
    """CPU seconds that a process has spent, user and system, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def one_by_one(model: str, prompts: list[str], new_tokens: int) -> Facts:
    """Answer the prompts with `generate`, one after another."""
    import torch

    from tools.model_directory.chat import Prompts, stop_ids
    from tools.model_directory.loading import load_model

    network, tokenizer = load_model(Path(model))
    ids = [Prompts(tokenizer).ids([{"role": "user", "content": text}]) for text in prompts]
    stops = stop_ids(network, tokenizer)

    def answer(prompt: list[int], count: int) -> int:
        with torch.inference_mode():
            output = network.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=count, eos_token_id=stops, pad_token_id=0
            )
        return int(output.shape[1]) - len(prompt)

    answer(ids[0], 4)
    cpu, began = time.process_time(), time.perf_counter()
    tokens = sum(answer(prompt, new_tokens) for prompt in ids)
    return {"tokens": tokens, "wall": time.perf_counter() - began, "cpu": time.process_time() - cpu}


def _make_model(path: Path, hidden: int, layers: int, seed: int) -> None:
    """A Llama of random weights with a byte tokenizer and a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "<|end|>"]
    vocabulary = {token: index for index, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="<|end|>"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 16,
        num_key_value_heads=hidden // 16,
        max_position_embeddings=2048,
        initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
