"""LoRA checkpoints at export: merged into a whole model, or apart as an adapter that peft, transformers and vLLM load.

A LoRA checkpoint holds the adapter only. Its base is read from where training read it, or from `--base`, and must have
the content that training saw. Merged weights are base + alpha / rank * B A in fp32, computed piece by piece.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from tools.model_directory.loading import load_config, model_on_meta, weight_files
from trainer.adapter_file import (
    CONFIG_NAME,
    STEM,
    AdapterConfig,
    adapted_modules,
    parameter_names,
    read_adapter_config,
    stored_name,
)
from trainer.checkpoint.slices import Floats, SliceReader
from trainer.errors import DataError, MissingInputError
from trainer.weight_files import weights_fingerprint

_BEYOND_LORA = ("use_dora", "use_rslora", "modules_to_save", "bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern")


class MergedWeights:
    """The whole model of a LoRA checkpoint on its `base` (see `find_base`), read as SliceReader reads any other."""

    def __init__(self, adapter_weights: SliceReader, adapter: AdapterConfig, base: Path) -> None:
        self._reader, self._scale = adapter_weights, adapter.scale
        self.path, self.manifest = adapter_weights.path, adapter_weights.manifest
        self._factors = {
            f"{name}.weight": parameter_names(name) for name in adapted_modules(adapter_weights.parameters)
        }
        known = set(model_on_meta(load_config(self.path / "model")).state_dict()) - set(self.manifest.buffers)
        self._files = {name: file for name, file in weight_files(base, "model").items() if name in known}
        self.parameters = {name: _shape(file, name) for name, file in self._files.items()}
        # Pieces of one weight follow each other, and all of them need both factors.
        self._factor = lru_cache(maxsize=2)(self._read_factor)

    def read(self, kind: str, parameter: str, start: int = 0, count: int | None = None) -> Floats:
        """Elements [start, start + count) of the flattened parameter (default: to its end), fp32, newly allocated.

        `kind` is master: there are no moments of a merged weight. The product is computed for the rows that the range
        touches, so the last bits of an element may depend on where pieces begin.
        """
        shape = self.parameters[parameter]
        stop = math.prod(shape) if count is None else start + count
        width = math.prod(shape[1:])
        first, last = start // width, -(-stop // width)
        with safe_open(self._files[parameter], framework="pt") as file:
            stored = file.get_slice(parameter)
            rows = (stored[first:last] if shape else stored[...]).float()
        if parameter in self._factors:
            down, up = (self._factor(kind, name) for name in self._factors[parameter])
            rows.addmm_(up[first:last], down, alpha=self._scale)
        # A copy: the rows may be a view of the mapped file.
        merged: Floats = np.array(rows.reshape(-1).numpy()[start - first * width : stop - first * width])
        return merged

    def buffer(self, name: str) -> np.ndarray[Any, Any]:
        """See SliceReader.buffer."""
        return self._reader.buffer(name)

    def _read_factor(self, kind: str, parameter: str) -> torch.Tensor:
        return torch.from_numpy(self._reader.read(kind, parameter)).view(self._reader.parameters[parameter])


class AdapterWeights:
    """The parameters of a LoRA checkpoint under the names that they have in adapter_model.safetensors."""

    def __init__(self, reader: SliceReader) -> None:
        self._reader = reader
        self._names = {stored_name(name): name for name in reader.parameters}
        self.path, self.manifest = reader.path, reader.manifest
        self.parameters = {stored: reader.parameters[name] for stored, name in self._names.items()}

    def read(self, kind: str, parameter: str, start: int = 0, count: int | None = None) -> Floats:
        """See SliceReader.read."""
        return self._reader.read(kind, self._names[parameter], start, count)

    def buffer(self, name: str) -> np.ndarray[Any, Any]:
        """See SliceReader.buffer."""
        return self._reader.buffer(name)


class AdapterFile:
    """A LoRA adapter in peft's format, from anywhere; `config` is what its adapter_config.json says.

    Raises MissingInputError without one, DataError when it is more than the two matrices of plain LoRA.
    """

    def __init__(self, directory: Path) -> None:
        config = read_adapter_config(directory)
        file = directory / f"{STEM}.safetensors"
        if config is None or not file.is_file():
            raise MissingInputError(f"{directory} is no adapter: it needs {CONFIG_NAME} and {file.name}", "give one")
        settings = json.loads((directory / CONFIG_NAME).read_bytes())
        if more := [name for name in _BEYOND_LORA if settings.get(name) not in (None, False, "none", {}, [])]:
            raise DataError(f"{directory} uses {more[0]}, which is more than plain LoRA", "merge it with peft")
        self.config, self._directory, self._file = config, directory, file
        with safe_open(file, framework="pt") as opened:
            self._names = set(opened.keys())

    def check(self, shapes: Mapping[str, tuple[int, ...]], base: Path) -> None:
        """DataError for a matrix that has no place in a model with these `shapes`."""
        known = {stored_name(part) for name in shapes for part in parameter_names(name.removesuffix(".weight"))}
        if odd := sorted(self._names - known):
            raise DataError(f"{self._file}: {odd[0]} has no place in {base}", "give the base it was trained on: --base")

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight called `name` with its part of the adapter added, in fp32; others as they are."""
        down, up = map(stored_name, parameter_names(name.removesuffix(".weight")))
        if down not in self._names:
            return weight
        with safe_open(self._file, framework="pt") as opened:
            first, second = opened.get_tensor(up).float(), opened.get_tensor(down).float()
        if (first.shape[0], second.shape[1]) != tuple(weight.shape) or first.shape[1] != second.shape[0]:
            raise DataError(f"{self._file}: the matrices of {name} do not fit its shape {tuple(weight.shape)}", "")
        return torch.addmm(weight.float(), first, second, alpha=self.config.scale)


