"""The whole line on this machine, on an embedded default: every command below is one you can type yourself.

Generates a bilingual instruction set with checkable answers, trains a tokenizer, builds token stores, trains a small
model from scratch with DeepSpeed on local ranks (stopping and resuming once on the way), measures exact match on
unseen prompts, exports and proves the model, quantises it, serves it, and asks it a question over HTTP.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.checkout import ROOT
from trainer.durable import write_file
from trainer.errors import CannotWriteError, SteadfastError

MARKER = "made-by-steadfast-demo"
ENOUGH = 0.95
STOPPED_ON_REQUEST = 75
RECIPE = ROOT / "configs/demo.yaml"
# The demo trains on the CPU, whatever the machine has.
ON_THE_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare `demo [--out DIR] [--steps N] [--nproc N]`."""
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="everything the demo makes")
    parser.add_argument("--steps", type=int, help="train fewer steps than configs/demo.yaml says, to try the line only")
    parser.add_argument("--nproc", type=int, default=2, help="local ranks")


def run(arguments: argparse.Namespace) -> int:
    """Run the line; 1 when the model learnt less than it should have, else 0."""
    out: Path = arguments.out
    _begin(out)
    started = time.monotonic()
    run_directory, model, quantised = out / "run", out / "model", out / "model-int8"

    _say("1/8", "an instruction set in two languages, every answer checkable")
    from tools.instructions import write_instructions

    write_instructions(out / "data", seed=1, records=12_000, held_out=300)
    print(f"{out}/data/train.jsonl (12,000 records), {out}/data/held_out.jsonl (300 prompts, none of them trained on)")

    _say("2/8", "a SentencePiece tokenizer")
    data = out / "data/train.jsonl"
    _steadfast("tokenizer", "train", "--input", data, "--vocab-size", 1600, "-o", out / "tokenizer")

    _say("3/8", "token stores: long sessions become overlapping windows, every supervised token a target once")
    build = ("--tokenizer", out / "tokenizer", "--sequence-length", 256, "--overlap", 64)
    _steadfast("data", "build", "--input", data, *build, "-o", out / "store")
    _steadfast("data", "build", "--input", out / "data/held_out.jsonl", *build, "-o", out / "store-held-out")

    _say("4/8", f"training on {arguments.nproc} ranks, stopped once on the way and resumed")
    _train_with_a_stop(out, run_directory, arguments.steps, arguments.nproc)

    _say("5/8", "export to safetensors, reloaded with plain transformers and compared with the live model's logits")
    _steadfast("export", run_directory, model)

    _say("6/8", "a smaller model, and what it lost")
    _steadfast("quantize", model, quantised, "--scheme", "int8")

    _say("7/8", "exact match on 300 unseen prompts, of both models")
    scores = _exact_matches(_answer("eval", model, quantised, "--data", out / "data/held_out.jsonl"))
    for name in scores[0]:
        print(f"  {name:<20} {scores[0][name]:>6.1%}   int8 {scores[1][name]:>6.1%}")

    _say("8/8", "serving it, and one held-out question over HTTP")
    question, expected, answer = _ask(quantised, out / "data/held_out.jsonl")
    print(f"  question  {question}\n  answer    {answer}\n  expected  {expected}")

    outcome = _outcome(run_directory, model, [score["all"] for score in scores], time.monotonic() - started)
    write_file(out / "outcome.json", json.dumps(outcome, indent=1, ensure_ascii=False) + "\n")
    _table(outcome, out, model, quantised)
    if arguments.steps is None and outcome["exact_match"] < ENOUGH:
        raise SteadfastError(
            f"exact match {outcome['exact_match']:.1%} is below {ENOUGH:.0%}", f"look at {run_directory}"
        )
    return 0


def _exact_matches(report: dict[str, Any]) -> list[dict[str, float]]:
    """Of each model: the share of exact answers to all rows, and in each slice."""
    return [
        {score["slice"]: score["score"]["value"] for score in model["scores"] if score["metric"] == "exact match"}
        for model in report["models"]
    ]


