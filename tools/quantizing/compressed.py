"""Schemes of llm-compressor, in the compressed-tensors convention that transformers, vLLM and SGLang read.

The library runs in an environment and a process of its own (`environment`, `worker`).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.quantizing.quality import Quality
from trainer.checkout import ROOT
from trainer.errors import DataError, SteadfastError


@dataclass(frozen=True)
class Compressor:
    """llm-compressor as the interpreter `python` has it, working on the model directory `model`."""

    python: Path
    model: Path
    trusted_code: str | None
    """Revision of the model's own code that may run in its processes (`trainer.model.remote_code`)."""

    def compress(self, out: Path, scheme: str, calibration: Sequence[Sequence[int]]) -> int:
        """Write weights and config.json of the compressed model to `out`; returns the number of compressed layers."""
        rows = list(map(list, calibration))
        answer = self._ask({"action": "compress", "out": str(out.absolute()), "scheme": scheme, "calibration": rows})
        return int(answer["layers"])

    def compare(self, changed: Path, prompts: Sequence[Sequence[int]]) -> Quality:
        """How close `changed` is to the model, by a fresh process that loads both from disk."""
        rows = list(map(list, prompts))
        return Quality(**self._ask({"action": "compare", "changed": str(changed.absolute()), "prompts": rows}))

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        about = {"parent": os.getpid(), "model": str(self.model.absolute()), "trusted_code": self.trusted_code}
        done = subprocess.run(
            [str(self.python.absolute()), "-W", "ignore", "-m", "tools.quantizing.worker"],
            input=json.dumps(about | request),
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