def find_base(checkpoint: Path, adapter: AdapterConfig, base: Path | None) -> Path:
    """The directory of the base model: `base` if given, else where training read it. Every byte of it is hashed.

    Raises MissingInputError when it is not there, DataError when it is not the one that was trained with.
    """
    found = base or Path(adapter.base)
    if not found.is_dir():
        raise MissingInputError(f"the base model {found} of {checkpoint} is not there", "name it: --base DIR")
    present, trained = weights_fingerprint(found), SliceReader(checkpoint).manifest.identity.get("base")
    if present != trained:
        raise DataError(
            f"{found} is not the base that {checkpoint} was trained with (its weights are {present}, not {trained})",
            "name the right one: --base DIR",
        )
    return found


def load_with_adapter(directory: Path, base: Path) -> Any:
    """The base with the adapter files of `directory`, fp32: through peft if it is installed, else by the formula."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False
    )
    if has_peft():
        from peft import PeftModel

        return PeftModel.from_pretrained(model, directory, local_files_only=True).eval()
    adapter = read_adapter_config(directory)
    if adapter is None:
        raise DataError(f"{directory} has no {CONFIG_NAME}", "export it again")
    with safe_open(directory / f"{STEM}.safetensors", framework="pt") as file, torch.no_grad():
        stored = set(file.keys())
        for name, module in model.named_modules():
            down, up = map(stored_name, parameter_names(name))
            if down in stored:
                module.weight.addmm_(file.get_tensor(up).float(), file.get_tensor(down).float(), alpha=adapter.scale)
                stored -= {down, up}
    if stored:
        raise DataError(f"{directory}: {min(stored)} has no place in the base model", "export it again")
    return model.eval()


def has_peft() -> bool:
    """Whether the extra `lora` is installed."""
    return importlib.util.find_spec("peft") is not None


def loaded_with() -> str:
    """What `load_with_adapter` loads an adapter with, in words."""
    return "peft" if has_peft() else "transformers, the adapter added by its formula (peft is not installed)"


def _shape(file: Path, name: str) -> tuple[int, ...]:
    with safe_open(file, framework="pt") as opened:
        return tuple(opened.get_slice(name).get_shape())