def _begin(out: Path) -> None:
    if out.exists() and not (out / MARKER).exists():
        raise CannotWriteError(f"{out} exists and was not made by the demo", "give another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    write_file(out / MARKER, "steadfast demo replaces this directory when it runs again\n")


def _train_with_a_stop(out: Path, run_directory: Path, steps: int | None, ranks: int) -> None:
    """Ask the first start to stop after an eighth of its steps; the same command then continues to the end."""
    shorter, stop_at = _shortened(steps)
    overrides = [
        f"run.dir={run_directory}",
        f"data.train={out / 'store'}",
        f"data.eval={out / 'store-held-out'}",
        *shorter,
    ]
    command = _command("train", os.path.relpath(RECIPE), *overrides, "--nproc", ranks)
    _show(command)
    first = subprocess.Popen(command, env=os.environ | ON_THE_CPU)
    try:
        while first.poll() is None and _last_logged_step(run_directory) < stop_at:
            time.sleep(0.05)
        if first.poll() is None:
            print("-- asking the run to stop (SIGTERM), as a scheduler would --", flush=True)
            first.send_signal(signal.SIGTERM)
        code = first.wait()
    finally:
        if first.poll() is None:
            first.kill()
    if code == STOPPED_ON_REQUEST:
        print(f"-- exit code {code}: stopped with a committed checkpoint; the same command again --", flush=True)
        _show(command)
        code = subprocess.run(command, check=False, env=os.environ | ON_THE_CPU).returncode
    elif code == 0:
        print("-- not stopped on the way: so few steps were over before the request came --", flush=True)
    if code:
        raise SteadfastError(f"training ended with exit code {code}", f"its own message is above; see {run_directory}")


def _shortened(steps: int | None) -> tuple[list[str], int]:
    """Overrides that make the recipe `steps` long (None: as it is), and the logged step after which to stop it."""
    from trainer.config.load import load_config

    recipe = load_config(RECIPE)
    if steps is None:
        return [], recipe.train.max_steps // 8
    overrides = [f"train.max_steps={steps}", f"schedule.warmup_steps={min(5, steps // 2)}"]
    stop_at = max(1, steps // 8)
    if stop_at < recipe.logging.every_steps:
        # Otherwise the run would be over before the step to stop at is logged.
        overrides.append("logging.every_steps=1")
    return overrides, stop_at


def _last_logged_step(run_directory: Path) -> int:
    try:
        lines = (run_directory / "metrics.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["step"])
    except (OSError, ValueError, IndexError, KeyError):
        return 0


def _ask(model: Path, held_out: Path) -> tuple[str, str, str]:
    """Serve `model`, ask its first held-out question, stop the server; (question, expected answer, answer)."""
    messages = json.loads(held_out.read_text(encoding="utf-8").splitlines()[0])["messages"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    key = secrets.token_urlsafe(16)
    with _served(model, port, key) as base:
        body = {"model": model.name, "messages": messages[:1], "temperature": 0, "max_tokens": 64}
        reply = _http(f"{base}/v1/chat/completions", key, body)
    return messages[0]["content"], messages[1]["content"], reply["choices"][0]["message"]["content"]


@contextmanager
def _served(model: Path, port: int, key: str) -> Iterator[str]:
    command = _command("serve", model, "--port", port)
    _show([*command, "--api-key", "KEY"])
    # The key goes through the environment: arguments are visible to every user of a machine.
    server = subprocess.Popen(
        command, env=os.environ | ON_THE_CPU | {"STEADFAST_API_KEY": key}, stdout=subprocess.DEVNULL
    )
    base = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if server.poll() is not None:
                raise SteadfastError(f"serving ended with exit code {server.returncode}", "its message is above")
            try:
                _http(f"{base}/ready", key)
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        else:
            raise SteadfastError("the server was not ready within 60 s", f"try: {shlex.join(command)}")
        yield base
    finally:
        server.terminate()
        server.wait()


def _http(url: str, key: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as reply:
        content: dict[str, Any] = json.loads(reply.read())
        return content


def _outcome(run_directory: Path, model: Path, exact_matches: Sequence[float], seconds: float) -> dict[str, Any]:
    trained = json.loads((run_directory / "outcome.json").read_text())
    lines = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    rates = sorted(line[rate] for line in lines if (rate := "throughput/tokens_per_second") in line)
    return {
        "exact_match": exact_matches[0],
        "exact_match_int8": exact_matches[1],
        "logit_max_diff": json.loads((model / "proof.json").read_text())["logit_max_diff"],
        "loss_first": trained["loss_first"],
        "loss_last": trained["loss_last"],
        "tokens_per_second": rates[len(rates) // 2],
        "steps": trained["step"],
        "export_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "seconds": round(seconds, 1),
    }


def _table(outcome: dict[str, Any], out: Path, model: Path, quantised: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, title="Steadfast demo")
    for name, value in (
        ("loss, first and last step", f"{outcome['loss_first']:.4f} -> {outcome['loss_last']:.4f}"),
        ("tokens per second (median)", f"{outcome['tokens_per_second']:,.0f}"),
        ("exact match, 300 unseen prompts", f"{outcome['exact_match']:.1%}, int8 {outcome['exact_match_int8']:.1%}"),
        ("export", f"{outcome['export_bytes'] / 1e6:.1f} MB, largest logit difference {outcome['logit_max_diff']:.1e}"),
        ("model", f"{model}"),
        ("int8 model", f"{quantised}"),
        ("TensorBoard", f"{out / 'run/tensorboard'}"),
        ("all of it took", f"{outcome['seconds']:.0f} s"),
    ):
        table.add_row(name, value)
    print()
    Console().print(table)
    print(f"next:    .venv/bin/steadfast serve {model}")
    print(f"curves:  .venv/bin/tensorboard --logdir {out / 'run/tensorboard'}")


def _command(*words: object) -> list[str]:
    return [sys.executable, str(ROOT / "steadfast.py"), *map(str, words)]


def _steadfast(*words: object) -> None:
    command = _command(*words)
    _show(command)
    code = subprocess.run(command, check=False, env=os.environ | ON_THE_CPU).returncode
    if code:
        raise SteadfastError(f"steadfast {words[0]} ended with exit code {code}", "its own message is above")


def _answer(*words: object) -> dict[str, Any]:
    """What a command prints with --json."""
    command = _command(*words)
    _show(command)
    done = subprocess.run(
        [*command, "--json"], check=False, stdout=subprocess.PIPE, text=True, env=os.environ | ON_THE_CPU
    )
    if done.returncode:
        raise SteadfastError(f"steadfast {words[0]} ended with exit code {done.returncode}", "its message is above")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _say(number: str, what: str) -> None:
    print(f"\n== {number}  {what}", flush=True)


def _show(command: Sequence[str]) -> None:
    print("$ steadfast " + shlex.join(command[2:]), flush=True)
