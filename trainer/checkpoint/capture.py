"""A live run as checkpoint contents: which bytes each rank contributes, and what the manifest says about them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.checkout import code_revision
from trainer.checkpoint.contents import Files, RankContents, TensorSource, from_array
from trainer.checkpoint.retention import EVALUATION
from trainer.checkpoint.saving import Saves
from trainer.checkpoint.slices import rank_file, slice_key
from trainer.checkpoint.verify import Manifest
from trainer.checkpoint.writer_process import WriterProcess
from trainer.cli import VERSION
from trainer.data.feed import Feed
from trainer.data.micro_batch import IGNORED, MicroBatch
from trainer.engine.device import generator_states
from trainer.engine.partitions import true_shape
from trainer.engine.protocol import SavableEngine
from trainer.model.load import tied_names
from trainer.state import SaveReport, TrainState, finite
from trainer.tensor_file import DTYPE_NAMES
from trainer.world import World

PROBE_FILE = "probe.safetensors"
PROBE_POSITIONS = 8
"""Positions of each probe prompt whose logits are stored."""
_TORCH_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Capture:
    """Everything a checkpoint is made of."""

    engine: SavableEngine
    feed: Feed
    world: World
    identity: dict[str, str]
    """What a resumed run must share: name to fingerprint or value."""
    model_files: Path
    """Directory whose files are copied into the checkpoint's model/."""
    probe: np.ndarray[Any, np.dtype[np.int64]]
    """Token ids of pinned prompts [prompts, length]."""

    def contents(self, state: TrainState, *, brief: bool) -> RankContents:
        """This rank's files, as they would be written now. Collective: the model answers the probe prompts.

        `brief`: it does not, for training would wait for that. The next training step begins with the weights that are
        saved: what it computes for the head of its first row is the probe, where that is what evaluation would give.
        """
        late = self._watched_probe if brief and self.engine.watch_training(PROBE_POSITIONS) else None
        logits = None if late is not None else self.engine.logits(_as_batch(self.probe), PROBE_POSITIONS)
        own = self._slices()
        for name, array in generator_states(self.engine.kind).items():
            own[f"rng:{name}"] = from_array(array, DTYPE_NAMES[array.dtype])
        tensors = {rank_file(self.world.rank, self.world.world_size): own}
        if not self.world.is_first:
            return RankContents(tensors)
        for name, buffer in self._buffers.items():
            wide = buffer.detach().float() if buffer.is_floating_point() else buffer.detach()
            array = wide.cpu().contiguous().numpy()
            own[f"buffer:0:{name}"] = from_array(array, DTYPE_NAMES[array.dtype])
        if logits is not None:
            tensors |= _probe_file(self.probe, logits)
        body = {"progress": state.as_json(), "feed": self.feed.state_dict(), **self.engine.counters()}
        return RankContents(
            tensors,
            texts={"state.json": json.dumps(body, indent=1) + "\n"},
            copies=self._copies,
            late=late,
        )

    def tensor_bytes(self) -> int:
        """Bytes of this rank's tensors in any checkpoint to come, generously; not collective."""
        return sum(source.bytes + 64 for source in self._slices().values()) + (16 << 20)

    def manifest(self, state: TrainState, metrics: dict[str, float], files: Files) -> Manifest:
        """The manifest of a checkpoint of `state` that consists of `files`; `metrics` were evaluated at that step."""
        return Manifest(
            step=state.step,
            world_size=self.world.world_size,
            files=files,
            parameters=self._parameters,
            tied=self._tied,
            buffers={
                name: {"shape": list(buffer.shape), "dtype": str(buffer.dtype).removeprefix("torch.")}
                for name, buffer in self._buffers.items()
            },
            identity=self.identity,
            provenance={
                "steadfast": VERSION,
                "revision": code_revision(),
                "torch": torch.__version__,
                "saved": datetime.now(UTC).isoformat(timespec="seconds"),
                "tokens_seen": state.tokens_seen,
                "supervised_tokens_seen": state.supervised_tokens_seen,
                "loss": finite(state.loss_last),
                EVALUATION: finite(metrics),
            },
        )

    def _watched_probe(self) -> dict[str, dict[str, TensorSource]] | None:
        watched = self.engine.watched()
        return None if watched is None else _probe_file(*watched)

    # What is the same in all saves of a run is looked up once: training waits for the rest.

    @cached_property
    def _copies(self) -> dict[str, Path]:
        return {f"model/{source.name}": source for source in sorted(self.model_files.iterdir())}

    @cached_property
    def _parameters(self) -> dict[str, dict[str, Any]]:
        return {
            name: {
                "shape": list(true_shape(parameter)),
                "dtype": str(parameter.dtype).removeprefix("torch."),
                **({} if parameter.requires_grad else {"frozen": True}),
            }
            for name, parameter in self.engine.saved_parameters().items()
        }

    @cached_property
    def _tied(self) -> dict[str, str]:
        saved = self.engine.saved_parameters()
        return {alias: owner for alias, owner in tied_names(self.engine.language_model).items() if owner in saved}

    @cached_property
    def _buffers(self) -> dict[str, torch.Tensor]:
        return persistent_buffers(self.engine.language_model)

    def _slices(self) -> dict[str, TensorSource]:
        return {
            slice_key(kind, piece.start, piece.name): TensorSource(
                _TORCH_DTYPES[tensor.dtype], (piece.count,), partial(_copy_out, tensor)
            )
            for piece in self.engine.owned_slices()
            for kind, tensor in piece.tensors.items()
        }


