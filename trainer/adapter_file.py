"""The files of a LoRA adapter, as peft defines them: adapter_config.json and adapter_model.safetensors. Torch-free.

peft, transformers and vLLM load a directory of these two files on top of the base model that the first one names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import DataError

CONFIG_NAME = "adapter_config.json"
STEM = "adapter_model"
DOWN, UP = "lora_A", "lora_B"
"""The two thin matrices of an adapted module: A is [rank, inputs], B is [outputs, rank]."""
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says, as far as it is used here."""

    base: str
    """The base model: a directory, or a name of the hub."""
    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    """Last parts of the names of the adapted modules."""

    @property
    def scale(self) -> float:
        """Factor of B A in the weight of an adapted module."""
        return self.alpha / self.rank

    def as_json(self) -> dict[str, Any]:
        """The content of adapter_config.json."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base,
            "r": self.rank,
            # A whole number where it is one: peft declares an int.
            "lora_alpha": int(self.alpha) if self.alpha.is_integer() else self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": list(self.targets),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "modules_to_save": None,
            "use_dora": False,
            "use_rslora": False,
        }


def read_adapter_config(directory: Path) -> AdapterConfig | None:
    """What adapter_config.json in `directory` says, None without one; DataError when it is not of this kind."""
    path = directory / CONFIG_NAME
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())
        return AdapterConfig(
            base=str(found["base_model_name_or_path"]),
            rank=int(found["r"]),
            alpha=float(found["lora_alpha"]),
            dropout=float(found["lora_dropout"]),
            targets=tuple(map(str, found["target_modules"])),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not readable", "restore it from a copy") from error


def parameter_names(module: str) -> tuple[str, str]:
    """Names of the two matrices of the adapted `module` inside the model."""
    return f"{module}.{DOWN}.weight", f"{module}.{UP}.weight"


def stored_name(parameter: str) -> str:
    """Name of an adapter's parameter in adapter_model.safetensors."""
    return _PREFIX + parameter


def adapted_modules(parameters: Iterable[str]) -> list[str]:
    """Names of the modules whose matrices are among `parameters`, in order."""
    ending = f".{DOWN}.weight"
    return [name.removesuffix(ending) for name in parameters if name.endswith(ending)]
