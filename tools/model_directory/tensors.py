"""The weights of a model directory in the transformers layout, piece by piece, and whether they are all there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.model_directory.pieces import PIECE_ELEMENTS, is_finite
from trainer.errors import DataError
from trainer.tensor_file import TensorFile

if TYPE_CHECKING:
    import torch

WEIGHTS_STEM = "model"


class ModelTensors:
    """Opens the headers of all weight files of `path`; reads what is asked for and keeps nothing.

    `shapes` and `dtypes` (as safetensors calls them) map every tensor name, sorted by file and place. Raises
    MissingInputError when there are no safetensors weights, DataError when a file and the index contradict each other.
    """

    def __init__(self, path: Path, stem: str = WEIGHTS_STEM) -> None:
        from tools.model_directory.loading import weight_files

        self.path = path
        listed = weight_files(path, stem)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._files: dict[str, TensorFile] = {}
        for file_path in sorted(set(listed.values())):
            try:
                file = TensorFile(file_path)
            except OSError as error:
                raise DataError(
                    f"{file_path} cannot be read: {error.strerror}", "restore it from its source"
                ) from error
            for name, entry in sorted(file.entries.items(), key=lambda item: item[1].begin):
                if listed.get(name) != file_path:
                    raise DataError(f"{file_path} holds {name}, which the index does not name", "export again")
                self._files[name] = file
                self.shapes[name] = entry.shape
                self.dtypes[name] = entry.dtype
        if absent := sorted(set(listed) - set(self.shapes)):
            raise DataError(f"{listed[absent[0]]} lacks {absent[0]}, which the index names", "export again")

    def values(self, name: str, start: int, count: int) -> torch.Tensor:
        """Elements [start, start + count) of the flattened tensor in its own dtype; a copy."""
        import torch

        tensor = torch.from_numpy(self._files[name].read(name, start, count))
        return tensor.view(torch.bfloat16) if self.dtypes[name] == "BF16" else tensor

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """All elements in order, at most PIECE_ELEMENTS at a time."""
        total = math.prod(self.shapes[name])
        for start in range(0, total, PIECE_ELEMENTS):
            yield self.values(name, start, min(PIECE_ELEMENTS, total - start))

    def whole(self, name: str) -> torch.Tensor:
        """One tensor with its shape."""
        return self.values(name, 0, math.prod(self.shapes[name])).reshape(self.shapes[name])


def architecture_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """The tensors that a causal language model of `config` is stored as: a tied one once, buffers if persistent."""
    from tools.model_directory.loading import model_on_meta

    model = model_on_meta(config)
    persistent = set(model.state_dict())
    shapes = {str(name): tuple(tensor.shape) for name, tensor in model.named_parameters()}
    return shapes | {str(name): tuple(tensor.shape) for name, tensor in model.named_buffers() if name in persistent}


def check_inventory(tensors: ModelTensors, expected: dict[str, tuple[int, ...]]) -> None:
    """DataError naming a tensor that is missing, unknown, empty, of another shape, or holds a value that is not finite.

    Reads every weight once.
    """
    if missing := [name for name in expected if name not in tensors.shapes]:
        raise DataError(f"{tensors.path} lacks {_first(missing)}, which its architecture wants", "export again")
    if extra := [name for name in tensors.shapes if name not in expected]:
        raise DataError(f"{tensors.path} holds {_first(extra)}, which its architecture does not know", "export again")
    for name, shape in tensors.shapes.items():
        if shape != expected[name]:
            raise DataError(
                f"{tensors.path}: {name} has shape {shape}, its architecture wants {expected[name]}", "export again"
            )
        if not math.prod(shape):
            raise DataError(f"{tensors.path}: {name} is empty", "export again")
        if not all(map(is_finite, tensors.pieces(name))):
            raise DataError(f"{tensors.path}: {name} holds values that are not finite", "export an earlier checkpoint")


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
