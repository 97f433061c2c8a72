"""The tensors of a slice checkpoint as an export wants them: named and shaped as its architecture says, piece by piece.

The checkpoint's `model/config.json` decides what has to be there; a tensor that is missing, unknown or of another shape
is an error before anything is written. Whoever saved it (ranks, ZeRO stage, frozen parts) makes no difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tools.model_directory.pieces import FILE_DTYPES, PIECE_ELEMENTS, in_file_dtype, is_finite
from trainer.errors import CheckpointError, DataError, UsageError

if TYPE_CHECKING:
    import torch

    from trainer.checkpoint.slices import Floats
    from trainer.checkpoint.verify import Manifest


class Weights(Protocol):
    """The parameters of a checkpoint, whole or LoRA: SliceReader, MergedWeights or AdapterWeights."""

    @property
    def path(self) -> Path:
        """Directory of the checkpoint."""

    @property
    def manifest(self) -> Manifest:
        """Its manifest."""

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Each name to its shape, in model order."""

    def read(self, kind: str, parameter: str, start: int = 0, count: int | None = None) -> Floats:
        """Elements of a flattened parameter, fp32, newly allocated."""

    def buffer(self, name: str) -> np.ndarray[Any, Any]:
        """A persistent buffer."""


@dataclass(frozen=True)
class CheckpointTensors:
    """What will be written: `plan` is stored tensor name to (safetensors dtype, shape), in model order."""

    reader: Weights
    dtype: str
    plan: dict[str, tuple[str, tuple[int, ...]]]
    buffers: frozenset[str]
    architecture: str
    """Class of transformers that the model is, e.g. LlamaForCausalLM."""

    @property
    def parameters(self) -> int:
        """Elements of all tensors that are trained or frozen, buffers not counted."""
        return sum(math.prod(shape) for name, (_, shape) in self.plan.items() if name not in self.buffers)

    def pieces(self, name: str) -> Iterator[np.ndarray[Any, Any]]:
        """Consecutive elements of a tensor in the dtype of the file; bfloat16 as 16-bit patterns.

        Raises DataError when a value is not finite, in the checkpoint or in that dtype.
        """
        import torch

        if name in self.buffers:
            values = self.reader.buffer(name)
            if not np.issubdtype(values.dtype, np.floating):
                yield values
                return
            yield self._in_file_dtype(name, torch.from_numpy(np.array(values, dtype=np.float32)))
            return
        total = math.prod(self.plan[name][1])
        for start in range(0, total, PIECE_ELEMENTS):
            count = min(PIECE_ELEMENTS, total - start)
            yield self._in_file_dtype(name, torch.from_numpy(self.reader.read("master", name, start, count)))

    def _in_file_dtype(self, name: str, values: torch.Tensor) -> np.ndarray[Any, Any]:
        if not is_finite(values):
            raise DataError(
                f"checkpoint {self.reader.path}: {name} holds values that are not finite",
                "export an earlier checkpoint",
            )
        return in_file_dtype(name, values, self.dtype)


def trained_dtype(reader: Weights) -> str:
    """The dtype most of the weights had in the live model (some models keep a few in fp32)."""
    counts: dict[str, int] = {}
    for entry in reader.manifest.parameters.values():
        name = str(entry["dtype"]).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + math.prod(entry["shape"])
    return max(counts, key=lambda name: counts[name], default="float32")


