"""Small real training runs for tests: cases that warm ranks run, and readers for what a run leaves behind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.checkpoint.slices import KINDS, SliceReader
from trainer.checkpoint.verify import find_checkpoint

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
}


def settings(run: Path, store: Path, **changes: Any) -> dict[str, Any]:
    """Values of a small CPU run; `changes` are `section__key=value`.

    A large epsilon keeps Adam well conditioned: where a gradient is about zero, the usual one turns rounding errors of
    any order of summation into full steps, and no two correct programs would agree.
    """
    values: dict[str, Any] = {
        "run": {"dir": str(run), "seed": 3},
        "model": {"config": dict(LLAMA), "dtype": "float32", "gradient_checkpointing": False},
        "data": {"train": str(store)},
        "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.1, "epsilon": 1e-5},
        "schedule": {"warmup_steps": 2},
        "train": {"max_steps": 6, "global_batch_size": 4, "micro_batch_size": 2},
        "engine": {"deepspeed": "zero2", "timeout_seconds": 60},
        "checkpoint": {"every_steps": 100},
        "logging": {"every_steps": 1, "tensorboard": False},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        values[section][key] = value
    return values


class StopAfter:
    """A stop request that comes in as soon as step `step` begins; step 0 never comes."""

    def __init__(self, step: int) -> None:
        self._step = step
        self._asked = 0

    @property
    def requested(self) -> str | None:
        """Asked once a step by the loop."""
        self._asked += 1
        return "test" if self._step and self._asked >= self._step else None


def train(
    world: Any,
    kind: str,
    values: dict[str, Any],
    stop_after: int = 0,
    allow_changes: Sequence[str] = (),
    trusted_code: str | None = None,
) -> str | None:
    """Case: one training run in the pool's process group; returns the user-facing error of this rank, if any."""
    from trainer.assemble import Allowed, train_joined
    from trainer.config.schema import Config
    from trainer.errors import SteadfastError
    from trainer.run_directory import RunDirectory

    config = Config.model_validate(values)
    run = RunDirectory(Path(config.run.dir))
    run.path.mkdir(parents=True, exist_ok=True)
    try:
        allowed = Allowed(tuple(allow_changes), trusted_code)
        train_joined(config, world, StopAfter(stop_after), run, kind, allowed)  # type: ignore[arg-type]
    except SteadfastError as error:
        return f"{error.exit_code}: {error}"
    return None


def train_beside_base(world: Any, kind: str, values: dict[str, Any]) -> str | None:
    """Case: as `train` for a LoRA run; at its end the live base model is compared with its file, bit by bit."""
    import deepspeed
    import torch
    from safetensors.torch import load_file

    from trainer.checkpoint.capture import RunSaver

    original, problems = RunSaver.finish, ["the run never saved"]

    def finish(self: RunSaver, state: Any, metrics: dict[str, float]) -> Any:
        engine = self.capture.engine
        stored = load_file(Path(values["run"]["dir"]) / "initial-model/model.safetensors")
        base = {name: p for name, p in engine.language_model.named_parameters() if not p.requires_grad}
        assert base.keys() == stored.keys()
        assert not base.keys() & engine.saved_parameters().keys()
        with deepspeed.zero.GatheredParameters(list(base.values())):
            problems[:] = [name for name, parameter in base.items() if not torch.equal(parameter, stored[name])]
        return original(self, state, metrics)

    RunSaver.finish = finish  # type: ignore[method-assign]
    try:
        return train(world, kind, values) or next(iter(problems), None)
    finally:
        RunSaver.finish = original  # type: ignore[method-assign]


def train_poisoned(world: Any, kind: str, values: dict[str, Any], rank: int, steps: list[int]) -> str | None:
    """Case: as `train`, but the loss of `rank` is NaN in the given steps (one micro-batch a step)."""
    from trainer.engine.deepspeed_engine import DeepSpeedEngine

    original, calls = DeepSpeedEngine.summed_loss, 0

    def summed_loss(self: DeepSpeedEngine, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(self, batch) * (float("nan") if world.rank == rank and calls in steps else 1.0)

    DeepSpeedEngine.summed_loss = summed_loss  # type: ignore[method-assign]
    try:
        found = train(world, kind, values)
        if found is None and world.rank == rank and calls < max(steps):
            return "the fault never fired"
        return found
    finally:
        DeepSpeedEngine.summed_loss = original  # type: ignore[method-assign]


def train_with_faults(world: Any, kind: str, values: dict[str, Any], faults: str) -> str | None:
    """Case: as `train`, with the faults of `trainer.observe.faults`."""
    import os

    from trainer.observe.faults import FAULTS

    os.environ[FAULTS] = faults
    try:
        return train(world, kind, values)
    finally:
        del os.environ[FAULTS]


def train_with_spoiled_weights(world: Any, kind: str, values: dict[str, Any], rank: int, step: int) -> str | None:
    """Case: as `train`, but after the optimizer step of `step` one master weight of `rank` is infinite."""
    from trainer.engine.deepspeed_engine import DeepSpeedEngine

    original, steps = DeepSpeedEngine.step, 0

    def spoiled(self: DeepSpeedEngine) -> tuple[float, bool]:
        nonlocal steps
        steps += 1
        result = original(self)
        if world.rank == rank and steps == step:
            self.owned_slices()[0].tensors["master"][0] = float("inf")
        return result

    DeepSpeedEngine.step = spoiled  # type: ignore[method-assign]
    try:
        return train(world, kind, values)
    finally:
        DeepSpeedEngine.step = original  # type: ignore[method-assign]


def train_with_full_disk(world: Any, kind: str, values: dict[str, Any], rank: int) -> str | None:
    """Case: as `train`, but writing slices fails on `rank` as on a full disk."""
    import errno

    from trainer.tensor_file import TensorFileWriter

    original = TensorFileWriter._put

    def put(self: TensorFileWriter, data: Any) -> None:
        if world.rank == rank and "rank-" in self.path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, data)

    TensorFileWriter._put = put  # type: ignore[method-assign]
    try:
        return train(world, kind, values)
    finally:
        TensorFileWriter._put = original  # type: ignore[method-assign]