@dataclass(frozen=True)
class RunSaver:
    """Saves of a live run: what the loop calls. Every method but `vote` is collective."""

    capture: Capture
    saves: Saves

    def write_in_background(self) -> None:
        """From now on saves go through a process beside each rank, if the memory of every host allows it."""
        world = self.capture.world
        size = self.capture.tensor_bytes()
        available = available_memory()
        problem = None
        if available is not None and size * world.local_world_size > available:
            problem = f"a copy of a rank's state takes {size / 2**30:.1f} GiB of memory, and not all hosts have that"
        else:
            self.saves.writer = WriterProcess()
            try:
                self.saves.writer.reserve(size)
            except OSError as error:
                problem = f"{size / 2**30:.1f} GiB of memory cannot be shared with another process: {error.strerror}"
        problems = [answer["problem"] for answer in self.saves.exchange({"problem": problem}) if answer["problem"]]
        if problems and self.saves.writer is not None:
            self.saves.writer.close()
            self.saves.writer = None
        if problems and world.is_first:
            sys.stderr.write(f"warning: saves will block training: {problems[0]}\n")

    @property
    def vote(self) -> float:
        """See Saves.vote."""
        return self.saves.vote

    def settle(self, votes: float) -> list[SaveReport]:
        """See Saves.settle."""
        return self.saves.settle(votes, self.capture.world.world_size)

    def wait(self) -> list[SaveReport]:
        """See Saves.wait."""
        return self.saves.wait()

    def begin(self, state: TrainState, metrics: dict[str, float]) -> list[SaveReport]:
        """Start saving `state`; returns saves that ended meanwhile. `metrics` were evaluated at this step."""
        return self._begin(state, metrics, brief=self.saves.writer is not None)

    def finish(self, state: TrainState, metrics: dict[str, float]) -> list[SaveReport]:
        """Save `state` and wait until it is committed, trying again when a save is given up.

        Raises CannotWriteError when it cannot be saved.
        """
        reports: list[SaveReport] = []
        while not any(report.step == state.step and report.outcome == "committed" for report in reports):
            reports += self._begin(state, metrics, brief=False)
            reports += self.saves.wait()
        if self.saves.mirror is not None:
            reports += self.saves.mirror.finish()
        return reports

    def _begin(self, state: TrainState, metrics: dict[str, float], *, brief: bool) -> list[SaveReport]:
        describe: Callable[[Files], Manifest] = partial(self.capture.manifest, state, metrics)
        return self.saves.begin(state.step, partial(self.capture.contents, state, brief=brief), describe)


def available_memory() -> int | None:
    """Bytes that can be taken without swapping or hitting this container's limit; None where the kernel is silent."""
    found = []
    with suppress(OSError, StopIteration, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")))
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(found, default=None)


def persistent_buffers(model: Any) -> dict[str, torch.Tensor]:
    """Buffers that are part of a model's state."""
    stored = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in stored}


def _copy_out(tensor: torch.Tensor, target: np.ndarray[Any, Any]) -> None:
    into = torch.from_numpy(target)
    with torch.no_grad():
        (into.view(torch.bfloat16) if tensor.dtype == torch.bfloat16 else into).copy_(tensor)


def _probe_file(ids: np.ndarray[Any, np.dtype[np.int64]], logits: torch.Tensor) -> dict[str, dict[str, TensorSource]]:
    return {PROBE_FILE: {"input_ids": from_array(ids, "I64"), "logits": from_array(logits.numpy(), "F32")}}


def _as_batch(ids: np.ndarray[Any, np.dtype[np.int64]]) -> MicroBatch:
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy()
    return MicroBatch(ids, np.full_like(ids, IGNORED), positions)
