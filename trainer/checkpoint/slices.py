"""Slices: how the parameters of a sharded model lie in files, and how any range of one is read back.

A slice is a run of consecutive elements of one flattened parameter, as one rank owns it. Its tensor in the rank's
file is called `kind:start:parameter`, kind being `master` (fp32 weights; of a frozen parameter the only one, in the
model's dtype), `exp_avg` or `exp_avg_sq`. Because slices
carry their place and not their rank, a reader needs to know neither world size nor ZeRO stage. Torch-free.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.checkpoint.verify import damaged, read_manifest
from trainer.errors import DataError
from trainer.tensor_file import TensorFile

KINDS = ("master", "exp_avg", "exp_avg_sq")
Floats = np.ndarray[Any, np.dtype[np.float32]]


def rank_file(rank: int, world_size: int) -> str:
    """Name of the file that `rank` writes."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def slice_key(kind: str, start: int, parameter: str) -> str:
    """Name of a slice inside a rank's file."""
    return f"{kind}:{start}:{parameter}"


def parameter_of(key: str) -> str | None:
    """The parameter that the tensor called `key` in a rank's file is a slice of; None when it is something else."""
    kind, _, rest = key.partition(":")
    return rest.partition(":")[2] if kind in KINDS else None


@dataclass(frozen=True)
class _Slice:
    start: int
    count: int
    file: TensorFile
    key: str


class SliceReader:
    """Read ranges of parameters from a checkpoint directory that was verified before.

    `parameters` maps each name to its shape in model order. Opening reads headers only.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        self.parameters = {name: tuple(entry["shape"]) for name, entry in self.manifest.parameters.items()}
        found: dict[tuple[str, str], list[_Slice]] = defaultdict(list)
        self._files: dict[str, TensorFile] = {}
        for rank in range(self.manifest.world_size):
            name = rank_file(rank, self.manifest.world_size)
            try:
                file = self._files[name] = TensorFile(path / name)
            except (DataError, OSError) as error:
                raise damaged(path, f"{name} cannot be read") from error
            for key, entry in file.entries.items():
                if key.partition(":")[0] in KINDS:
                    kind, start, parameter = key.split(":", 2)
                    found[kind, parameter].append(_Slice(int(start), math.prod(entry.shape), file, key))
        for key_pair, slices in found.items():
            slices.sort(key=lambda piece: piece.start)
            self._check_tiling(*key_pair, slices)
        self._slices = dict(found)
        for parameter in self.parameters:
            for kind in self.kinds(parameter):
                if (kind, parameter) not in self._slices:
                    raise damaged(path, f"{parameter} has no {kind} slices")

    def kinds(self, parameter: str) -> tuple[str, ...]:
        """What is stored of a parameter: a frozen one has no moments."""
        return KINDS[:1] if self.manifest.parameters[parameter].get("frozen") else KINDS

    def read(self, kind: str, parameter: str, start: int = 0, count: int | None = None) -> Floats:
        """Elements [start, start + count) of the flattened parameter (default: to its end), fp32, newly allocated."""
        stop = math.prod(self.parameters[parameter]) if count is None else start + count
        result = np.empty(stop - start, dtype=np.float32)
        for piece in self._slices[kind, parameter]:
            begin, end = max(start, piece.start), min(stop, piece.start + piece.count)
            if begin < end:
                _read_fp32(piece, begin - piece.start, result[begin - start : end - start])
        return result

    def buffer(self, name: str) -> np.ndarray[Any, Any]:
        """A persistent buffer; floating-point ones are stored as fp32."""
        return self._files[rank_file(0, self.manifest.world_size)].array(f"buffer:0:{name}")

    def random_states(self, rank: int) -> dict[str, np.ndarray[Any, Any]] | None:
        """Generator name to its state as saved by `rank`; None when fewer ranks saved."""
        file = self._files.get(rank_file(rank, self.manifest.world_size))
        if file is None:
            return None
        return {key.removeprefix("rng:"): file.array(key) for key in file.entries if key.startswith("rng:")}

    def _check_tiling(self, kind: str, parameter: str, slices: list[_Slice]) -> None:
        if parameter not in self.parameters:
            raise damaged(self.path, f"{parameter} is in a file and not in the manifest")
        position = 0
        for piece in slices:
            if piece.start != position:
                raise damaged(self.path, f"the {kind} slices of {parameter} leave a gap or overlap at {position}")
            position += piece.count
        if position != math.prod(self.parameters[parameter]):
            raise damaged(self.path, f"the {kind} slices of {parameter} end at {position}")


def _read_fp32(piece: _Slice, start: int, target: Floats) -> None:
    """Fill `target` with the elements of a slice from `start` on."""
    dtype = piece.file.entries[piece.key].dtype
    if dtype == "F32":
        piece.file.read(piece.key, start, target.size, into=target)
        return
    found = piece.file.read(piece.key, start, target.size)
    if dtype == "BF16":
        # bfloat16 is the upper half of fp32.
        np.left_shift(found, 16, out=target.view(np.uint32), dtype=np.uint32)
    else:
        target[:] = found


def files_to_hash(manifest_files: dict[str, Any], rank: int, world_size: int) -> Iterator[str]:
    """The share of a checkpoint's files that `rank` hashes at load: each file is read by exactly one rank."""
    return (name for index, name in enumerate(sorted(manifest_files)) if index % world_size == rank)