def open_checkpoint(checkpoint: Path, dtype: str | None = None, base: Path | None = None) -> CheckpointTensors:
    """The tensors of a checkpoint that was verified before, in `dtype` (default: the one it was trained in).

    Those of a LoRA checkpoint are merged into its `base` (see `tools.exporting.adapter.find_base`).

    Compares names and shapes with the architecture. Raises CheckpointError naming the first difference, UsageError for
    a dtype that is not exported.
    """
    from tools.model_directory.loading import load_config, model_on_meta
    from trainer.adapter_file import read_adapter_config
    from trainer.checkpoint.slices import SliceReader

    reader: Weights = SliceReader(checkpoint)
    adapter = read_adapter_config(checkpoint / "model")
    if adapter is not None:
        from tools.exporting.adapter import MergedWeights

        reader = MergedWeights(SliceReader(checkpoint), adapter, base or Path(adapter.base))
    dtype = _file_dtype(reader, dtype)
    model = model_on_meta(load_config(checkpoint / "model"))
    # named_parameters and named_buffers yield a shared tensor once, under its first name.
    persistent = set(model.state_dict())
    expected = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    expected_buffers = {name: tensor for name, tensor in model.named_buffers() if name in persistent}
    stored = dict(reader.parameters)
    for alias in sorted(set(stored) - set(expected)):
        if alias in persistent and alias not in expected_buffers:
            _drop_alias(reader, stored, alias, _owner(model, alias))
    _same_names("weight", expected, stored, reader)
    for name, shape in expected.items():
        if stored[name] != shape:
            raise CheckpointError(
                f"checkpoint {reader.path}: {name} has shape {stored[name]}, the architecture wants {shape}",
                "the checkpoint's model/config.json is not the one it was trained with",
            )
    _same_names("buffer", expected_buffers, dict(reader.manifest.buffers), reader)
    file_dtype = FILE_DTYPES[dtype]
    plan = {name: (file_dtype, shape) for name, shape in stored.items()}
    for name, tensor in expected_buffers.items():
        kind = file_dtype if tensor.is_floating_point() else _integer_dtype(reader, name)
        plan[name] = (kind, tuple(tensor.shape))
    return CheckpointTensors(reader, dtype, plan, frozenset(expected_buffers), type(model).__name__)


def open_adapter(checkpoint: Path, dtype: str | None = None) -> CheckpointTensors:
    """The tensors of a verified LoRA checkpoint as its adapter's file holds them, in `dtype`; UsageError for others."""
    from tools.exporting.adapter import AdapterWeights
    from tools.model_directory.loading import load_config, model_on_meta
    from trainer.adapter_file import read_adapter_config
    from trainer.checkpoint.slices import SliceReader

    if read_adapter_config(checkpoint / "model") is None:
        raise UsageError(f"{checkpoint} is no LoRA checkpoint", "leave --lora out: it is exported whole")
    reader = AdapterWeights(SliceReader(checkpoint))
    dtype = _file_dtype(reader, dtype)
    plan = {name: (FILE_DTYPES[dtype], shape) for name, shape in reader.parameters.items()}
    architecture = type(model_on_meta(load_config(checkpoint / "model"))).__name__
    return CheckpointTensors(reader, dtype, plan, frozenset(), architecture)


def _file_dtype(reader: Weights, asked: str | None) -> str:
    dtype = asked or trained_dtype(reader)
    if dtype not in FILE_DTYPES:
        raise UsageError(f"dtype {dtype} cannot be exported", f"choose {' or '.join(FILE_DTYPES)}")
    return dtype


def _same_names(what: str, expected: dict[str, Any], stored: dict[str, Any], reader: Weights) -> None:
    missing = [name for name in expected if name not in stored]
    unexpected = [name for name in stored if name not in expected]
    for problem, names in (("lacks", missing), ("holds the unknown", unexpected)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(
                f"checkpoint {reader.path} {problem} {what} {names[0]}{more}",
                "the checkpoint's model/config.json is not the one it was trained with",
            )


def _owner(model: Any, alias: str) -> str:
    """The first name of the parameter that `alias` also names."""
    tensor = dict(model.named_parameters(remove_duplicate=False))[alias]
    return next(str(name) for name, candidate in model.named_parameters() if candidate is tensor)


def _drop_alias(reader: Weights, stored: dict[str, tuple[int, ...]], alias: str, owner: str) -> None:
    """Leave out `alias`, which the configuration ties to `owner`, if both are stored and equal bit by bit."""
    if owner not in stored:
        stored[owner] = stored.pop(alias)
        return
    if stored[alias] != stored[owner] or not _equal_bits(reader, alias, owner):
        raise CheckpointError(
            f"checkpoint {reader.path}: {alias} and {owner} differ, but the configuration ties them",
            "set tie_word_embeddings to false in the checkpoint's model/config.json",
        )
    del stored[alias]


def _equal_bits(reader: Weights, first: str, second: str) -> bool:
    total = math.prod(reader.parameters[first])
    for start in range(0, total, PIECE_ELEMENTS):
        count = min(PIECE_ELEMENTS, total - start)
        one, other = (reader.read("master", name, start, count).view(np.uint32) for name in (first, second))
        if not np.array_equal(one, other):
            return False
    return True


def _integer_dtype(reader: Weights, name: str) -> str:
    from trainer.tensor_file import DTYPE_NAMES

    return str(DTYPE_NAMES[reader.buffer(name).dtype])
