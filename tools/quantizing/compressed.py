"""Schemes of llm-compressor, in the compressed-tensors convention that transformers, vLLM and SGLang read.

The library runs in an environment and a process of its own (`environment`, `worker`).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.quantizing.quality import Quality
from trainer.errors import DataError, SteadfastError

ROOT = Path(__file__).resolve().parents[2]


def compress(python: Path, model: Path, out: Path, scheme: str, calibration: Sequence[Sequence[int]]) -> int:
    """Write weights and config.json of the compressed model to `out`; returns the number of compressed layers."""
    request = {"action": "compress", "model": str(model.absolute()), "out": str(out.absolute()), "scheme": scheme}
    return int(_ask(python, request | {"calibration": list(map(list, calibration))})["layers"])


def compare(python: Path, model: Path, changed: Path, prompts: Sequence[Sequence[int]]) -> Quality:
    """How close `changed` is to `model`, by a fresh process that loads both from disk."""
    request = {"action": "compare", "model": str(model.absolute()), "changed": str(changed.absolute())}
    return Quality(**_ask(python, request | {"prompts": list(map(list, prompts))}))


def _ask(python: Path, request: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [str(python.absolute()), "-W", "ignore", "-m", "tools.quantizing.worker"],
        input=json.dumps({"parent": os.getpid(), **request}),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
        check=False,
    )
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise SteadfastError(f"llm-compressor ended with {done.returncode}: {said[-1]}") from error
    if "fact" in answer:
        raise DataError(answer["fact"], answer["remedy"])
    return answer
