"""How any number of ranks takes up a saved run again."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.capture import Capture, persistent_buffers
from trainer.checkpoint.commit import Exchange
from trainer.checkpoint.retention import sweep
from trainer.checkpoint.slices import SliceReader, files_to_hash
from trainer.checkpoint.verify import (
    committed_steps,
    damaged,
    read_manifest,
    refuse_foreign_files,
    step_directory,
    verify_files,
)
from trainer.config.resume_law import accept_identity
from trainer.engine.device import set_generator_states
from trainer.engine.partitions import true_shape
from trainer.errors import CheckpointError, ResumeRefusedError
from trainer.state import TrainState


@dataclass(frozen=True)
class Restorer:
    """Takes the newest valid checkpoint up again. Every rank has one; `restore` is collective."""

    directory: Path
    capture: Capture
    exchange: Exchange
    seed: int
    strict: bool
    """A damaged newest checkpoint is an error, even when one before it is valid."""
    allow_changes: Sequence[str] = ()
    """Names of the identity that may differ from the checkpoint's all the same (see `trainer.config.resume_law`)."""

    def restore(self) -> TrainState | None:
        """Load the newest valid checkpoint into engine and feed and return its state; None when there is none at all.

        A damaged checkpoint is named on stderr and the one before it is taken. Raises CheckpointError when all are
        damaged (or, if strict, the newest is), ResumeRefusedError when the checkpoint belongs to another model, data
        or batch.
        """
        if self.capture.world.is_first:
            sweep(self.directory)
        steps = self.exchange({"steps": committed_steps(self.directory)})[0]["steps"]
        failures: list[str] = []
        for step in steps:
            path = step_directory(self.directory, step)
            problem = self._problem_on_any_rank(path)
            if problem is None:
                if failures and self.capture.world.is_first:
                    lost = steps[0] - step
                    sys.stderr.write(f"warning: {failures[0]}; continuing from step {step}, {lost} steps earlier\n")
                return self._load(path)
            failures.append(problem)
            if self.strict:
                raise CheckpointError(
                    failures[0], "restore it from a copy, or go on from the one before it without checkpoint.strict"
                )
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
        world = self.capture.world
        try:
            manifest = read_manifest(path)
            if world.is_first:
                refuse_foreign_files(path, manifest)
            verify_files(path, manifest, files_to_hash(manifest.files, world.rank, world.world_size))
        except CheckpointError as error:
            return error.fact
        return None

    def _load(self, path: Path) -> TrainState:
        engine, feed, world = self.capture.engine, self.capture.feed, self.capture.world
        reader = SliceReader(path)
        accept_identity(str(path), reader.manifest.identity, self.capture.identity, self.allow_changes)
        try:
            body = json.loads((path / "state.json").read_text())
            state = replace(TrainState(), **body["progress"])
            feed.load_state_dict(body["feed"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise damaged(path, "state.json is not what this version writes") from error
        _refuse_other_parameters(path, reader, engine.saved_parameters())
        with torch.no_grad():
            for piece in engine.held_slices():
                for kind, tensor in piece.tensors.items():
                    tensor.copy_(torch.from_numpy(reader.read(kind, piece.name, piece.start, piece.count)))
            for name, buffer in persistent_buffers(engine.language_model).items():
                buffer.copy_(torch.from_numpy(reader.buffer(name).copy()))
        engine.resume(body)
        states = reader.random_states(world.rank) if reader.manifest.world_size == world.world_size else None
        if states is None:
            # Another number of ranks: the old streams have no owner, so each rank begins a new one, reproducibly.
            torch.manual_seed(hash((self.seed, state.step, world.rank)) & (2**63 - 1))
        else:
            set_generator_states(engine.kind, states)
        return state


def _refuse_other_parameters(path: Path, reader: SliceReader, parameters: dict[str, Any]) -> None:
    shapes = {name: true_shape(parameter) for name, parameter in parameters.items()}
    if shapes != reader.parameters:
        other = min(set(shapes.items()) ^ set(reader.parameters.items()))
        raise ResumeRefusedError(f"{path} holds another model: {other[0]} differs", "set another run.dir")
    for name, parameter in parameters.items():
        if parameter.requires_grad == bool(reader.manifest.parameters[name].get("frozen")):
            was = "frozen" if parameter.requires_grad else "trained"
            raise ResumeRefusedError(
                f"{path}: {name} was {was} in that run", "restore model.trainable, or set another run.dir"
            )