def group_timeouts(world: Any, kind: str, seconds: int) -> list[float]:
    """Case: the timeouts of all process groups, DeepSpeed's own included, after they were bounded."""
    import deepspeed
    from torch.distributed import distributed_c10d

    from trainer import collectives

    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    distributed_c10d.new_group(list(range(world.world_size)))
    collectives.bound_all_groups(seconds)
    groups = list(distributed_c10d._world.pg_map)
    found = {group._get_backend(_cpu()).options._timeout.total_seconds() for group in groups}
    collectives.bound_all_groups(60)
    return sorted(found)


def _cpu() -> Any:
    import torch

    return torch.device("cpu")


def losses(run: Path) -> list[float]:
    """The loss of every step, in order."""
    entries = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [entry["train/loss"] for entry in entries if "train/loss" in entry]


def gathered(run: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Whole fp32 masters and moments of the newest checkpoint, by kind and parameter."""
    reader = SliceReader(find_checkpoint(run))
    return {
        f"{kind} {name}": reader.read(kind, name)
        for kind in KINDS
        for name in reader.parameters
        if kind in reader.kinds(name)
    }


def digest(run: Path) -> str:
    """sha256 over all masters and moments of the newest checkpoint."""
    total = hashlib.sha256()
    for name, array in gathered(run).items():
        total.update(name.encode() + array.tobytes())
    return total.hexdigest()


def largest_difference(left: Path, right: Path, kind: str = "master") -> float:
    """Largest absolute difference between the newest checkpoints' tensors of one kind."""
    first, second = gathered(left), gathered(right)
    assert first.keys() == second.keys()
    return max(float(np.abs(first[name] - second[name]).max()) for name in first if name.startswith(kind))


def train_among(
    world: Any, kind: str, size: int, meeting_point: str, values: dict[str, Any], stop_after: int = 0
) -> str | None:
    """Case: as `train`, but among the first `size` ranks of the pool only, in a process group of their own.

    Starting torch and DeepSpeed costs seconds a process; joining another group costs hundredths of one. They meet at
    the new file `meeting_point`.
    """
    import os
    from dataclasses import replace
    from datetime import timedelta

    import deepspeed.comm
    import torch.distributed as dist
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    # Ranks compare the numbers of their parameters and modules, and those that took part less often counted less.
    Init.param_id = 0
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0  # type: ignore[index]
    if dist.is_initialized():
        dist.destroy_process_group()
    deepspeed.comm.comm.cdb = None
    for name in ("_WORLD_GROUP", "_ZERO_PARAM_INTRA_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP", "_MODEL_PARALLEL_GROUP"):
        setattr(groups, name, None)
    if world.rank >= size:
        return None
    os.environ |= {"WORLD_SIZE": str(size), "RANK": str(world.rank), "LOCAL_RANK": str(world.rank)}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting_point}",
        rank=world.rank,
        world_size=size,
        timeout=timedelta(seconds=120),
    )
    return train(replace(world, world_size=size, local_world_size=size), kind, values, stop_after)


class DiskFills:
    """A stop request that never comes, and a disk that is full from one step on until another."""

    def __init__(self, place: Path, full_at: int, free_at: int) -> None:
        self._place, self._full_at, self._free_at = place, full_at, free_at
        self._asked = 0

    @property
    def requested(self) -> None:
        """Asked once a step by the loop."""
        from tests.support.small_disk import fill

        self._asked += 1
        if self._asked == self._full_at:
            fill(self._place, 0)
        if self._asked == self._free_at:
            (self._place / "ballast").unlink()


def train_while_the_disk_fills(
    world: Any, kind: str, values: dict[str, Any], place: str, full_at: int, free_at: int
) -> str | None:
    """Case: as `train`, but while it runs the disk at `place` has no room left, from one step to another."""
    from trainer.assemble import train_joined
    from trainer.config.schema import Config
    from trainer.errors import SteadfastError
    from trainer.run_directory import RunDirectory

    config = Config.model_validate(values)
    run = RunDirectory(Path(config.run.dir))
    run.path.mkdir(parents=True, exist_ok=True)
    stop = DiskFills(Path(place), full_at, free_at) if world.rank == 0 else StopAfter(0)
    try:
        train_joined(config, world, stop, run, kind)  # type: ignore[arg-type]
    except SteadfastError as error:
        return f"{error.exit_code}: {error}"
    return None


def train_and_save_with_deepspeed(world: Any, kind: str, values: dict[str, Any], out: str) -> str | None:
    """Case: as `train`; when the last checkpoint is due, DeepSpeed's own save_checkpoint writes one to `out` too."""
    from trainer.checkpoint.capture import RunSaver

    original = RunSaver.finish

    def finish(self: RunSaver, state: Any, metrics: dict[str, float]) -> Any:
        self.capture.engine._engine.save_checkpoint(out, tag="theirs")  # type: ignore[attr-defined]
        return original(self, state, metrics)

    RunSaver.finish = finish  # type: ignore[method-assign]
    try:
        return train(world, kind, values)
    finally:
        RunSaver.finish = original  # type: ignore[method-assign]
