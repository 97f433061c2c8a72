"""int8 of our own: every weight matrix but the head becomes one byte a weight, with a scale per output channel.

Read by `tools.model_directory.loading.load_model`; plain transformers finds no weights under its own names and says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import torch

SHARD_BYTES = 5 * 10**9
# Not F16: products with unscaled int8 values leave its range.
READABLE = ("F32", "BF16")
Plan = dict[str, tuple[str, tuple[int, ...]]]


class WeightOnly:
    """Writes `model` (a directory) as int8. DataError when it has nothing to quantize, or lacks a weight."""

    def __init__(self, model: Path) -> None:
        from tools.model_directory.int8 import quantized_layers
        from tools.model_directory.loading import load_config, model_on_meta, weight_files
        from tools.model_directory.writing import tensor_bytes

        self._files = weight_files(model, "model")
        self._layers = quantized_layers(model_on_meta(load_config(model)))
        if absent := [name for name in self._layers if f"{name}.weight" not in self._files]:
            raise DataError(f"{model} lacks {absent[0]}.weight", "give a complete model in the transformers layout")
        if not self._layers:
            raise DataError(f"{model} has no linear layers that int8 covers", "serve it as it is")
        self._plan = plan(self._files, {f"{name}.weight" for name in self._layers})
        self.expected_bytes = tensor_bytes(self._plan)

    def write(self, building: Path) -> int:
        """Weights and what explains them; the number of quantized layers."""
        from tools.model_directory.int8 import SCHEME
        from tools.model_directory.loading import INT8_STEM, QUANTIZATION_NAME
        from tools.model_directory.writing import write_weights
        from trainer.durable import write_file

        write_weights(building, INT8_STEM, self._plan, _Reader(self._files, self._plan), SHARD_BYTES)
        about = {"scheme": SCHEME, "layers": self._layers, "scales": "per output channel, symmetric"}
        write_file(building / QUANTIZATION_NAME, json.dumps(about, indent=1) + "\n")
        return len(self._layers)


def plan(files: dict[str, Path], quantized: set[str]) -> Plan:
    """What the new file holds: the weights called `quantized` as I8 with a scale, the others as they are."""
    from safetensors import safe_open

    found: Plan = {}
    for name, path in files.items():
        with safe_open(path, framework="pt") as file:
            piece = file.get_slice(name)
            shape = tuple(piece.get_shape())
            dtype = str(piece.get_dtype())
        if name not in quantized:
            found[name] = (dtype, shape)
            continue
        if dtype not in READABLE or len(shape) != 2:
            raise DataError(f"{path}: {name} is {dtype} with shape {shape}", "give a model in float32 or bfloat16")
        found[name] = ("I8", shape)
        found[f"{name}_scale"] = ("F32", (shape[0],))
    return found


class _Reader:
    """Gives the tensors of the new file in order; keeps the scales of the matrix just given, nothing else."""

    def __init__(self, files: dict[str, Path], plan: Plan) -> None:
        self._files = files
        self._plan = plan
        self._scale: torch.Tensor | None = None

    def __call__(self, name: str) -> np.ndarray[Any, Any]:
        import torch
        from safetensors import safe_open

        from tools.model_directory.int8 import quantize_rows

        if name not in self._files and self._scale is not None:
            scale: np.ndarray[Any, Any] = self._scale.numpy()
            return scale
        with safe_open(self._files[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise DataError(f"{self._files[name]}: {name} holds values that are not finite", "export an earlier step")
        if self._plan[name][0] == "I8" and tensor.is_floating_point():
            tensor, self._scale = quantize_rows(tensor)
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.view(torch.int16)
        result: np.ndarray[Any, Any] = tensor.contiguous().numpy()
        return result
