"""Models come from a local transformers directory, always through the same door.

A model from scratch is first written to disk as such a directory by rank 0 and then loaded like any other: its first
weights are the same for every number of ranks and every ZeRO stage, and they can be looked at.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from trainer.config.schema import Model
from trainer.errors import ConfigError, DataError, MissingInputError
from trainer.tensor_file import TensorFile


def write_initial_model(
    model: Model, vocabulary_size: int, special_ids: dict[str, int | None], seed: int, out: Path
) -> None:
    """Create a model from `model.config` with random fp32 weights of `seed` and save it at `out`. One rank calls it.

    `special_ids` has bos_token_id, eos_token_id and pad_token_id of the tokenizer.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(model.config or {})
    model_type = settings.pop("model_type")
    if settings.get("vocab_size", vocabulary_size) < vocabulary_size:
        raise ConfigError(
            [f"model.config.vocab_size {settings['vocab_size']} is below the tokenizer's {vocabulary_size}; remove it"]
        )
    settings = {"vocab_size": vocabulary_size, **special_ids, **settings}
    try:
        config = AutoConfig.for_model(model_type, **settings)
        torch.manual_seed(seed)
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError([f"model.config does not describe a model: {reason}"]) from error
    temporary = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    network.save_pretrained(temporary)
    temporary.rename(out)


def load_language_model(path: Path, *, dtype: str, attention: str, gradient_checkpointing: bool) -> Any:
    """The causal model at `path`, ready to train (sharded while a ZeroThreeHook is held). All ranks call it together.

    `check_inventory` comes first: transformers fills missing weights with random numbers and goes on.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        network = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            local_files_only=True,
            use_safetensors=True,
        )
    except (ValueError, ImportError) as error:
        # An attention that the architecture or this machine does not have; transformers' text goes on for paragraphs.
        reason = str(error).split(". ", maxsplit=1)[0]
        raise ConfigError([f"model.attention: {attention} cannot be used with {path}: {reason}"]) from error
    network.config.use_cache = False
    if gradient_checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    return network


def check_inventory(path: Path) -> None:
    """Refuse a directory whose stored tensors are not those of the model that config.json describes.

    Not while a ZeroThreeHook is held: the comparison builds the model on the meta device.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (path / "config.json").is_file():
        raise MissingInputError(f"{path} has no config.json", "model.path must be a local transformers directory")
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, local_files_only=True))
    names = dict(expected.state_dict(keep_vars=True))
    first_name: dict[int, str] = {}
    for name, tensor in names.items():
        first_name.setdefault(id(tensor), name)
    required = set(first_name.values())
    stored = stored_names(path)
    missing = {name for name in required if name not in stored and not _alias_is_stored(name, names, stored)}
    unexpected = stored - set(names)
    for side, kind, wrong in (("file", "lacks", missing), ("model", "has no place for", unexpected)):
        if wrong:
            raise DataError(
                f"{path}: {len(wrong)} tensors do not fit: the {side} {kind} {min(wrong)}",
                "give a directory written by save_pretrained of a causal language model",
            )


def stored_names(path: Path) -> set[str]:
    """Names of all tensors in the directory's safetensors files."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return set(json.loads(index.read_text())["weight_map"])
    single = path / "model.safetensors"
    if not single.is_file():
        raise MissingInputError(f"{path} has no safetensors weights", "convert the model to safetensors first")
    return set(TensorFile(single).entries)


def tied_names(network: Any) -> dict[str, str]:
    """Alias of each tied parameter to the name it is stored under (the first in model order)."""
    first: dict[int, str] = {}
    aliases = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name:
            aliases[name] = owner
    return aliases


def _alias_is_stored(name: str, names: dict[str, Any], stored: set[str]) -> bool:
    return any(alias in stored for alias, tensor in names.items() if tensor is names[name])
