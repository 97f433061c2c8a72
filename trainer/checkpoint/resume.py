"""Save and restore a live run: what goes into a checkpoint, and how any number of ranks takes it up again."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.checkpoint.commit import Exchange, Writer, commit_checkpoint, describe_file
from trainer.checkpoint.slices import SliceReader, files_to_hash, rank_file, slice_key
from trainer.checkpoint.verify import (
    Manifest,
    committed_steps,
    damaged,
    read_manifest,
    step_directory,
    verify_files,
)
from trainer.cli import VERSION
from trainer.config.resume_law import accept_identity
from trainer.data.feed import Feed
from trainer.data.micro_batch import IGNORED, MicroBatch
from trainer.durable import sync_file, write_file
from trainer.engine.device import generator_states, set_generator_states
from trainer.engine.partitions import true_shape
from trainer.engine.protocol import SavableEngine
from trainer.errors import CheckpointError, ResumeRefusedError
from trainer.model.load import tied_names
from trainer.state import TrainState, finite
from trainer.tensor_file import DTYPE_NAMES, TensorFileWriter
from trainer.world import World

PROBE_POSITIONS = 8
"""Positions of each probe prompt whose logits are stored."""


@dataclass(frozen=True)
class Checkpointer:
    """Everything a checkpoint is made of. Every rank has one; `save` and `restore` are collective."""

    directory: Path
    engine: SavableEngine
    feed: Feed
    world: World
    exchange: Exchange
    identity: dict[str, str]
    """What a resumed run must share: name to fingerprint or value (see `trainer.config.resume_law`)."""
    model_files: Path
    """Directory whose files are copied into the checkpoint's model/."""
    probe: np.ndarray[Any, np.dtype[np.int64]]
    """Token ids of pinned prompts [prompts, length]."""
    seed: int
    keep: int
    allow_changes: Sequence[str] = ()
    """Names in `identity` that may differ from the checkpoint's all the same."""
    on_phase: Callable[[str], None] = lambda phase: None

    def save(self, state: TrainState) -> str:
        """Commit a checkpoint of the present state and return its path; a step already committed is left alone.

        Raises CannotWriteError on every rank when any rank could not write; earlier checkpoints stay as they are.
        """
        target = step_directory(self.directory, state.step)
        if self.exchange({"there": target.exists()})[0]["there"] and self._problem_on_any_rank(target) is None:
            return str(target)
        logits = self.engine.logits(_as_batch(self.probe), PROBE_POSITIONS).numpy()
        writer = Writer(
            rank=self.world.rank,
            write=lambda place: self._write_files(place, state, logits),
            exchange=self.exchange,
            on_phase=self.on_phase,
        )
        return str(
            commit_checkpoint(self.directory, state.step, writer, lambda files: self._describe(state, files), self.keep)
        )

    def restore(self) -> TrainState | None:
        """Load the newest valid checkpoint into engine and feed and return its state; None when there is none at all.

        A damaged checkpoint is named on stderr and the one before it is taken. Raises CheckpointError when all are
        damaged, ResumeRefusedError when the checkpoint belongs to another model, data or batch.
        """
        steps = self.exchange({"steps": committed_steps(self.directory)})[0]["steps"]
        failures: list[str] = []
        for step in steps:
            path = step_directory(self.directory, step)
            problem = self._problem_on_any_rank(path)
            if problem is None:
                if failures and self.world.rank == 0:
                    lost = steps[0] - step
                    sys.stderr.write(f"warning: {failures[0]}; continuing from step {step}, {lost} steps earlier\n")
                return self._load(path)
            failures.append(problem)
        if failures:
            raise CheckpointError(
                f"no valid checkpoint in {self.directory}: {failures[0]}",
                "restore one from a copy, or set another run.dir to start over",
            )
        return None

    def _problem_on_any_rank(self, path: Path) -> str | None:
        """What is wrong with a checkpoint, or None; collective: every file is hashed by one rank."""
        reports = self.exchange({"problem": self._problem_with(path)})
        return next((report["problem"] for report in reports if report["problem"]), None)

    def _problem_with(self, path: Path) -> str | None:
        try:
            manifest = read_manifest(path)
            verify_files(path, manifest, files_to_hash(manifest.files, self.world.rank, self.world.world_size))
        except CheckpointError as error:
            return error.fact
        return None

    def _write_files(self, place: Path, state: TrainState, logits: np.ndarray[Any, Any]) -> dict[str, dict[str, Any]]:
        files = {}
        slices = self.engine.owned_slices()
        arrays: dict[str, Callable[[], np.ndarray[Any, Any]]] = {}
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        for piece in slices:
            for kind, tensor in piece.tensors.items():
                key = slice_key(kind, piece.start, piece.name)
                shapes[key] = ("F32", (piece.count,))
                arrays[key] = partial(_to_host, tensor)
        fixed = {f"rng:{name}": array for name, array in generator_states(self.engine.kind).items()}
        if self.world.rank == 0:
            fixed |= {f"buffer:0:{name}": array for name, array in self._buffers().items()}
        for key, array in fixed.items():
            shapes[key] = (DTYPE_NAMES[array.dtype], array.shape)
            arrays[key] = partial(np.asarray, array)
        name = rank_file(self.world.rank, self.world.world_size)
        with TensorFileWriter(place / name, shapes) as file:
            for key, read in arrays.items():
                file.write(key, read())
        files[name] = {"bytes": file.finished.bytes, "xxh3_128": file.finished.xxh3_128}
        if self.world.rank == 0:
            body = {"progress": state.as_json(), "feed": self.feed.state_dict(), **self.engine.counters()}
            write_file(place / "state.json", json.dumps(body, indent=1) + "\n")
            probe_shapes = {"input_ids": ("I64", self.probe.shape), "logits": ("F32", logits.shape)}
            with TensorFileWriter(place / "probe.safetensors", probe_shapes) as probe:
                probe.write("input_ids", self.probe)
                probe.write("logits", logits)
            (place / "model").mkdir()
            names = ["state.json", "probe.safetensors"]
            for source in sorted(self.model_files.iterdir()):
                shutil.copyfile(source, place / "model" / source.name)
                sync_file(place / "model" / source.name)
                names.append(f"model/{source.name}")
            files |= {name: describe_file(place / name) for name in names}
        return files

    def _describe(self, state: TrainState, files: dict[str, dict[str, Any]]) -> Manifest:
        model = self.engine.language_model
        return Manifest(
            step=state.step,
            world_size=self.world.world_size,
            files=files,
            parameters={
                name: {"shape": list(true_shape(parameter)), "dtype": str(parameter.dtype).removeprefix("torch.")}
                for name, parameter in model.named_parameters()
            },
            tied=tied_names(model),
            buffers={
                name: {"shape": list(buffer.shape), "dtype": str(buffer.dtype).removeprefix("torch.")}
                for name, buffer in _persistent_buffers(model).items()
            },
            identity=self.identity,
            provenance={
                "steadfast": VERSION,
                "torch": torch.__version__,
                "saved": datetime.now(UTC).isoformat(timespec="seconds"),
                "tokens_seen": state.tokens_seen,
                "supervised_tokens_seen": state.supervised_tokens_seen,
                "loss": finite(state.loss_last),
            },
        )

    def _buffers(self) -> dict[str, np.ndarray[Any, Any]]:
        buffers = _persistent_buffers(self.engine.language_model)
        return {
            name: (buffer.float() if buffer.is_floating_point() else buffer).cpu().contiguous().numpy()
            for name, buffer in buffers.items()
        }

    def _load(self, path: Path) -> TrainState:
        reader = SliceReader(path)
        accept_identity(str(path), reader.manifest.identity, self.identity, self.allow_changes)
        try:
            body = json.loads((path / "state.json").read_text())
            state = replace(TrainState(), **body["progress"])
            self.feed.load_state_dict(body["feed"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise damaged(path, "state.json is not what this version writes") from error
        parameters = {name: true_shape(tensor) for name, tensor in self.engine.language_model.named_parameters()}
        if parameters != reader.parameters:
            other = min(set(parameters.items()) ^ set(reader.parameters.items()))
            raise ResumeRefusedError(f"{path} holds another model: {other[0]} differs", "set another run.dir")
        with torch.no_grad():
            for piece in self.engine.owned_slices():
                for kind, tensor in piece.tensors.items():
                    tensor.copy_(torch.from_numpy(reader.read(kind, piece.name, piece.start, piece.count)))
            for name, buffer in _persistent_buffers(self.engine.language_model).items():
                buffer.copy_(torch.from_numpy(reader.buffer(name).copy()))
        self.engine.resume(body)
        states = reader.random_states(self.world.rank) if reader.manifest.world_size == self.world.world_size else None
        if states is None:
            # Another number of ranks: the old streams have no owner, so each rank begins a new one, reproducibly.
            torch.manual_seed(hash((self.seed, state.step, self.world.rank)) & (2**63 - 1))
        else:
            set_generator_states(self.engine.kind, states)
        return state


def _persistent_buffers(model: Any) -> dict[str, torch.Tensor]:
    stored = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in stored}


def _to_host(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    # One slice at a time: a GPU's whole share of moments need not fit into host memory beside everything else.
    return tensor.detach().cpu().contiguous().numpy()


def _as_batch(ids: np.ndarray[Any, np.dtype[np.int64]]) -> MicroBatch:
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy()
    return MicroBatch(ids, np.full_like(ids, IGNORED), positions)
