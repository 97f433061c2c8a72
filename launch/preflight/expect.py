"""What a run will want of its hosts, as far as it can be known before it starts. No torch."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.checkout import ROOT
from trainer.checkpoint.verify import committed_steps, read_manifest, step_directory
from trainer.config.deepspeed import load_deepspeed_json
from trainer.config.load import config_as_yaml
from trainer.config.schema import Config, Lora
from trainer.errors import SteadfastError
from trainer.observe.ledger import read_lines
from trainer.run_directory import RunDirectory
from trainer.tensor_file import MAX_HEADER_BYTES

# A checkpoint holds fp32 masters and two moments of every parameter.
_BYTES_PER_PARAMETER = 12
_SQUEUE_SECONDS = 5.0
_LARGEST_VOCABULARY = 262_144


def code_hash() -> str:
    """Hash of the source files that run: two checkouts are the same code exactly when it is equal. No git needed."""
    digest = hashlib.sha256()
    files = [ROOT / "steadfast.py", *(path for room in ("trainer", "launch") for path in (ROOT / room).rglob("*.py"))]
    for path in sorted(files):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def config_hash(config: Config) -> str:
    """Hash of the resolved configuration and of the DeepSpeed JSON that it names."""
    parts = config_as_yaml(config) + json.dumps(load_deepspeed_json(config.engine.deepspeed), sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:12]


def missing_inputs(config: Config) -> list[str]:
    """Local paths that the configuration names and this host does not have."""
    data = config.data
    named = {
        "model.path": config.model.path,
        "data.train": data.train,
        "data.eval": data.eval,
        "data.teacher": data.teacher,
    }
    return [
        f"{key}={location}"
        for key, location in named.items()
        if location is not None and "://" not in location and not Path(location).exists()
    ]


def checkpoint_bytes(config: Config) -> tuple[int, str] | None:
    """About how many bytes a checkpoint will take and where we know that from; None when we do not."""
    checkpoints = RunDirectory(Path(config.run.dir)).checkpoints
    with suppress(SteadfastError, OSError):
        for step in committed_steps(checkpoints)[:1]:
            files = read_manifest(step_directory(checkpoints, step)).files
            return sum(int(entry["bytes"]) for entry in files.values()), "as the newest one"
    if config.model.path is None:
        parameters = _parameters_from_scratch(config.model.config or {}, _vocabulary_size(config))
    elif (shapes := _shapes_of(Path(config.model.path))) is None:
        return None
    elif (lora := config.model.lora) is not None:
        parameters = sum(lora.rank * sum(shape) for name, shape in shapes.items() if _may_be_adapted(name, shape, lora))
    else:
        parameters = sum(map(math.prod, shapes.values()))
    return None if parameters is None else (parameters * _BYTES_PER_PARAMETER, f"{parameters:,} parameters")


def checkpoints_kept(config: Config) -> int:
    """Checkpoints that lie in run.dir already, at most as many as are kept."""
    return min(len(committed_steps(RunDirectory(Path(config.run.dir)).checkpoints)), config.checkpoint.keep)


def checkpoint_seconds(config: Config) -> float | None:
    """How long the last save of this run took; None before the first."""
    seconds = None
    with suppress(OSError):
        for entry in read_lines(RunDirectory(Path(config.run.dir)).events):
            if entry.get("event") == "commit" and isinstance(entry.get("seconds"), int | float):
                seconds = float(entry["seconds"])
    return seconds


def seconds_left(environ: Mapping[str, str]) -> float | None:
    """Time until the scheduler ends this job; None outside one, or when it cannot be known."""
    end = environ.get("SLURM_JOB_END_TIME", "")
    if end.isdigit():
        return int(end) - time.time()
    if job := environ.get("SLURM_JOB_ID"):
        with suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(
                ["squeue", "--noheader", "--jobs", job, "--format=%L"],
                capture_output=True, text=True, check=False, timeout=_SQUEUE_SECONDS,
            )  # fmt: skip
            return parse_time_left(done.stdout)
    return None


def parse_time_left(text: str) -> float | None:
    """Seconds of Slurm's [days-][hours:]minutes:seconds; None for UNLIMITED, INVALID and the like."""
    days, dash, clock = text.strip().rpartition("-")
    try:
        seconds = 0
        for part in clock.split(":"):
            seconds = seconds * 60 + int(part)
        return float(seconds + (int(days) * 86400 if dash else 0))
    except ValueError:
        return None


def _vocabulary_size(config: Config) -> int:
    with suppress(OSError, ValueError, KeyError, StopIteration, TypeError):
        manifest = next(iter(sorted(Path(config.data.train).glob("manifest-*.json"), reverse=True)))
        return int(json.loads(manifest.read_bytes())["vocabulary_size"])
    return int((config.model.config or {}).get("vocab_size") or _LARGEST_VOCABULARY)


def _may_be_adapted(name: str, shape: tuple[int, ...], lora: Lora) -> bool:
    """Whether a LoRA adapter may stand beside the tensor: a few too many, as headers do not tell what is linear."""
    module, _, kind = name.rpartition(".")
    chosen = lora.targets == "all-linear" or any(f".{module}".endswith(f".{target}") for target in lora.targets)
    return len(shape) == 2 and kind == "weight" and chosen


def _shapes_of(model: Path) -> dict[str, tuple[int, ...]] | None:
    """Name to shape of the tensors in the safetensors files of a model directory, from their headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for path in sorted(model.glob("*.safetensors")):
            with path.open("rb") as stream:
                header = json.loads(stream.read(min(int.from_bytes(stream.read(8), "little"), MAX_HEADER_BYTES)))
            for name, entry in header.items():
                if name != "__metadata__":
                    shapes[name] = tuple(map(int, entry["shape"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return shapes or None


def _parameters_from_scratch(model: Mapping[str, Any], vocabulary: int) -> int | None:
    """About the parameters of a decoder with these usual keys; None when they are not there."""
    try:
        hidden, layers = int(model["hidden_size"]), int(model["num_hidden_layers"])
        inner = int(model.get("intermediate_size") or 4 * hidden)
    except (KeyError, TypeError, ValueError):
        return None
    embeddings = vocabulary * hidden * (1 if model.get("tie_word_embeddings") else 2)
    return embeddings + layers * (4 * hidden * hidden + 3 * hidden * inner)
