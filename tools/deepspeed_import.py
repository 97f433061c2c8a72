"""Take over a run that DeepSpeed itself saved: its ZeRO (1, 2 or 3) or universal checkpoint becomes a slice checkpoint.

DeepSpeed's files are pickles. They are read with torch's weights_only unpickler and a list of four harmless classes,
and only by this command: nothing else of Steadfast reads a pickle. That unpickler had holes before; import only what
you would run.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.schema import Config
from trainer.errors import CheckpointError, DataError, MissingInputError, UsageError

ALLOWED_CLASSES = (
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)
"""Classes of DeepSpeed's own bookkeeping; each only holds numbers."""
KIND_NAMES = {"master": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")

Pieces = dict[tuple[str, str], list[Any]]
"""(kind, parameter) to the flat pieces of all ranks in order."""


@dataclass(frozen=True)
class ImportReport:
    """What was imported."""

    checkpoint: str
    source: str
    layout: str
    """ZeRO-1/2, ZeRO-3 or universal."""
    ranks: int
    """Ranks that had saved it."""
    step: int
    parameters: int


def import_checkpoint(config: Config, source: Path) -> ImportReport:
    """Write `source` as the first checkpoint of the run `config` describes; that run then resumes from it.

    The data position is that of a Steadfast run of as many steps; random streams begin anew. Raises UsageError when
    the run has checkpoints already, DataError when `source` is not of this model or holds something else.
    """
    from trainer.checkpoint.commit import Writer, commit_checkpoint
    from trainer.checkpoint.contents import write_contents
    from trainer.checkpoint.verify import committed_steps
    from trainer.data.store import open_store
    from trainer.prepare import (
        collect_model_files,
        model_directory,
        open_cache,
        prepare_model,
        row_spec,
        run_identity,
    )
    from trainer.run_directory import RunDirectory
    from trainer.world import World

    if config.model.lora is not None:
        raise UsageError("a LoRA run cannot be imported", "take model.lora out to import a whole model")
    source = directory_of(source)
    run = RunDirectory(Path(config.run.dir))
    lock = run.lock()
    try:
        if committed_steps(run.checkpoints):
            raise UsageError(f"{run.path} has checkpoints already", "set another run.dir")
        store = open_store(config.data.train, cache=open_cache(config, World(0, 1, 0, 1, "localhost", 0)))
        rows = store.plan(row_spec(config, store))
        prepare_model(config, store, rows, run)
        collect_model_files(config, store, run)
        layout, ranks, steps, pieces = read_deepspeed(source)
        expected = _expected(model_directory(config, run))
        named = _renamed(pieces, expected, source)
        contents = _contents(config, named, expected, steps, run.model_files)
        describe = _manifest_maker(
            config, expected, steps, run_identity(config, store, rows, run), {"imported_from": str(source)}
        )
        writer = Writer(0, lambda place: write_contents(contents, place), lambda message: [message])
        path = commit_checkpoint(run.checkpoints, steps, writer, describe, keep=config.checkpoint.keep)
    finally:
        lock.close()
    return ImportReport(str(path), str(source), layout, ranks, steps, sum(map(math.prod, expected.shapes.values())))


def directory_of(source: Path) -> Path:
    """The directory with the files: `source` itself, or the one its `latest` names."""
    if not source.is_dir():
        raise MissingInputError(f"there is no {source}", "give a directory that DeepSpeed's save_checkpoint wrote")
    latest = source / "latest"
    if latest.is_file():
        name = latest.read_text().strip()
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", name) or not (source / name).is_dir():
            raise DataError(f"{latest} names {name!r}, which is not there", "give the directory of one checkpoint")
        return source / name
    return source


def read_deepspeed(source: Path) -> tuple[str, int, int, Pieces]:
    """(layout, ranks, optimizer steps, pieces) of a DeepSpeed checkpoint directory."""
    if (source / "zero").is_dir():
        return _read_universal(source / "zero")
    files = {int(match[1]): path for path in source.iterdir() if (match := _RANK.search(path.name))}
    if not files:
        raise MissingInputError(
            f"{source} has neither zero/ (universal) nor zero_pp_rank_*_optim_states.pt", "is it of DeepSpeed?"
        )
    if sorted(files) != list(range(len(files))) or any("_mp_rank_00_" not in path.name for path in files.values()):
        raise DataError(f"{source} lacks the files of some ranks, or is tensor parallel", "only data parallel is read")
    pieces: Pieces = defaultdict(list)
    steps = 0
    layout = "ZeRO-1/2"
    for rank in sorted(files):
        state = load_untrusted(files[rank])["optimizer_state_dict"]
        if "fp32_flat_groups" in state:
            layout = "ZeRO-3"
            shapes = load_untrusted(files[rank].with_name(f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"))
            found = _pieces_of_stage3(state, shapes["param_shapes"], rank, len(files))
        else:
            found = _pieces_of_stage1_and_2(state)
        for kind, name, piece, step in found:
            pieces[kind, name].append(piece)
            steps = max(steps, step)
    return layout, len(files), steps, pieces


def load_untrusted(path: Path) -> Any:
    """The content of a .pt file, by the restricted unpickler; DataError when it holds anything but plain data."""
    import pickle

    import torch

    allowed = [getattr(importlib.import_module(module), name) for module, name in ALLOWED_CLASSES]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise MissingInputError(f"there is no {path}", "copy the whole checkpoint") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        blocked = re.search(r"GLOBAL (\S+)", reason)
        why = f"it holds {blocked[1]}, which is not plain data" if blocked else reason[:200]
        raise DataError(f"{path} is not read: {why}", "nothing was run; take it over as an exported model") from error


def _pieces_of_stage1_and_2(state: Any) -> Iterator[tuple[str, str, Any, int]]:
    groups = state["base_optimizer_state"]
    groups = groups["state"] if isinstance(groups, dict) else dict(enumerate(groups))
    for group, fragments in enumerate(state["param_slice_mappings"]):
        moments, flat = groups[group], state["single_partition_of_fp32_groups"][group]
        for name, place in fragments.items():
            for kind in KIND_NAMES:
                tensor = flat if kind == "master" else moments[kind]
                yield kind, name, tensor.view(-1).narrow(0, place.start, place.numel), int(moments.get("step", 0))


def _pieces_of_stage3(state: Any, shapes: Any, rank: int, ranks: int) -> Iterator[tuple[str, str, Any, int]]:
    import torch

    moments = state["optimizer_state_dict"]["state"]
    # The groups of an optimizer are cut further into sub-groups; one after the other they are whole again.
    flat = {"master": torch.cat([group.view(-1) for group in state["fp32_flat_groups"]])}
    for kind in ("exp_avg", "exp_avg_sq"):
        flat[kind] = torch.cat([moments[index][kind].view(-1) for index in sorted(moments)])
    step = max((int(entry.get("step", 0)) for entry in moments.values()), default=0)
    offset = 0
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        elements = math.prod(shape)
        share = -(-elements // ranks)
        for kind in KIND_NAMES:
            yield kind, name, flat[kind].narrow(0, offset, max(0, min(share, elements - rank * share))), step
        offset += share


def _read_universal(zero: Path) -> tuple[str, int, int, Pieces]:
    pieces: Pieces = {}
    steps = 0
    for directory in sorted(path for path in zero.iterdir() if (path / "fp32.pt").is_file()):
        for kind, name in KIND_NAMES.items():
            found = load_untrusted(directory / f"{name}.pt")
            pieces[kind, directory.name] = [(found["param"] if isinstance(found, dict) else found).reshape(-1)]
        if (directory / "step.pt").is_file():
            steps = max(steps, int(load_untrusted(directory / "step.pt")))
    if not steps and (zero / "optimizer_state.pt").is_file():
        # Converted from ZeRO-3, the count of steps is only among what all ranks had in common.
        common = load_untrusted(zero / "optimizer_state.pt")["optimizer_state_dict"]["state"]
        steps = max((int(entry.get("step", 0)) for entry in common.values()), default=0)
    return "universal", 1, steps, pieces


@dataclass(frozen=True)
class _Expected:
    shapes: dict[str, tuple[int, ...]]
    tied: dict[str, str]


def _expected(model: Path) -> _Expected:
    from tools.model_directory.loading import load_config, model_on_meta
    from trainer.model.load import tied_names

    network = model_on_meta(load_config(model))
    stored = network.state_dict(keep_vars=True)
    if buffers := sorted(name for name, _ in network.named_buffers() if name in stored):
        raise DataError(f"{model} has the buffer {buffers[0]}, which a ZeRO checkpoint lacks", "import cannot take it")
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    return _Expected(shapes, tied_names(network))


def _renamed(pieces: Pieces, expected: _Expected, source: Path) -> Pieces:
    """Pieces under the names of the model: DeepSpeed puts those of what it wrapped in front (`module.`)."""
    names = {name for _, name in pieces}
    first = next(iter(expected.shapes))
    for prefix in sorted({name.removesuffix(first) for name in names if name.endswith(first)}, key=len):
        if {f"{prefix}{name}" for name in expected.shapes} == names:
            found = {(kind, name): pieces[kind, f"{prefix}{name}"] for kind in KIND_NAMES for name in expected.shapes}
            break
    else:
        odd = min(names.symmetric_difference(expected.shapes))
        raise DataError(f"{source} is not a checkpoint of this model: {odd}", "set model.path to its configuration")
    for (kind, name), parts in found.items():
        if (size := sum(part.numel() for part in parts)) != math.prod(expected.shapes[name]):
            raise DataError(
                f"{source}: the {kind} of {name} has {size} elements, the model {math.prod(expected.shapes[name])}",
                "set model.path to the configuration of that run",
            )
    return found


def _contents(config: Config, named: Pieces, expected: _Expected, steps: int, model_files: Path) -> Any:
    import torch

    from trainer.checkpoint.contents import RankContents, TensorSource, from_array
    from trainer.checkpoint.slices import KINDS, rank_file, slice_key
    from trainer.engine.device import generator_states
    from trainer.state import TrainState
    from trainer.tensor_file import DTYPE_NAMES

    def filling(parts: list[Any], name: str) -> Callable[[np.ndarray[Any, Any]], None]:
        def fill(target: np.ndarray[Any, Any]) -> None:
            torch.cat([part.detach().float() for part in parts], out=torch.from_numpy(target))
            if not np.isfinite(target).all():
                raise CheckpointError(f"{name} holds a number that is not finite", "import an earlier checkpoint")

        return fill

    own = {
        slice_key(kind, 0, name): TensorSource("F32", (math.prod(shape),), filling(named[kind, name], name))
        for kind in KINDS
        for name, shape in expected.shapes.items()
    }
    torch.manual_seed(config.run.seed)
    for name, array in generator_states("cpu").items():
        own[f"rng:{name}"] = from_array(array, DTYPE_NAMES[array.dtype])
    body = {
        "progress": TrainState(step=steps).as_json(),
        "feed": {"position": steps * config.train.global_batch_size},
        "optimizer_steps": steps,
        "schedule_steps": steps,
    }
    return RankContents(
        {rank_file(0, 1): own},
        texts={"state.json": json.dumps(body, indent=1) + "\n"},
        copies={f"model/{file.name}": file for file in sorted(model_files.iterdir())},
    )


def _manifest_maker(
    config: Config, expected: _Expected, steps: int, identity: dict[str, str], provenance: dict[str, Any]
) -> Any:
    from trainer.checkpoint.verify import Manifest

    def describe(files: dict[str, dict[str, Any]]) -> Manifest:
        return Manifest(
            step=steps,
            world_size=1,
            files=files,
            parameters={
                name: {"shape": list(shape), "dtype": config.model.dtype} for name, shape in expected.shapes.items()
            },
            tied=expected.tied,
            buffers={},
            identity=identity,
            provenance=provenance,
        )

    return describe
