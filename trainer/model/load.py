"""Models come from a local transformers directory, always through the same door.

A model from scratch is first written to disk as such a directory by rank 0 and then loaded like any other: its first
weights are the same for every number of ranks and every ZeRO stage, and they can be looked at.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.config.schema import Model
from trainer.durable import present_umask, write_errors
from trainer.errors import CannotWriteError, ConfigError, DataError, MissingInputError
from trainer.tensor_file import TensorFile
from trainer.weight_files import weight_files

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
ALWAYS_KNOWN = {"rope_theta", "rope_scaling", "model_type"}


def write_initial_model(
    model: Model, vocabulary_size: int, special_ids: dict[str, int | None], seed: int, out: Path
) -> None:
    """Create a model from `model.config` with random fp32 weights of `seed` and save it at `out`. One rank calls it.

    `special_ids` has bos_token_id, eos_token_id and pad_token_id of the tokenizer. Raises ConfigError when model.config
    has a key its architecture does not know, or describes no model.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(model.config or {})
    model_type = settings.pop("model_type")
    if settings.get("vocab_size", vocabulary_size) < vocabulary_size:
        raise ConfigError(
            [f"model.config.vocab_size {settings['vocab_size']} is below the tokenizer's {vocabulary_size}; remove it"]
        )
    try:
        known = AutoConfig.for_model(model_type)
        unknown = set(settings) - set(known.to_dict()) - set(known.attribute_map) - ALWAYS_KNOWN
        if unknown:
            raise ConfigError([_unknown_key(key, model_type, known.to_dict()) for key in sorted(unknown)])
        config = AutoConfig.for_model(model_type, **{"vocab_size": vocabulary_size, **special_ids, **settings})
        torch.manual_seed(seed)
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except ConfigError:
        raise
    except Exception as error:
        # Anything at all: the constructors of some hundred architectures say "no" each in its own way.
        raise ConfigError([f"model.config describes no {model_type} model: {_first_sentence(error)}"]) from error
    temporary = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with write_errors(out):
            network.save_pretrained(temporary)
            for file in temporary.iterdir():
                # safetensors closes its files to the group, whatever the umask says.
                file.chmod(0o666 & ~present_umask())
            temporary.rename(out)
    except SafetensorError as error:
        raise CannotWriteError(f"cannot write {out}: {error}", "free disk space or set another run.dir") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_language_model(path: Path, *, dtype: str, attention: str, gradient_checkpointing: bool) -> Any:
    """The causal model at `path`, ready to train (sharded while a ZeroThreeHook is held). All ranks call it together.

    `check_inventory` comes first: transformers fills missing weights with random numbers and goes on. Raises
    ConfigError when the architecture or this machine does not have the attention.
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
            trust_remote_code=False,
        )
    except (ValueError, ImportError) as error:
        if attention not in str(error) and "attention" not in str(error):
            raise
        raise ConfigError(
            [f"model.attention: {attention} cannot be used with {path}: {_first_sentence(error)}"]
        ) from error
    network.config.use_cache = False
    if gradient_checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    return network


def train_only(network: Any, patterns: Sequence[str] | None) -> None:
    """Freeze every parameter whose name matches none of the shell `patterns`; None trains all.

    Raises ConfigError when a pattern matches nothing.
    """
    if patterns is None:
        return
    names = [name for name, _ in network.named_parameters()]
    if unused := [pattern for pattern in patterns if not fnmatch.filter(names, pattern)]:
        raise ConfigError(
            [f"model.trainable: {pattern!r} matches no parameter, e.g. not {names[-1]}" for pattern in unused]
        )
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))


def trainable_share(network: Any) -> tuple[int, int]:
    """(trained elements, all elements) of the network's parameters, whole ones also where they are sharded."""
    sizes = [
        (parameter.requires_grad, getattr(parameter, "ds_numel", parameter.numel()))
        for parameter in network.parameters()
    ]
    return sum(size for trained, size in sizes if trained), sum(size for _, size in sizes)


def check_inventory(path: Path) -> None:
    """Refuse a directory whose stored tensors are not, in name and shape, those of the model config.json describes.

    Every file is opened and its header checked, so an incomplete download is found here. Not while a ZeroThreeHook is
    held: the comparison builds the model on the meta device. Raises DataError or MissingInputError.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (path / "config.json").is_file():
        raise MissingInputError(f"{path} has no config.json", "model.path must be a local transformers directory")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            expected = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise DataError(
            f"{path}/config.json describes no causal language model: {_first_sentence(error)}",
            "give a directory written by save_pretrained",
        ) from error
    if any((getattr(config, name, None) or 0) > 1 for name in EXPERTS):
        raise DataError(f"{path} is a mixture of experts ({config.model_type})", "only dense models can be trained yet")
    names: dict[str, Any] = dict(expected.state_dict(keep_vars=True))
    stored = stored_shapes(path)
    ignored = getattr(expected, "_keys_to_ignore_on_load_unexpected", None) or []
    aliases: dict[int, list[str]] = {}
    for name, tensor in names.items():
        aliases.setdefault(id(tensor), []).append(name)
    missing = [group[0] for group in aliases.values() if not any(name in stored for name in group)]
    foreign = [name for name in stored if name not in names and not any(re.search(key, name) for key in ignored)]
    misshapen = [name for name in stored if name in names and stored[name] != tuple(names[name].shape)]
    for wrong, what in ((missing, "lacks"), (foreign, "has a tensor the model has no place for:")):
        if wrong:
            raise DataError(
                f"{path} {what} {min(wrong)}" + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""),
                "give a directory written by save_pretrained of a causal language model",
            )
    if misshapen:
        name = min(misshapen)
        raise DataError(
            f"{path}: {name} has shape {list(stored[name])}, config.json asks for {list(names[name].shape)}",
            "weights and config.json belong to different models",
        )


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name to shape of all tensors in the directory's safetensors files, read from their headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(path):
        shapes |= {name: entry.shape for name, entry in TensorFile(file).entries.items()}
    return shapes


def tied_names(network: Any) -> dict[str, str]:
    """Alias of each tied parameter to the name it is stored under (the first in model order)."""
    first: dict[int, str] = {}
    aliases = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name:
            aliases[name] = owner
    return aliases


def _unknown_key(key: str, model_type: str, known: dict[str, Any]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"model.config.{key} is not a setting of {model_type}{hint}"


def _first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ", maxsplit=1)[0][:300]
