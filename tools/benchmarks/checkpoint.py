"""How long training stands still for a checkpoint: written in the background, beside written on the spot.

Real runs of `steadfast train` with DeepSpeed, the same but for checkpoint.asynchronous; the events of the run tell.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.benchmarks.measure import ENVIRONMENT, TIMEOUT_SECONDS, Facts, Line, Say
from tools.benchmarks.tokenise import prepare_inputs
from trainer.checkout import ROOT

SECTION = "checkpoint"
GOAL = 10.0
"""Blocked time of a save in the background: a tenth of that of a save on the spot, at most."""
_SEQUENCE_LENGTH = 128
_CONVERSATIONS = 300


@dataclass(frozen=True)
class Model:
    """A model to save: `every` steps apart, `saves` times (the last save of a run waits and is not counted)."""

    config: dict[str, Any]
    ranks: int
    deepspeed: str
    every: int
    saves: int
    vocabulary_size: int = 2000


def _llama(hidden: int, layers: int, heads: int, inner: int, *, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": tied,
    }


MODELS = {
    "demo": Model(_llama(128, 2, 8, 384, tied=True), 2, "zero2", every=20, saves=6),
    "300m": Model(_llama(1024, 18, 16, 4096, tied=True), 1, "zero1", every=4, saves=3),
    "quick": Model(_llama(32, 1, 2, 64, tied=True), 1, "zero1", every=5, saves=2),
}


def run(work: Path, models: list[str], rounds: int, seed: int, say: Say) -> list[Line]:
    """Two lines for each model: a save on the spot, and one in the background with the ratio of blocked times."""
    lines: list[Line] = []
    for name in models:
        model = MODELS[name]
        store = build_store(work, model.vocabulary_size, _SEQUENCE_LENGTH, seed, say)
        found: dict[bool, list[Facts]] = {True: [], False: []}
        for number in range(rounds):
            for background in (False, True):
                say(f"{SECTION}: {name}, {'in the background' if background else 'on the spot'}, round {number + 1}")
                found[background] += _saves(work / f"{name}-{background}-{number}", model, store, background)
        lines += _lines(name, found)
    return lines


def build_store(work: Path, vocabulary_size: int, sequence_length: int, seed: int, say: Say) -> Path:
    """A store of short conversations in `work`, made once."""
    store = work / f"store-{vocabulary_size}"
    if not store.exists():
        rows, tokenizer = prepare_inputs(work, _CONVERSATIONS, vocabulary_size, seed, [], say)
        words = ["--input", rows, "--tokenizer", tokenizer, "--sequence-length", sequence_length, "-o", store]
        _steadfast("data", "build", *words)
    return store


def _saves(run_dir: Path, model: Model, store: Path, background: bool) -> list[Facts]:
    """Commit events of a run but for its last one, which is waited for in any case.

    The run goes on for half an interval after the last save that counts, or its end would wait for that one too.
    """
    steps = model.every * model.saves + max(model.every // 2, 1)
    values = {
        "run": {"dir": str(run_dir)},
        "model": {"config": model.config, "dtype": "float32", "gradient_checkpointing": False},
        "data": {"train": str(store)},
        "train": {"max_steps": steps, "global_batch_size": model.ranks, "micro_batch_size": 1},
        "engine": {"deepspeed": model.deepspeed},
        "checkpoint": {"every_steps": model.every, "keep": 1, "asynchronous": background},
        "logging": {"tensorboard": False, "every_steps": model.every},
    }
    config = run_dir.with_suffix(".json")
    config.write_text(json.dumps(values))
    _steadfast("train", config, "--nproc", model.ranks)
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    size = sum(file.stat().st_size for file in next((run_dir / "checkpoints").glob("step-*")).rglob("*"))
    return [{**event, "bytes": size} for event in events if event["event"] == "commit" and event["step"] < steps]


def _lines(name: str, found: dict[bool, list[Facts]]) -> list[Line]:
    times = {kind: [each["blocked_seconds"] for each in saves] for kind, saves in found.items()}
    blocked = {kind: statistics.median(each) for kind, each in times.items()}
    whole = statistics.median(each["seconds"] for each in found[True])
    waited = max(each["waited_seconds"] for each in found[True])
    size = found[True][0]["bytes"] / 1e6
    return [
        Line(
            SECTION,
            f"{name}, on the spot",
            blocked[False] * 1e3,
            "ms blocked",
            ratio=blocked[False] / blocked[True],
            goal=GOAL,
            note=f"{size:,.1f} MB, median of {len(found[False])} saves, longest {max(times[False]) * 1e3:,.0f} ms",
            facts={"saves": found[False]},
        ),
        Line(
            SECTION,
            f"{name}, in the background",
            blocked[True] * 1e3,
            "ms blocked",
            note=f"{blocked[True] / blocked[False]:.1%} of the above, longest {max(times[True]) * 1e3:,.0f} ms; "
            f"committed after {whole:.2f} s" + (f", waited up to {waited:.2f} s for the save before" if waited else ""),
            facts={"saves": found[True]},
        ),
    ]


def _steadfast(*words: object) -> None:
    command = [sys.executable, str(ROOT / "steadfast.py"), *map(str, words)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words[:2]))}: {(done.stderr.splitlines() or ['no message'])[-1]}")
